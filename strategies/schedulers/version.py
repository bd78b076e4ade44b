"""One version of the model in a buffered run: who is asked, what comes, and what is made of it.

The settings, and what lasts from version to version, are `strategies.schedulers.buffer`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from strategies.admission import STALE
from strategies.contract import Visibility
from strategies.exchange import Exchange
from strategies.hooks import RoundView
from strategies.protocols import Event, Job, Picker, Refusal, Request, Void
from strategies.rounds import Rounds
from strategies.schedulers.buffer import Buffer
from strategies.schedulers.flight import Wave, sent_before
from strategies.schedulers.tally import Meter, Tally, admitted, following, measured
from strategies.server_models import ServerModel
from strategies.update import DELTA, Section, Update
from strategies.wire import ARRAYS, LOCAL_STEPS, Refused, unpack_model

log = logging.getLogger(__name__)


@dataclass
class Version:
    """One version of the model in the making."""

    plan: Buffer
    pipeline: Rounds
    model: ServerModel
    exchange: Exchange
    timeout: float
    seed: int
    tally: Tally = field(default_factory=Tally)
    rested: set[int] = field(default_factory=set)
    joined: dict[int, int] = field(default_factory=dict)
    filled: int = 0
    ages: list[int] = field(default_factory=list)

    def run(self) -> RoundView:
        """Asks, waits until the buffer is full, and applies it."""
        pipeline, model, tally = self.pipeline, self.model, self.tally
        meter = Meter.begin(self.exchange)
        aggregate = self._gathered()
        concluded = pipeline.concluded(aggregate, len(self.joined), self.job)
        if concluded is None:
            tally.fell_short(pipeline, len(self.joined), self.needed * self.plan.cohort)
            model.skip()
            log.warning("version %d is void: %s", model.version, tally.void)
        else:
            ages = self.ages
            if self.plan.mixing is not None and ages:
                concluded = self._towards(concluded, ages[0])
            damping = 1 + sum(ages) / max(1, len(ages)) if self.plan.damp else 1.0
            model.apply(concluded, 1 / damping)
            pipeline.applied(concluded, self.joined, model.version)
            self.plan.settled |= self.joined.keys()
        if pipeline.unconditional and isinstance(pipeline.sampler, Picker):
            # Whoever is refused stays away as if it were in: who is asked next must not tell what was sent.
            pipeline.sampler.took(self.rested, model.version)
        return meter.view(pipeline, model, self.exchange, tally, void=concluded is None)

    def _gathered(self) -> Update | None:
        """What the combiner makes of a buffer; None where it had too little."""
        pipeline, exchange = self.pipeline, self.exchange
        self.flight = self.plan.flight
        self.patience = self.plan.deadline or self.timeout
        self.needed = pipeline.claim.updates
        self.job = pipeline.job(self.model)
        self.there = exchange.wait_for_clients(pipeline.admission.quorum, self.timeout)
        self.working = pipeline.working(self.there, self.job.round)
        self.plan.begin(self.job.records[ARRAYS])
        busy = self.flight or self.plan.resumes  # whose updates are still to come
        pipeline.prepare([] if busy else self.there, self.job, 0)
        self.accumulator = pipeline.begin(self.job, self.needed)
        self._ask_again()
        self._fill(exchange.now() + self.timeout)
        # What is refused takes a place, and so is one of the f, under an unconditional promise only.
        wrong = self.tally.wrong if pipeline.unconditional else 0
        return self.tally.combined(self.accumulator, pipeline, wrong)

    def _fill(self, end: float) -> None:
        """Keeps clients busy until the buffer is full, nobody is left to ask, or time is up."""
        exchange, flight = self.exchange, self.flight
        while self.filled < self.needed:
            before = self.filled
            self._dispatch()
            if self.filled > before:  # by sums that were there already: others may still be asked
                continue
            if not flight:
                self.tally.void = "nobody is left to ask"
                return
            reply = exchange.receive(min(end, flight.deadline))
            if reply is not None:
                client = reply.request.client
                if client in flight:  # else a reply of a session that is over
                    wave = flight.of(client)
                    phased = getattr(wave.session, "phased", True)
                    measured(self.pipeline, reply, None if phased else exchange.now() - wave.sent)
                    self._follow(wave, following(wave.session, reply))
                continue
            for wave in flight.due(exchange.now()):
                exchange.abandon(wave.requests.values())
                self._follow(wave, following(wave.session, None), late=True)
            if exchange.now() >= end:
                self.tally.void = f"{self.filled} of {self.needed} came within {self.timeout:g} s"
                return

    # ---- asking ----

    def _dispatch(self) -> None:
        """Gives work to as many clients as are missing, in whole cohorts; stops where places were filled at once."""
        before = self.filled
        while self.filled == before and self._ask_next():
            pass

    def _ask_next(self) -> bool:
        """Asks as many clients as there is room for, or one cohort of them; whether anybody was asked."""
        size = self.plan.cohort
        free = [c for c in self.working if c not in self.flight and c not in self.rested]
        idle = self.pipeline.askable(free, self.job.round)
        room = min(self.plan.busy - len(self.flight), len(idle))
        count = room if size == 1 else size
        if room < size:
            return False
        number = self.plan.number()
        chosen = self.pipeline.pick(
            idle, count, seed=self.seed, round_number=self.job.round, number=number
        )
        if size > 1:
            return len(chosen) == size and self._open(self.job, chosen, number, 0)
        asked = [
            self._open(self.job, clients, number, steps) for steps, clients in self._paced(chosen)
        ]
        return any(asked)

    def _paced(self, chosen: Iterable[int]) -> Iterable[tuple[int, list[int]]]:
        """Clients by the number of local steps that they are given, 0 where nobody gives any."""
        pace, now = self.plan.pace, self.exchange.now()
        if pace is None:
            return [(0, list(chosen))]
        found: dict[int, list[int]] = {}
        for client in chosen:
            found.setdefault(pace.steps(client, now), []).append(client)
        return found.items()

    def _open(
        self, job: Job, clients: list[int], attempt: int, steps: int, sent: float | None = None
    ) -> bool:
        """Opens a session, and says whether it asks anybody; one that does not ends at once."""
        config = {**job.config, "attempt": attempt, **({LOCAL_STEPS: steps} if steps else {})}
        taken = frozenset(self.rested | self.plan.settled)
        session = self.pipeline.collector.open(replace(job, config=config, taken=taken), clients)
        requests = list(session.start())
        now = self.exchange.now()
        wave = Wave(job, session, set(clients), now if sent is None else sent, now + self.patience)
        wave.attempt, wave.steps = attempt, steps
        self.flight.add(wave)
        if sent is None:
            asked = {request.client for request in requests}
            self.tally.sampled += len(asked)
            self.pipeline.timings.asked(sorted(asked))
        else:
            requests = [sent_before(request, sent) for request in requests]
            wave.deadline = sent + self.patience
        if requests:
            self._send(wave, requests)
        else:  # nobody was asked, so nobody rests for it
            self.flight.free(wave, list(wave.waiting))
            self._follow(wave, following(session, None))
        return bool(requests)

    def _send(self, wave: Wave, requests: list[Request]) -> None:
        wave.requests |= {request.client: request for request in requests}
        self.exchange.send(requests, ttl=self.patience)

    def _ask_again(self) -> None:
        """What an earlier process had under way, as it was sent."""
        resumed = self.plan.taken_up()
        for one in resumed.requests:
            if one.client in self.there:
                job = resumed.job(one.version, self.job)
                sent = one.sent if self.exchange.virtual else self.exchange.now()
                self._open(job, [one.client], one.attempt, one.steps, sent)

    # ---- what comes ----

    def _follow(self, wave: Wave, events: list[Event], *, late: bool = False) -> None:
        """Takes what follows in a session: further requests, updates, refusals."""
        requests = [event for event in events if isinstance(event, Request)]
        over: set[int] = set()
        for event in events:
            if isinstance(event, Request):
                continue
            update = admitted(self.pipeline, event, self.tally, self._is_recent)
            if update is not None:
                self._take(wave, update)
            elif self.pipeline.unconditional and self._ends(event, late):
                # Its age counts, too: neither when a step comes nor how long it is must tell of a refusal.
                self._fills(wave, wave.job.version)
            if isinstance(event, Update):
                over.update(event.members)
            elif isinstance(event, Refusal):
                over.add(event.client)
        self.rested |= over
        if self.pipeline.collector.phases > 1 and not wave.session.done:
            over = (
                set()
            )  # who fell out late may be in the sum that is still to come: it is in no other before
        if requests:
            wave.deadline = self.exchange.now() + self.patience
            self._send(wave, requests)
        if wave.session.done:
            self.rested |= wave.waiting
            over |= wave.waiting
        self.flight.free(wave, over)

    def _ends(self, event: Event, late: bool) -> bool:
        """Whether an event takes a place of the buffer, where a client's data must not show in when it fills.

        A reply that is refused does, as if it had been of zeros; one that never came does not.
        """
        if self.pipeline.claim.visibility is Visibility.EACH:
            return not late and isinstance(event, Update | Refusal)
        return isinstance(event, Update | Void)

    def _is_recent(self, update: Update) -> None:
        """Refuses an update that is too old."""
        age = self.model.version - update.version
        if age > self.plan.max_staleness:
            raise Refused(STALE, f"{age} versions old, {self.plan.max_staleness} are allowed")

    def _take(self, wave: Wave, update: Update) -> None:
        age = self.model.version - update.version
        self.accumulator.add(replace(update, discount=self.plan.staleness.checked(age)))
        self.tally.taken(update, self.pipeline)
        self.tally.staleness.append(age)
        self.joined |= dict.fromkeys(update.members, update.version + 1)
        self._fills(wave, update.version)
        if self.plan.pace is not None and wave.steps:
            (client,) = update.members
            self.plan.pace.measured(client, self.exchange.now() - wave.sent, wave.steps)

    def _fills(self, wave: Wave, version: int) -> None:
        """A place of the buffer is taken, by an update of this version or by a refusal that counts as zeros."""
        self.filled += 1
        self.ages.append(self.model.version - version)
        if self.plan.mixing is not None:
            sent = unpack_model(wave.job.records[ARRAYS])
            self.start = self.model.layouts[DELTA].flatten(sent)

    def _towards(self, concluded: Update, age: int) -> Update:
        """The change that leads towards the client's model, weighed as its own change is (Xie et al., Algorithm 1)."""
        assert self.plan.mixing is not None
        layout = concluded.delta.layout
        way = self.plan.staleness.checked(age) * (self.start - self.model.parameters)
        vector = (self.plan.mixing * (concluded.delta.vector + way)).astype(np.float32)
        return concluded.with_section(DELTA, Section(vector, layout))
