"""Synchronous rounds: FedAvg's loop (McMahan et al. 2017, Algorithm 1).

    for each round t = 1, 2, …
        S_t ← a cohort of clients
        for each client k in S_t, in parallel: Δ_k ← k's change of the model
        x ← server step on the combination of all Δ_k

Two settings keep a round from waiting for its slowest (Bonawitz et al. 2019, "Towards Federated Learning at Scale:
System Design", section 2.2): more clients are asked than are taken, or the round has a deadline. Either way a late
reply is never looked at, and its client keeps the state that it had: it is told which update was last included.

Only the server's model and its parts are touched here; evaluation and hooks belong to the strategy above.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt

from strategies.contract import Claim, ContractError, Visibility, name_of
from strategies.hooks import RoundView
from strategies.protocols import Job, Picker, Request, Session
from strategies.ranges import Ranged
from strategies.schedulers.tally import Meter, Tally, admitted, following, measured
from strategies.server_models import ServerModel
from strategies.update import Update

if TYPE_CHECKING:
    from strategies.exchange import Exchange
    from strategies.pipeline import Pipeline

log = logging.getLogger(__name__)

_OVER_SELECTION = "scheduler.over_selection"


@dataclass(frozen=True)
class Synchronous(Ranged):
    """One cohort at a time.

    Attributes:
        over_selection: s: of a cohort of m clients, ⌈m·(1 + s)⌉ are asked and the first m good updates make the round.
            0 waits for all. The fast are in more rounds than the slow, and the model leans towards their data.
        deadline: seconds of the exchange's clock that each phase of a round may take: plain rounds have one, and all
            turns of split training are one. It then goes on with what is there. None for the run's own limit.
    """

    over_selection: Annotated[float, Ge(0)] = 0.0
    deadline: Annotated[float, Gt(0)] | None = None

    label = "scheduler=synchronous"

    def check(self, claim: Claim) -> Claim:
        """Rounds are what a claim begins with.

        Raises:
            ContractError: more are to be asked than are taken, and the sampler's coins fix who takes part, or it asks
                all.
        """
        if not self.over_selection:
            return claim
        if claim.sampling == "poisson":
            raise ContractError(
                claim.source("sampling"),
                _OVER_SELECTION,
                "coins decide who takes part, and what is claimed of them does not hold for whoever is fast",
                "set scheduler.over_selection=0, or use sampler=uniform",
            )
        if claim.rate == 1:
            raise ContractError(
                claim.source("rate"),
                _OVER_SELECTION,
                "all clients are asked already, so there are none to ask beyond a cohort",
                "lower sampler.fraction, or set scheduler.deadline",
            )
        drawn = claim.given(_OVER_SELECTION, sampling="uncontrolled", rate=None)
        return _Raced(**{item.name: getattr(drawn, item.name) for item in fields(drawn)})

    def extra(self, cohort: int) -> int:
        """Clients asked beyond a cohort of so many."""
        return ceil(round(cohort * self.over_selection, 9))

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
                _OVER_SELECTION,
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


class _Raced(Claim):
    """A claim of updates that are in a round because they came first: nothing that fixes who is in may follow."""

    def given(self, part: object, **changes: object) -> Claim:
        """As every claim's.

        Raises:
            ContractError: sums of whole cohorts, or privacy, are to be made of the fastest.
        """
        if changes.get("visibility", Visibility.EACH) != Visibility.EACH:
            raise ContractError(
                _OVER_SELECTION,
                name_of(part),
                "a sum is of all clients that were asked, and can't be cut to those that came first",
                "set scheduler.over_selection=0; a sum bears drop-outs, and scheduler.deadline ends each of its phases",
            )
        if changes.get("private") is not None:
            raise ContractError(
                _OVER_SELECTION,
                name_of(part),
                "who is in a round would depend on who is fast, of which nothing can be claimed, and those left out"
                " would have spent their budget on nothing",
                "set scheduler.over_selection=0, or use privacy=none",
            )
        return super().given(part, **changes)


@dataclass
class _Round:
    """One round at work."""

    plan: Synchronous
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
        self.patience = self.plan.deadline or self.timeout
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
        idle = sorted(set(there) - set(cohort))
        return self.pipeline.pick(
            idle, count, seed=self.seed, round_number=round_number, number=number
        )

    def _attempt(self, job: Job, cohort: list[int], beyond: list[int]) -> tuple[Update | None, int]:
        """Asks one cohort and those beyond it: the combined update and how many clients are in it."""
        tally = self.tally
        accumulator = self.pipeline.begin(job, len(cohort))
        before, good = tally.wrong, 0
        tally.updates, tally.void = [], ""
        session = self.pipeline.collector.open(job, sorted([*cohort, *beyond]))
        for update in islice(self._collect(session), len(cohort) if beyond else None):
            accumulator.add(update)
            tally.taken(update, self.pipeline)
            good += len(update.members)
        self.exchange.forget()
        return tally.combined(accumulator, self.pipeline, tally.wrong - before), good

    def _collect(self, session: Session) -> Iterator[Update]:
        """Runs a session to its end: admitted and decoded updates as they come, refusals counted."""
        exchange = self.exchange
        requests, began = list(session.start()), exchange.now()
        asked = {request.client for request in requests}
        self.tally.sampled += len(asked)
        self.pipeline.timings.asked(sorted(asked))
        exchange.send(requests, ttl=self.patience)
        deadline = began + self.patience
        # Where clients take turns of their own, no phase of all ends, and one that is slow must not hold the others.
        phased = getattr(session, "phased", True)
        while not session.done:
            reply = exchange.receive(deadline)
            if reply is not None:
                since = None if phased else exchange.now() - began
                measured(self.pipeline, reply, since)
            events = following(session, reply)
            requests = [event for event in events if isinstance(event, Request)]
            if requests:
                exchange.send(requests, ttl=self.patience)
            if reply is None or (requests and phased):
                deadline = exchange.now() + self.patience
            for event in events:
                update = admitted(self.pipeline, event, self.tally)
                if update is not None:
                    yield update
