"""Synchronous rounds: FedAvg's loop (McMahan et al. 2017, Algorithm 1).

    for each round t = 1, 2, …
        S_t ← a cohort of clients
        for each client k in S_t, in parallel: Δ_k ← k's change of the model
        x ← server step on the combination of all Δ_k

Only the server's model and its parts are touched here; evaluation and hooks belong to the strategy above.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from strategies.contract import Claim
from strategies.hooks import RoundView
from strategies.protocols import Job, Request, Session
from strategies.schedulers.tally import Meter, Tally, admitted, following
from strategies.server_models import ServerModel
from strategies.update import Update

if TYPE_CHECKING:
    from strategies.exchange import Exchange
    from strategies.pipeline import Pipeline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Synchronous:
    """One cohort at a time."""

    label = "scheduler=synchronous"

    def check(self, claim: Claim) -> Claim:
        """Rounds are what a claim begins with."""
        return claim

    def run(
        self,
        pipeline: Pipeline,
        model: ServerModel,
        exchange: Exchange,
        until: int,
        *,
        timeout: float = 3600.0,
        seed: int = 0,
    ) -> Iterator[RoundView]:
        """Rounds until the model has version `until`; each view is yielded as soon as its model exists.

        Args:
            pipeline: the parts.
            model: is changed.
            exchange: the way to the clients.
            until: the version to reach.
            timeout: seconds (of the exchange's clock) that each phase of a round may take: plain rounds have one.
            seed: the run's, for the sampler.
        """
        exchange.downlink = pipeline.downlink
        while model.version < until:
            meter, tally = Meter.begin(exchange), Tally()
            aggregate = _Round(pipeline, model, exchange, tally, timeout, seed).run()
            if aggregate is None:
                model.skip()
                log.warning("round %d is void: the model stays as it was", model.version)
            else:
                model.apply(aggregate)
                joined = dict.fromkeys(aggregate.members, model.version)
                pipeline.applied(aggregate, joined, model.version)
            yield meter.view(pipeline, model, exchange, tally, void=aggregate is None)


@dataclass
class _Round:
    """One round at work."""

    pipeline: Pipeline
    model: ServerModel
    exchange: Exchange
    tally: Tally
    timeout: float
    seed: int

    def run(self) -> Update | None:
        """The combined update of the first attempt that meets the quorum; None when none does."""
        pipeline, tally = self.pipeline, self.tally
        quorum, attempts = pipeline.admission.quorum, pipeline.attempts
        job = pipeline.job(self.model)
        for attempt in range(attempts):
            # Nodes that are all gone for a while cost time, not rounds.
            there = self.exchange.wait_for_clients(quorum, self.timeout)
            pipeline.prepare(there, job, attempt)
            cohort = pipeline.draw(there, seed=self.seed, round_number=job.round, attempt=attempt)
            asked = replace(job, config={**job.config, "attempt": attempt})
            aggregate, good = self._attempt(asked, cohort)
            concluded = pipeline.concluded(aggregate, good, job)
            if concluded is not None:
                return concluded
            tally.fell_short(pipeline, good, len(cohort))
            log.warning(
                "round %d, attempt %d of %d: %s", job.round, attempt + 1, attempts, tally.void
            )
        return None

    def _attempt(self, job: Job, cohort: list[int]) -> tuple[Update | None, int]:
        """Asks one cohort: the combined update and how many clients are in it."""
        tally = self.tally
        accumulator = self.pipeline.begin(job, len(cohort))
        before, good = tally.wrong, 0
        tally.updates, tally.void = [], ""
        for update in self._collect(self.pipeline.collector.open(job, cohort)):
            accumulator.add(update)
            tally.taken(update, self.pipeline)
            good += len(update.members)
        return accumulator.result(refused=tally.wrong - before), good

    def _collect(self, session: Session) -> Iterator[Update]:
        """Runs a session to its end: admitted and decoded updates as they come, refusals counted."""
        exchange = self.exchange
        requests = list(session.start())
        self.tally.sampled += len({request.client for request in requests})
        exchange.send(requests, ttl=self.timeout)
        deadline = exchange.now() + self.timeout
        while not session.done:
            reply = exchange.receive(deadline)
            events = following(session, reply)
            requests = [event for event in events if isinstance(event, Request)]
            if requests:
                exchange.send(requests, ttl=self.timeout)
            if requests or reply is None:
                deadline = exchange.now() + self.timeout
            for event in events:
                update = admitted(self.pipeline, event, self.tally)
                if update is not None:
                    yield update
        exchange.forget()
