"""Synchronous rounds: FedAvg's loop (McMahan et al. 2017, Algorithm 1).

    for each round t = 1, 2, …
        S_t ← a cohort of clients
        for each client k in S_t, in parallel: Δ_k ← k's change of the model
        x ← server step on the combination of all Δ_k

Three settings keep a round from waiting for its slowest (Bonawitz et al. 2019, "Towards Federated Learning at Scale:
System Design", section 2.2): more clients are asked than are taken, each phase has a deadline, or it goes on when
enough have answered. Always a late reply is never looked at, and its client keeps the state that it had: it is told
which update was last included.

Only the server's model and its parts are touched here; evaluation and hooks belong to the strategy above.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from strategies.contract import Claim, ContractError, Visibility, name_of
from strategies.exchange import Exchange
from strategies.hooks import RoundView
from strategies.protocols import Event, Job, Picker, Refusal, Request, Session
from strategies.ranges import Ranged
from strategies.rounds import Rounds
from strategies.schedulers.raced import ENOUGH, OVER_SELECTION, Raced, Shortened
from strategies.schedulers.tally import Meter, Tally, admitted, following, measured
from strategies.schedulers.waiting import Waiting
from strategies.server_models import ServerModel
from strategies.update import Update

log = logging.getLogger(__name__)

_AUTO = "scheduler.deadline=auto"


@dataclass(frozen=True)
class Synchronous(Ranged):
    """One cohort at a time.

    Attributes:
        over_selection: s: of a cohort of m clients, ⌈m·(1 + s)⌉ are asked and the first m good updates make the round.
            0 waits for all. The fast are in more rounds than the slow, and the model leans towards their data.
        deadline: seconds of the exchange's clock that each phase of a round may take: plain rounds have one, and all
            turns of split training are one. It then goes on with what is there. None for the run's own limit; `auto`
            for what the clients asked took in earlier rounds, as `patience` and `quantile` say, and no longer than each
            that has not answered may take by its own.
        patience: of an automatic deadline: times as long as that share of the clients takes.
        quantile: of the clients asked, the share that is to be back within 1/`patience` of it. As long as more of them
            than the rest have never been heard of, the run's own limit holds, and in a round's second attempt.
        enough: once this share of a session's clients has answered, a phase goes on without the others, but for those
            without whom the quorum or the rule could not be met. 1 waits for all.
        grace: how much longer is waited then, as a share of what the phase has taken so far.
    """

    over_selection: Annotated[float, Ge(0)] = 0.0
    deadline: Annotated[float, Gt(0)] | Literal["auto"] | None = None
    patience: Annotated[float, Ge(1)] = 2.0
    quantile: Annotated[float, Gt(0), Le(1)] = 0.9
    enough: Annotated[float, Gt(0), Le(1)] = 1.0
    grace: Annotated[float, Ge(0)] = 0.0

    label = "scheduler=synchronous"

    def check(self, claim: Claim) -> Claim:
        """Rounds are what a claim begins with.

        Raises:
            ContractError: more are to be asked than are taken, and the sampler's coins fix who takes part, or it asks
                all, or so few of them are enough.
        """
        if self.deadline == "auto":
            claim = claim.given(_AUTO, measured=True)
        if self.enough < 1 and self.over_selection:
            raise ContractError(
                OVER_SELECTION,
                ENOUGH,
                "both say how many of those asked make a round",
                "set scheduler.over_selection=0, or scheduler.enough=1",
            )
        if self.enough < 1:
            return Shortened.of(claim, self.enough)
        if not self.over_selection:
            return claim
        if claim.sampling == "poisson":
            raise ContractError(
                claim.source("sampling"),
                OVER_SELECTION,
                "coins decide who takes part, and what is claimed of them does not hold for whoever is fast",
                "set scheduler.over_selection=0, or use sampler=uniform",
            )
        if claim.rate == 1:
            raise ContractError(
                claim.source("rate"),
                OVER_SELECTION,
                "all clients are asked already, so there are none to ask beyond a cohort",
                "lower sampler.fraction, or set scheduler.deadline",
            )
        return Raced.of(claim)

    @property
    def cuts(self) -> bool:
        """Whether a round may be over before all have answered or the run's own limit is there."""
        return bool(self.over_selection or self.deadline or self.enough < 1)

    def extra(self, cohort: int) -> int:
        """Clients asked beyond a cohort of so many."""
        return ceil(round(cohort * self.over_selection, 9))

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
        """Rounds until the model has version `until`; each view is yielded as soon as its model exists.

        Args:
            pipeline: the parts.
            model: is changed.
            exchange: the way to the clients.
            until: the version to reach.
            timeout: seconds (of the exchange's clock) that each phase of a round may take: plain rounds have one;
                and that clients are waited for.
            seed: the run's, for the sampler.

        Raises:
            ContractError: more are to be asked than are taken, and the sampler can't say who.
        """
        exchange.downlink = pipeline.downlink
        if self.over_selection and not isinstance(pipeline.sampler, Picker):
            raise ContractError(
                name_of(pipeline.sampler),
                OVER_SELECTION,
                "it draws whole cohorts, and some more are to be asked beside one",
                "use sampler=uniform, or give the sampler methods pick and took",
            )
        while model.version < until:
            meter, tally = Meter.begin(exchange), Tally()
            aggregate = _Round(self, pipeline, model, exchange, tally, timeout, seed).run()
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

    plan: Synchronous
    pipeline: Rounds
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
            beyond = self._beyond(there, cohort, job.round, attempts + attempt)
            aggregate, good = self._attempt(asked, cohort, beyond)
            concluded = pipeline.concluded(aggregate, good, job)
            if concluded is not None:
                return concluded
            tally.fell_short(pipeline, good, len(cohort))
            log.warning(
                "round %d, attempt %d of %d: %s", job.round, attempt + 1, attempts, tally.void
            )
        return None

    def _beyond(
        self, there: list[int], cohort: list[int], round_number: int, number: int
    ) -> list[int]:
        """Who is asked beside a cohort, so that it need not be waited for; `number` is no attempt's."""
        count = self.plan.extra(len(cohort))
        if not count:
            return []
        breaker = self.pipeline.breaker
        idle = sorted(set(there) - set(cohort))
        idle = [client for client in idle if breaker is None or not breaker.rests(client)]
        return self.pipeline.pick(
            idle, count, seed=self.seed, round_number=round_number, number=number
        )

    def _attempt(self, job: Job, cohort: list[int], beyond: list[int]) -> tuple[Update | None, int]:
        """Asks one cohort and those beyond it: the combined update and how many clients are in it."""
        tally = self.tally
        accumulator = self.pipeline.begin(job, len(cohort))
        before, good = tally.wrong, 0
        tally.updates, tally.void = [], ""
        asked = sorted([*cohort, *beyond])
        again = job.config["attempt"] != 0
        self.patience, self.limits = self._patience(asked, again=again), self._limits(again=again)
        session = self.pipeline.collector.open(job, asked)
        for update in islice(self._collect(session, len(asked)), len(cohort) if beyond else None):
            accumulator.add(update)
            tally.taken(update, self.pipeline)
            good += len(update.members)
        self.exchange.forget()
        return tally.combined(accumulator, self.pipeline, tally.wrong - before), good

    def _patience(self, asked: Sequence[int], *, again: bool) -> float:
        """Seconds that each phase of a round with these clients may take."""
        plan = self.plan
        if plan.deadline != "auto":
            return plan.deadline or self.timeout
        if again:  # with fewer seconds it has fallen short
            return self.timeout
        timings = self.pipeline.timings
        known = timings.quantile(plan.quantile, asked)
        if not known:
            return self.timeout
        return min(self.timeout, max(plan.patience * known, timings.trial(asked)))

    def _limits(self, *, again: bool) -> Callable[[Sequence[int]], Iterable[float]] | None:
        """How long each client alone is worth waiting for; None where all are waited for alike."""
        if self.plan.deadline != "auto" or again:
            return None
        return self.pipeline.timings.limits

    def _share(self, asked: int) -> float:
        """Of a session's clients, those who must have answered before the others are not waited for."""
        pipeline, enough = self.pipeline, self.plan.enough
        if enough == 1 or not asked:
            return 1.0
        collected: int = getattr(pipeline.collector, "least_clients", lambda: 1)()
        least = max(pipeline.admission.quorum, collected)
        if pipeline.claim.visibility is Visibility.EACH:
            least = max(least, pipeline.least_inputs(asked))
        return min(1.0, max(enough, least / asked))

    def _collect(self, session: Session, asked: int) -> Iterator[Update]:
        """Runs a session to its end: admitted and decoded updates as they come, refusals counted."""
        exchange, tally = self.exchange, self.tally
        waiting = Waiting(session, self._share(asked), self.plan.grace, self.limits)
        began = exchange.now()
        self._ask(requests := waiting.start(began))
        tally.sampled += len(clients := {request.client for request in requests})
        self.pipeline.timings.asked(sorted(clients))
        deadline = began + self.patience
        # Where clients take turns of their own, no phase of all ends, and one that is slow must not hold the others.
        phased = getattr(session, "phased", True)
        while not session.done:
            reply = exchange.receive(min(deadline, waiting.due, waiting.hopeless))
            if reply is not None:
                measured(self.pipeline, reply, None if phased else exchange.now() - began)
                events = following(session, reply)
            elif served := waiting.over(exchange.now()):
                events = self._without(waiting, served)
            else:
                exchange.abandon(waiting.given_up())
                events = following(session, None)
                deadline = exchange.now() + self.patience
            requests = [event for event in events if isinstance(event, Request)]
            if requests:
                self._ask(requests)
                waiting.asked(requests, exchange.now())
                deadline = exchange.now() + self.patience if phased else deadline
            bad = tally.failed + tally.rejected
            for event in events:
                update = admitted(self.pipeline, event, tally)
                if update is not None:
                    yield update
            if reply is not None:
                good = reply.content is not None and tally.failed + tally.rejected == bad
                waiting.answered(reply, exchange.now(), good=good)

    def _ask(self, requests: Sequence[Request]) -> None:
        self.exchange.send(requests, ttl=self.patience)

    def _without(self, waiting: Waiting, served: Sequence[Session]) -> list[Event]:
        """What follows in sessions that have heard enough. Whoever is late has not failed: it was given no time."""
        late = waiting.given_up(served)
        self.exchange.abandon(late)
        log.info("enough clients have answered: %d are not waited for any more", len(late))
        events = [event for session in served for event in session.expire()]
        return [event for event in events if not _is_late(event)]


def _is_late(event: Event) -> bool:
    return isinstance(event, Refusal) and event.refused.reason == "timeout"
