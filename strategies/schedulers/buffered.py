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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

import numpy as np
from annotated_types import Ge, Gt, Le

from strategies.admission import STALE
from strategies.contract import Claim, ContractError, Visibility, name_of
from strategies.hooks import RoundView
from strategies.protocols import Event, Job, Picker, Refusal, Request, Void
from strategies.ranges import Ranged
from strategies.schedulers.compass import Compass
from strategies.schedulers.flight import Flight, Resumed, Wave, sent_before
from strategies.schedulers.staleness import Polynomial, Staleness
from strategies.schedulers.tally import Meter, Tally, admitted, following
from strategies.server_models import ServerModel
from strategies.state import State, integer_in, mapping_in
from strategies.update import DELTA, Section, Update
from strategies.wire import ARRAYS, LOCAL_STEPS, Refused, unpack_model

if TYPE_CHECKING:
    from strategies.exchange import Exchange
    from strategies.pipeline import Pipeline

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
            ContractError: the sampler asks whole cohorts by coins, or there are too few clients for a buffer.
        """
        planned = self.size * self.cohort
        if claim.sampling == "poisson":
            raise ContractError(
                claim.source("sampling"),
                name_of(self),
                "there is no round whose coins could be thrown: clients are asked one after the other",
                "use sampler=uniform, or sampler=spaced under privacy=ftrl",
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
        pipeline: Pipeline,
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
            yield _Version(self, pipeline, model, exchange, timeout, seed).run()
        exchange.forget()

    # ---- through a restart ----

    def state_dict(self) -> State:
        """Who is at work on which model, and the pace of each client."""
        pace = {} if self.pace is None else {"pace": self.pace.state_dict()}
        return {"opened": self._opened, "flight": self.flight.state_dict(), **pace}

    def load_state_dict(self, state: State) -> None:
        """Takes up an earlier process: who was at work is asked again, for the same; sums under way are given up."""
        self._opened = integer_in(state, "opened")
        self._resumed = Resumed.of(mapping_in(state, "flight"))
        if self.pace is not None:
            self.pace.load_state_dict(mapping_in(state, "pace"))

    def number(self) -> int:
        """A new number for each time that clients are asked in a run."""
        self._opened += 1
        return self._opened

    @property
    def resumes(self) -> bool:
        """Whether an earlier process had clients at work that are still to be asked again."""
        return bool(self._resumed.requests)

    def taken_up(self) -> Resumed:
        """What an earlier process had under way; nothing when asked again."""
        resumed, self._resumed = self._resumed, Resumed()
        return resumed


@dataclass
class _Version:
    """One version of the model in the making."""

    plan: Buffered
    pipeline: Pipeline
    model: ServerModel
    exchange: Exchange
    timeout: float
    seed: int
    tally: Tally = field(default_factory=Tally)
    rested: set[int] = field(default_factory=set)
    joined: dict[int, int] = field(default_factory=dict)
    filled: int = 0

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
            ages = tally.staleness
            if self.plan.mixing is not None and ages:
                concluded = self._towards(concluded, ages[0])
            damping = 1 + sum(ages) / max(1, len(ages)) if self.plan.damp else 1.0
            model.apply(concluded, 1 / damping)
            pipeline.applied(concluded, self.joined, model.version)
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
        busy = self.flight or self.plan.resumes  # whose updates are still to come
        pipeline.prepare([] if busy else self.there, self.job, 0)
        self.accumulator = pipeline.begin(self.job, self.needed)
        self._ask_again()
        self._fill(exchange.now() + self.timeout)
        return self.accumulator.result(refused=self.tally.wrong)

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
                    self._follow(flight.of(client), following(flight.of(client).session, reply))
                continue
            for wave in flight.due(exchange.now()):
                exchange.abandon(wave.requests.values())
                self._follow(wave, following(wave.session, None), late=True)
            if exchange.now() >= end:
                self.tally.void = f"{self.filled} of {self.needed} came within {self.timeout:g} s"
                return

    # ---- asking ----

    def _dispatch(self) -> None:
        """Gives work to as many clients as are missing, in whole cohorts."""
        room = (self.plan.busy - len(self.flight)) // self.plan.cohort * self.plan.cohort
        if room < 1:
            return
        idle = [c for c in self.there if c not in self.flight and c not in self.rested]
        count = min(room, len(idle) // self.plan.cohort * self.plan.cohort)
        if count < 1:
            return
        number = self.plan.number()
        chosen = self.pipeline.pick(
            idle, count, seed=self.seed, round_number=self.job.round, number=number
        )
        size = self.plan.cohort
        if size > 1:
            whole = len(chosen) // size * size
            for begin in range(0, whole, size):
                self._open(self.job, chosen[begin : begin + size], number, 0)
            return
        for steps, clients in self._paced(chosen):
            self._open(self.job, clients, number, steps)

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
    ) -> None:
        """Opens a session; one that asks nobody ends at once."""
        config = {**job.config, "attempt": attempt, **({LOCAL_STEPS: steps} if steps else {})}
        taken = frozenset(self.rested)
        session = self.pipeline.collector.open(replace(job, config=config, taken=taken), clients)
        requests = list(session.start())
        now = self.exchange.now()
        wave = Wave(job, session, set(clients), now if sent is None else sent, now + self.patience)
        wave.attempt, wave.steps = attempt, steps
        self.flight.add(wave)
        if sent is None:
            self.tally.sampled += len({request.client for request in requests})
        else:
            requests = [sent_before(request, sent) for request in requests]
            wave.deadline = sent + self.patience
        if requests:
            self._send(wave, requests)
        else:  # nobody was asked, so nobody rests for it
            self.flight.free(wave, list(wave.waiting))
            self._follow(wave, following(session, None))

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
                self.filled += 1
            if isinstance(event, Update):
                over.update(event.members)
            elif isinstance(event, Refusal):
                over.add(event.client)
        self.rested |= over
        if requests:
            wave.deadline = self.exchange.now() + self.patience
            self._send(wave, requests)
        elif wave.session.done:
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
        self.filled += 1
        if self.plan.mixing is not None:
            sent = unpack_model(wave.job.records[ARRAYS])
            self.start = self.model.layouts[DELTA].flatten(sent)
        if self.plan.pace is not None and wave.steps:
            (client,) = update.members
            self.plan.pace.measured(client, self.exchange.now() - wave.sent, wave.steps)

    def _towards(self, concluded: Update, age: int) -> Update:
        """The change that leads towards the client's model, weighed as its own change is (Xie et al., Algorithm 1)."""
        assert self.plan.mixing is not None
        layout = concluded.delta.layout
        way = self.plan.staleness.checked(age) * (self.start - self.model.parameters)
        vector = (self.plan.mixing * (concluded.delta.vector + way)).astype(np.float32)
        return concluded.with_section(DELTA, Section(vector, layout))
