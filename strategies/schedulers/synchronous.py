"""Synchronous rounds: FedAvg's loop (McMahan et al. 2017, Algorithm 1).

    for each round t = 1, 2, …
        S_t ← a cohort of clients
        for each client k in S_t, in parallel: Δ_k ← k's change of the model
        x ← server step on the combination of all Δ_k

Only the server's model and its parts are touched here; evaluation and hooks belong to the strategy above.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from strategies.admission import FAILURES, is_wrong
from strategies.exchange import Exchange
from strategies.hooks import RoundView
from strategies.metrics import add_metrics, mean_metrics
from strategies.pipeline import Pipeline
from strategies.protocols import Event, Job, Refusal, Request, Session, Void
from strategies.server_models import ServerModel
from strategies.update import Update
from strategies.wire import Refused

log = logging.getLogger(__name__)


@dataclass
class _Tally:
    """What one round counts, over its attempts.

    Attributes:
        sampled: clients that were asked, by attempt: nobody is, where a sum is there already.
        refusals: the reason, by client.
        updates: those of the last attempt, held where clients are watched.
        void: why the last attempt gave no aggregate, or fewer sums than were planned.
    """

    sampled: int = 0
    failed: int = 0
    rejected: int = 0
    wrong: int = 0
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    refusals: dict[int, str] = field(default_factory=dict)
    updates: list[Update] = field(default_factory=list)
    void: str = ""

    def refused(self, client: int, refusal: Refused) -> None:
        self.refusals[client] = refusal.reason
        self.wrong += is_wrong(refusal)
        if refusal.reason in FAILURES:
            self.failed += 1
        else:
            self.rejected += 1

    def taken(self, update: Update) -> None:
        add_metrics(self.metrics, update.metrics, update.weight)


@dataclass(frozen=True)
class Synchronous:
    """One cohort at a time.

    Attributes:
        timeout: seconds (of the exchange's clock) that each phase of a round may take: plain rounds have one.
        seed: the run's, for the sampler.
    """

    timeout: float = 3600.0
    seed: int = 0

    def run(
        self, pipeline: Pipeline, model: ServerModel, exchange: Exchange, until: int
    ) -> Iterator[RoundView]:
        """Rounds until the model has version `until`; each view is yielded as soon as its model exists."""
        while model.version < until:
            began, up, down, tally = (
                time.perf_counter(),
                exchange.uploaded,
                exchange.downloaded,
                _Tally(),
            )
            aggregate = self._round(pipeline, model, exchange, tally)
            if aggregate is None:
                model.skip()
                log.warning("round %d is void: the model stays as it was", model.version)
            else:
                model.apply(aggregate)
                pipeline.applied(aggregate, model.version)
            taken = [] if aggregate is None else tally.updates
            flagged = pipeline.judge(model.version, taken, tally.refusals)
            yield RoundView(
                round=model.version,
                model=model,
                seconds=time.perf_counter() - began,
                clock=exchange.now(),
                upload_bytes=exchange.uploaded - up,
                download_bytes=exchange.downloaded - down,
                sampled=tally.sampled,
                failed=tally.failed,
                rejected=tally.rejected,
                void=aggregate is None,
                void_reason=tally.void if aggregate is None else "",
                flagged=flagged,
                epsilon=None if pipeline.privacy is None else pipeline.privacy.epsilon,
                train_metrics=mean_metrics(tally.metrics),
            )

    def _round(
        self, pipeline: Pipeline, model: ServerModel, exchange: Exchange, tally: _Tally
    ) -> Update | None:
        """The combined update of the first attempt that meets the quorum; None when none does."""
        admission, attempts = pipeline.admission, pipeline.attempts
        job = pipeline.job(model)
        for attempt in range(attempts):
            # Nodes that are all gone for a while cost time, not rounds.
            there = exchange.wait_for_clients(admission.quorum, self.timeout)
            pipeline.prepare(there, job, attempt)
            cohort = pipeline.draw(there, seed=self.seed, round_number=job.round, attempt=attempt)
            asked = replace(job, config={**job.config, "attempt": attempt})
            aggregate, good = self._attempt(pipeline, asked, cohort, exchange, tally)
            concluded = pipeline.concluded(aggregate, good, job)
            if concluded is not None:
                return concluded
            short = (
                f"the quorum is {admission.quorum}"
                if good < admission.quorum
                else f"the rule needs {pipeline.least_inputs(len(cohort))}"
            )
            said = f"{good} of {len(cohort)} clients sent a good update, {short}"
            # Where no sum came at all, its own reason says it; the quorum is another matter.
            if not tally.void or good:
                tally.void = "; ".join(filter(None, (said, tally.void)))
            log.warning(
                "round %d, attempt %d of %d: %s", job.round, attempt + 1, attempts, tally.void
            )
        return None

    def _attempt(
        self, pipeline: Pipeline, job: Job, cohort: list[int], exchange: Exchange, tally: _Tally
    ) -> tuple[Update | None, int]:
        """Asks one cohort: the combined update and how many clients are in it."""
        accumulator = pipeline.begin(job, len(cohort))
        before, good = tally.wrong, 0
        tally.updates, tally.void = [], ""
        session = pipeline.collector.open(job, cohort)
        for update in self._collect(pipeline, session, exchange, tally):
            accumulator.add(update)
            if pipeline.privacy is None:
                tally.taken(update)
            else:  # no figure of the updates themselves is seen
                pipeline.privacy.told(update)
            if pipeline.quarantine is not None:
                tally.updates.append(update)
            good += len(update.members)
        return accumulator.result(refused=tally.wrong - before), good

    def _collect(
        self, pipeline: Pipeline, session: Session, exchange: Exchange, tally: _Tally
    ) -> Iterator[Update]:
        """Runs a session to its end: admitted and decoded updates as they come, refusals counted."""
        requests = list(session.start())
        tally.sampled += len({request.client for request in requests})
        exchange.send(requests, ttl=self.timeout)
        deadline = exchange.now() + self.timeout
        while not session.done:
            reply = exchange.receive(deadline)
            try:
                events = list(session.expire() if reply is None else session.receive(reply))
            except Refused as refused:
                assert reply is not None
                events = [Refusal(reply.request.client, refused)]
            requests = [event for event in events if isinstance(event, Request)]
            if requests:
                exchange.send(requests, ttl=self.timeout)
            if requests or reply is None:
                deadline = exchange.now() + self.timeout
            for event in events:
                update = _admitted(pipeline, event, tally)
                if update is not None:
                    yield update
        exchange.forget()


def _admitted(pipeline: Pipeline, event: Event, tally: _Tally) -> Update | None:
    """The decoded update where the event is one that passes; refusals and void sums are counted."""
    match event:
        case Update():
            try:
                pipeline.admission.admit(event)
                return pipeline.decode(event)
            except Refused as refused:
                if len(event.members) == 1:
                    return _admitted(pipeline, Refusal(event.members[0], refused), tally)
                # A sum has no author to strike, but it is one of the inputs that a rule bears f of.
                tally.wrong += is_wrong(refused)
                return _admitted(
                    pipeline, Void(f"a sum of {len(event.members)} clients: {refused}"), tally
                )
        case Refusal(client, refused):
            pipeline.admission.record(client, refused)
            tally.refused(client, refused)
        case Void(reason):
            log.warning("no sum: %s", reason)
            tally.void = reason
    return None
