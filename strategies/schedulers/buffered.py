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

from collections.abc import Iterator
from dataclasses import dataclass

from strategies.contract import Claim, ContractError, name_of
from strategies.exchange import Exchange
from strategies.hooks import RoundView
from strategies.rounds import Rounds
from strategies.schedulers.buffer import Buffer
from strategies.schedulers.version import Version
from strategies.server_models import ServerModel

_MOST_BUFFERS_BUSY = 5
"""Clients kept busy, in buffers, where nobody says how many: their updates are that many versions old on average."""


@dataclass
class Buffered(Buffer):
    """Applies K updates at a time, whoever is still at work.

    Its settings, and what lasts from one version to the next, are those of `Buffer`.
    """

    label = "scheduler=buffered"

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
