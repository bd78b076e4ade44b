"""The settings of a buffered run, and what of it lasts: from one version to the next, and through a restart.

Who is asked for a version, and what is made of what comes, is `strategies.schedulers.version`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le
from flwr.app import ArrayRecord

from strategies.ranges import Ranged
from strategies.schedulers.compass import Compass
from strategies.schedulers.flight import Flight, Resumed
from strategies.schedulers.staleness import Polynomial, Staleness
from strategies.secagg.terms import ModelDigest
from strategies.state import State, integer_in, mapping_in
from strategies.wire import ARRAYS

DEFAULT_BUFFER = 10
"""K of the paper."""


@dataclass
class Buffer(Ranged):
    """K updates at a time: how many, how old, and who is still at work.

    Attributes:
        buffer: K, updates (or masked sums) that make a step; None for 10, or half of the clients where that is less.
        concurrency: clients kept busy; None for the sampler's cohort, but for no more than fill five buffers.
        cohort: clients a session; more than one for collectors that hide a client among others.
        staleness: what an update's age leaves of its influence.
        max_staleness: versions past which an update is refused; its client gets the present model when next asked.
        damp: whether the server's step is divided by 1 + the mean staleness of the buffer.
        mixing: α of FedAsync, which moves towards the client's model, not along its change: x ← x +
            α·s(τ)·(x_(t−τ) + Δ − x). Only with a buffer of one. None moves along the change.
        deadline: seconds that a client, or each phase of a session, may take; None for the round's own limit.
        pace: gives clients as many local steps as let replies arrive together; None leaves that to the trainer.
        population: clients in all; None where that is not known.
        busy: clients kept busy, as `check` found.
        flight: sessions under way.
        settled: clients whose updates on the model as it is sent now are part of it already: where a step was too small
            to show in what is sent, a sum that was opened on it is not to be taken up again.

    Raises:
        ValueError: `mixing` with a larger buffer, or `pace` with cohorts.
    """

    buffer: Annotated[int, Ge(1)] | None = None
    concurrency: Annotated[int, Ge(1)] | None = None
    cohort: Annotated[int, Ge(1)] = 1
    staleness: Staleness = field(default_factory=Polynomial)
    max_staleness: Annotated[int, Ge(0)] = 10
    damp: bool = False
    mixing: Annotated[float, Gt(0), Le(1)] | None = None
    deadline: Annotated[float, Gt(0)] | None = None
    pace: Compass | None = None
    population: Annotated[int, Ge(1)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixing is not None and self.buffer != 1:
            raise ValueError(
                f"mixing = {self.mixing:g} moves towards one client's model: set buffer = 1"
            )
        if self.pace is not None and self.cohort > 1:
            raise ValueError("members of one sum train alike: leave pace out, or set cohort = 1")
        self.busy = 1
        self._opened = 0
        self._resumed = Resumed()
        self.flight = Flight()
        self.settled: set[int] = set()
        self._sent, self._digest = "", ModelDigest()

    @property
    def size(self) -> int:
        """K, as it is used."""
        if self.buffer is not None:
            return self.buffer
        if self.population is None:
            return DEFAULT_BUFFER
        return max(1, min(DEFAULT_BUFFER, self.population // self.cohort // 2))

    def state_dict(self) -> State:
        """Who is at work on which model, and the pace of each client."""
        pace = {} if self.pace is None else {"pace": self.pace.state_dict()}
        return {
            "opened": self._opened,
            "flight": self.flight.state_dict(),
            "sent": self._sent,
            "settled": np.array(sorted(self.settled), np.int64),
            **pace,
        }

    def load_state_dict(self, state: State) -> None:
        """Takes up an earlier process: who was at work is asked again, for the same; sums under way are given up."""
        self._opened = integer_in(state, "opened")
        self._resumed = Resumed.of(mapping_in(state, "flight"))
        settled = state.get("settled")
        if not isinstance(settled, np.ndarray) or settled.dtype != np.int64 or settled.ndim != 1:
            raise ValueError("the state's 'settled' should be a vector of int64")
        self.settled, self._sent = set(settled.tolist()), str(state["sent"])
        if self.pace is not None:
            self.pace.load_state_dict(mapping_in(state, "pace"))

    def number(self) -> int:
        """A new number for each time that clients are asked in a run."""
        self._opened += 1
        return self._opened

    def begin(self, sent: ArrayRecord) -> None:
        """A version of which this is sent."""
        before, self._sent = self._sent, self._digest.of({ARRAYS: sent}).hex()
        if before != self._sent:
            self.settled = set()

    @property
    def resumes(self) -> bool:
        """Whether an earlier process had clients at work that are still to be asked again."""
        return bool(self._resumed.requests)

    def taken_up(self) -> Resumed:
        """What an earlier process had under way; nothing when asked again."""
        resumed, self._resumed = self._resumed, Resumed()
        return resumed
