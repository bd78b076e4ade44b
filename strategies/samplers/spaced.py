"""Clients that are asked at most k times, at least b rounds apart: what DP-FTRL's noise rests on instead of chance.

b-min-sep participation (Choquette-Choo et al. 2023, "(Amplified) Banded Matrix Factorization: A unified approach to
private training", §3): nothing is assumed of how a cohort is drawn, only that no client comes again too early or too
often, which the server sees to by remembering whom it has asked (the privacy timer of Kairouz et al. 2021, "Practical
and Private (Deep) Learning without Sampling or Shuffling"). Being asked counts, whether or not the client answers:
what is not sent can't cost anything, and a reply that is lost must not be asked for anew within b rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray

from strategies.contract import Claim, ContractError
from strategies.ranges import Ranged
from strategies.seeds import generator
from strategies.state import State

_COLUMNS = ("clients", "last", "times")


@dataclass
class Spaced(Ranged):
    """Asks max(minimum, ⌊fraction · n⌉) of the n clients that are there, as far as so many may be asked.

    Those who were asked least often come first, in random order. A second attempt at a round asks others: who was asked
    in the first is b rounds away from being asked again. Where too few may be asked the cohort is smaller, or empty.

    **What holds after a restart.** One process's noise is a segment (`privacy.BandedToeplitz`), and all rounds of a
    segment are drawn by one sampler, whose memory only grows: loading a state adds to it. So within a segment no client
    is asked more than k times nor less than b rounds apart, whatever was loaded, and each segment is charged with k. A
    checkpoint that lacks the last rounds of a killed process therefore does no harm: the clients asked in them were
    asked in another segment, which is charged for itself. Only the sum over all segments may exceed k, by the rounds
    that no checkpoint knows of; no charge counts on it. Round numbers that go back, by a roll-back, keep
    clients away for longer, never shorter: rows of noise advance at least as fast as round numbers do.

    Attributes:
        participations: rounds in which a client is asked at most, k.
        separation: a client asked in round t is asked again in round t + b at the earliest, b.
        fraction: of the clients, in (0, 1].
        minimum: asked at least, as far as there are so many.
        population: clients planned in all, which fixes the cohort for the contract; 0 where it is not known.
    """

    participations: Annotated[int, Ge(1)]
    separation: Annotated[int, Ge(1)]
    fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    minimum: Annotated[int, Ge(1)] = 1
    population: Annotated[int, Ge(0)] = 0
    _last: dict[int, int] = field(default_factory=dict, init=False)
    _times: dict[int, int] = field(default_factory=dict, init=False)

    label = "sampler=spaced"

    def check(self, claim: Claim) -> Claim:
        """Promises how often and how far apart, and nothing of chance.

        Raises:
            ContractError: even with every client there, cohorts could not all be whole.
        """
        cohort = self.cohort(self.population) if self.population else None
        if cohort is not None and cohort * self.separation > self.population:
            raise ContractError(
                "sampler.fraction",
                "sampler.separation",
                f"{self.separation} cohorts of {cohort} have no client in common, and there are {self.population}"
                f" clients in all",
                f"set sampler.separation={self.population // cohort} at most, or lower sampler.fraction and"
                f" sampler.minimum",
            )
        return claim.given(
            self,
            sampling="uncontrolled",
            cohort=cohort,
            participations=self.participations,
            separation=self.separation,
        )

    def cohort(self, available: int) -> int:
        """How many of `available` clients are asked where all of them may be."""
        return min(available, max(self.minimum, round(self.fraction * available)))

    def draw(
        self, clients: Sequence[int], *, seed: int, round_number: int, attempt: int
    ) -> list[int]:
        """A cohort, in ascending order, which is asked from now on; none of it again for this round.

        Args:
            clients: logical ids of those who are there.
            seed: the run's. No privacy rests on the order.
            round_number: from 1.
            attempt: from 0.
        """
        there = sorted(set(clients))
        count = self.cohort(len(there))
        return self.pick(there, count, seed=seed, round_number=round_number, attempt=attempt)

    def pick(
        self, clients: Sequence[int], count: int, *, seed: int, round_number: int, attempt: int
    ) -> list[int]:
        """At most `count` of the clients, in ascending order, who are asked from now on, for this round or a later one.

        Where clients are asked one after the other, an update may become part of a later round than it was asked for:
        `took` tells, and the next one counts from there.
        """
        free = [client for client in clients if self.may(client, round_number)]
        generator(seed, "sampler", round_number, attempt).shuffle(free)
        free.sort(key=lambda client: self._times.get(client, 0))
        chosen = sorted(free[:count])
        for client in chosen:
            self._last[client] = round_number
            self._times[client] = self._times.get(client, 0) + 1
        return chosen

    def took(self, clients: Iterable[int], round_number: int) -> None:
        """These clients took part in this round, whenever they were asked."""
        for client in clients:
            self._last[client] = max(round_number, self._last.get(client, round_number))

    def exhausted(self, clients: Sequence[int]) -> bool:
        """Whether none of these clients will ever be asked again; not so where nobody is there."""
        return bool(clients) and all(
            self._times.get(client, 0) >= self.participations for client in clients
        )

    def state_dict(self) -> State:
        """For each client that was ever asked its id, its last round and how often: three int64 arrays."""
        clients = sorted(self._last)
        rows = [(client, self._last[client], self._times[client]) for client in clients]
        table = np.array(rows, np.int64).reshape(-1, len(_COLUMNS))
        return {name: table[:, place].copy() for place, name in enumerate(_COLUMNS)}

    def load_state_dict(self, state: State) -> None:
        """Adds an earlier run's memory to this one's: of each client the later round and the larger number count.

        Raises:
            ValueError: another part's state, or one that no sampler can have left.
        """
        clients, lasts, numbers = columns = [_column(state, name) for name in _COLUMNS]
        whole = len(clients) == len(lasts) == len(numbers)
        if not whole or (lasts < 1).any() or (numbers < 1).any():
            raise ValueError(
                "a spaced sampler's state holds a round and a number from 1 for each client"
            )
        for client, last, times in zip(*(column.tolist() for column in columns), strict=True):
            self._last[client] = max(last, self._last.get(client, last))
            self._times[client] = max(times, self._times.get(client, times))

    def may(self, client: int, round_number: int) -> bool:
        """Whether a client may be asked in this round."""
        last = self._last.get(client)
        return last is None or (
            round_number - last >= self.separation and self._times[client] < self.participations
        )


def _column(state: State, name: str) -> NDArray[np.int64]:
    value = state.get(name)
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype != np.int64:
        raise ValueError(f"the state's {name!r} should be a vector of int64")
    return value.astype(np.int64)
