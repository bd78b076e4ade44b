"""A circuit breaker for each client: who fails again and again is not asked for a while, and is then tried once.

Nygard 2007, "Release It!", section 5.2: closed, requests go out; open, after so many failures in a row, none do; half
open, when the rest is over, one does, and tells which of the two it will be. A failure is a round in which a client was
asked and no update came, for an error, a missed deadline or a battery that is low. What came and was wrong is no
failure: that is the quarantine's. How often it failed within one round counts once: an outage of the server's own
network must not open all circuits at once. Each failed trial makes the next rest twice as long.

**Under differential privacy** a client at rest is one that is not there: it gives a zero, as if it had dropped out.
Whether it rests follows from its own failures alone. So the sampler draws among all, and who rests is left out of what
was drawn: each client's chance of taking part is at most what the sampler claims of a fixed-size draw or of a Poisson
coin, no client takes another's place, denominators and noise are the planned cohort's, and nobody is called back since
others fail. `Pipeline.draw` does it so; without a promise it draws among those that do not rest, for a whole cohort.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from annotated_types import Ge

from strategies.contract import Claim
from strategies.ranges import Ranged
from strategies.state import State, integer_in

log = logging.getLogger(__name__)

_COLUMNS = ("client", "failures", "last", "rest", "since")


@dataclass
class _Circuit:
    """One client that has failed since it last answered.

    Attributes:
        failures: rounds in a row.
        last: of them.
        rest: rounds that the last rest was, or is, to last; 0 where it never rested: the circuit is closed.
        since: the round from which it rests.
    """

    failures: int = 0
    last: int = 0
    rest: int = 0
    since: int = 0


@dataclass
class CircuitBreaker(Ranged):
    """Keeps clients that do not answer from the rounds that come.

    Attributes:
        failures: rounds in a row in which a client failed, after which it rests.
        rest: rounds for which it is not asked then.
        most_rest: the longest rest: each failed trial doubles it up to here.
        trips: how often a circuit was opened, failed trials included.

    Raises:
        ValueError: `rest` is longer than `most_rest`.
    """

    failures: Annotated[int, Ge(1)] = 3
    rest: Annotated[int, Ge(1)] = 5
    most_rest: Annotated[int, Ge(1)] = 80
    trips: int = field(default=0, init=False)
    _circuits: dict[int, _Circuit] = field(default_factory=dict, init=False)
    _round: int = field(default=0, init=False)
    _called: frozenset[int] = field(default=frozenset(), init=False)

    label = "breaker"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rest > self.most_rest:
            raise ValueError(
                f"rest = {self.rest} is longer than most_rest = {self.most_rest}: raise breaker.most_rest, or lower"
                f" breaker.rest"
            )

    def check(self, claim: Claim) -> Claim:
        """Goes with everything: to all other parts, whoever rests is not there."""
        return claim

    def allowed(self, there: Sequence[int], round_number: int, keep: int = 0) -> list[int]:
        """Who of these clients is asked in this round, in their order.

        Args:
            there: logical ids.
            round_number: of the round that begins, from 1. Rests that it is past are over.
            keep: clients without whom there is no round: where fewer are left, those come back who rested longest.
        """
        self._round, self._called = round_number, frozenset()
        resting = [client for client in there if self.rests(client)]
        missing = min(len(resting), max(0, keep - (len(there) - len(resting))))
        if missing:
            # An id is the client's own to choose: it decides last.
            resting.sort(key=lambda client: (self._circuits[client].since, client))
            self._called = frozenset(resting[:missing])
            log.warning(
                "round %d asks %d clients that were at rest: without them %d would be left, and %d are needed",
                round_number, missing, len(there) - len(resting), keep,
            )  # fmt: skip
        return [client for client in there if not self.rests(client)]

    def rests(self, client: int) -> bool:
        """Whether a client is not asked in the round that was last told of."""
        circuit = self._circuits.get(client)
        if circuit is None or not circuit.rest or client in self._called:
            return False
        return self._round < circuit.since + circuit.rest

    def answered(self, client: int) -> None:
        """A client has sent what it trained: its circuit is closed."""
        circuit = self._circuits.pop(client, None)
        if circuit is not None and circuit.rest:
            log.warning("client %d answers again and is asked as before", client)

    def failed(self, client: int) -> None:
        """A client has failed in the round that was last told of."""
        circuit = self._circuits.setdefault(client, _Circuit())
        if circuit.last == self._round:
            return
        circuit.failures += 1
        circuit.last = self._round
        if not circuit.rest and circuit.failures < self.failures:
            return
        circuit.rest = min(self.most_rest, 2 * circuit.rest or self.rest)
        circuit.since = self._round + 1
        self.trips += 1
        log.warning(
            "client %d has failed %d rounds in a row and is not asked from round %d to %d",
            client, circuit.failures, circuit.since, circuit.since + circuit.rest - 1,
        )  # fmt: skip

    @property
    def open(self) -> list[int]:
        """Clients that are not asked as others are, or will be tried once: all who rested and have not answered."""
        return sorted(client for client, circuit in self._circuits.items() if circuit.rest)

    def report(self) -> dict[str, object]:
        """Plain data: `open`, those whose circuits are, and `trips`."""
        return {"open": self.open, "trips": self.trips}

    # ---- through a restart ----

    def state_dict(self) -> State:
        """Five int64 vectors over the clients that fail, and how often circuits were opened."""
        rows = [
            (client, one.failures, one.last, one.rest, one.since)
            for client, one in sorted(self._circuits.items())
        ]
        table = np.array(rows, np.int64).reshape(-1, len(_COLUMNS))
        columns = {name: table[:, place].copy() for place, name in enumerate(_COLUMNS)}
        return {**columns, "round": self._round, "trips": self.trips}

    def load_state_dict(self, state: State) -> None:
        """Takes up an earlier run's, in place of what was known.

        Raises:
            ValueError: another part's state, or one that no breaker can have left.
        """
        columns = []
        for name in _COLUMNS:
            value = state.get(name)
            if not isinstance(value, np.ndarray) or value.dtype != np.int64 or value.ndim != 1:
                raise ValueError(f"the state's {name!r} should be a vector of int64")
            columns.append(value.tolist())
        clients, *numbers = columns
        whole = {len(column) for column in columns} == {len(set(clients))}
        if not whole or any(number < 0 for column in columns for number in column):
            raise ValueError("a breaker's state holds numbers of at least 0 for different clients")
        rows = zip(*numbers, strict=True)
        self._circuits = {client: _Circuit(*row) for client, row in zip(clients, rows, strict=True)}
        self._round, self.trips = integer_in(state, "round"), integer_in(state, "trips")
        self._called = frozenset()
