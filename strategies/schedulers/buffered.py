"""Buffered asynchronous rounds: nobody waits for the slow.

FedBuff (Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation", Algorithm 1), and FedAsync
with a buffer of one (Xie, Koyejo & Gupta 2019, "Asynchronous Federated Optimization", Algorithm 1).

    keep M clients busy, each on the model version that it was given
    whenever an update Δ comes, τ versions old:  buffer ← buffer + s(τ)·Δ, and the client's place is given to another
    as soon as K updates are there:              x ← server step on the buffer / K

A client is in one buffer once: whoever has answered rests until the buffer is applied, so
that fast clients can't fill it alone, and f of a robust rule is judged against K. Under masks a session is a cohort on
one version of the model, and the buffer is of K sums.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le
from flwr.app import ArrayRecord

from strategies.contract import Claim, ContractError, name_of
from strategies.exchange import Exchange
from strategies.hooks import RoundView
from strategies.ranges import Ranged
from strategies.rounds import Rounds
from strategies.schedulers.compass import Compass
from strategies.schedulers.flight import Flight, Resumed
from strategies.schedulers.staleness import Polynomial, Staleness
from strategies.schedulers.version import Version
from strategies.secagg.terms import ModelDigest
from strategies.server_models import ServerModel
from strategies.state import State, integer_in, mapping_in
from strategies.wire import ARRAYS

log = logging.getLogger(__name__)

DEFAULT_BUFFER = 10
"""K of the paper."""
_MOST_BUFFERS_BUSY = 5
"""Clients kept busy, in buffers, where nobody says how many: their updates are that many versions old on average."""


@dataclass
class Buffered(Ranged):
    """Applies K updates at a time, whoever is still at work.

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

    label = "scheduler=buffered"

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

    def check(self, claim: Claim) -> Claim:
        """Updates of several versions, in buffers of K; nothing can be claimed of how clients come to be in one.

        Raises:
            ContractError: the sampler asks whole cohorts, by coins or of like speed, or there are too few clients for a
                buffer.
        """
        planned = self.size * self.cohort
        if claim.sampling == "poisson":
            raise ContractError(
                claim.source("sampling"),
                name_of(self),
                "there is no round whose coins could be thrown: clients are asked one after the other",
                "use sampler=uniform, or sampler=spaced under privacy=ftrl",
            )
        if claim.measured:
            raise ContractError(
                claim.source("measured"),
                name_of(self),
                "it makes cohorts of like speed, and here clients are asked one after the other: the fast, who are idle"
                " sooner, would be asked more often all the same",
                "use sampler=uniform, or scheduler=synchronous",
            )
        most = _MOST_BUFFERS_BUSY * planned
        most = min(most, self.population or most)
        self.busy = self.concurrency or max(self.cohort, min(claim.cohort or most, most))
        rested = planned * max(1, claim.separation)
        for needed, told in (
            (planned, f"a buffer is of {planned} different clients"),
            (rested, f"clients stay away for {claim.separation} buffers of {planned} clients"),
            (self.busy, f"{self.busy} clients are to be kept busy"),
        ):
            if self.population is not None and needed > self.population:
                raise ContractError(
                    claim.source("cohort", "separation"),
                    name_of(self),
                    f"{told}, and there are {self.population} in all",
                    "lower scheduler.buffer, scheduler.cohort or scheduler.concurrency, or raise num_clients",
                )
        if self.busy < self.cohort:
            raise ContractError(
                name_of(self),
                name_of(self),
                f"{self.busy} clients kept busy are no cohort of {self.cohort}",
                "raise scheduler.concurrency",
            )
        return claim.given(
            self,
            cohort=planned,
            sessions=self.size,
            sampling="uncontrolled",
            rate=None,
            staleness=self.max_staleness,
        )

    def describe(self) -> str:
        """In a line: what a step is made of."""
        sums = "updates" if self.cohort == 1 else f"sums of {self.cohort} clients"
        age = f"s(τ) of {type(self.staleness).__name__.lower()}, τ ≤ {self.max_staleness}"
        return f"buffered: {self.busy} clients busy, a step every {self.size} {sums}, {age}"

    def run(
        self,
        pipeline: Rounds,
        model: ServerModel,
        exchange: Exchange,
        until: int,
        *,
        timeout: float = 3600.0,
        seed: int = 0,
    ) -> Iterator[RoundView]:
        """Versions until the model has version `until`; each view is yielded as soon as its model exists.

        Args:
            pipeline: the parts.
            model: is changed.
            exchange: the way to the clients.
            until: the version to reach.
            timeout: seconds (of the exchange's clock) after which a buffer that has not filled is applied as it is, or
                is void where it lacks a quorum.
            seed: the run's, for who is asked.
        """
        exchange.downlink = pipeline.downlink
        while model.version < until:
            yield Version(self, pipeline, model, exchange, timeout, seed).run()
        exchange.forget()

    # ---- through a restart ----

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
