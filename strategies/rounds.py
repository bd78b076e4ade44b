"""What a round goes through: the parts that take a cohort's replies to one aggregate, as a scheduler calls them.

From who is asked and what for, to what the model, and every part that remembers, is told of the outcome. When any of it
is called is a scheduler's affair, and no scheduler is known here. Whether the parts may be composed at all, and what of
them lasts, are `strategies.pipeline`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
from flwr.app import ArrayRecord

from strategies.admission import Admission
from strategies.breaker import CircuitBreaker
from strategies.clustering import TaskClusters
from strategies.collectors import Plain
from strategies.combiners import Mean
from strategies.contract import Claim
from strategies.detection import Quarantine
from strategies.downlink import Downlink
from strategies.encoding import most_bytes, packing_of, reshaped
from strategies.privacy.budget import ParticipationSpentError
from strategies.protocols import (
    Accumulator,
    Bounding,
    Collector,
    Combiner,
    ConfigValue,
    Job,
    Learner,
    Maker,
    Parts,
    Picker,
    Plan,
    Promise,
    Sampler,
    Stage,
)
from strategies.samplers import Uniform
from strategies.server_models import SGD, ServerModel, ServerOptimizer
from strategies.timings import Timings
from strategies.update import BUFFERS, DELTA, Layout, Section, Update, Vector
from strategies.wire import ARRAYS, REPLY_BYTES, pack, pack_model, unpack_model


@dataclass
class Rounds:
    """Parts by their place, but for the scheduler; the defaults are FedAvg's.

    Attributes:
        collector: how updates come out of a cohort.
        stages: transformations in the order in which clients apply them.
        combiner: updates to one.
        privacy: differential privacy; None where none is promised.
        optimizer: the server's optimiser.
        sampler: who is asked.
        admission: the server's door.
        quarantine: who is left out of later rounds for what it sent; None where nobody is watched.
        breaker: who is left out of later rounds for sending nothing; None where nobody is.
        clusters: says which clients seem to learn one task; None where nobody looks.
        downlink: sends clients what has changed of the model since they held it; None where they are sent the whole.
        client_sections: the sections that the clients' trainer makes, beside those of the model's own kinds.
        train_config: settings that every client gets with every request.
        parts: who trains what of the parameters; None where all clients train all of them.
        factors: which factors of its products the model trains, where it is one of low-rank adapters.
        root: the server's own update for a job, trained on root data that no client has; None where it has none.
        included: for each client the last round whose update the model holds.
        kept: gives the same of each earlier model that the run may be sent back to, where clients remember anything.
        timings: how long clients take, and how often they fail.
        claim: what the contract says of the aggregate.
    """

    collector: Collector = field(default_factory=Plain)
    stages: Sequence[Stage] = ()
    combiner: Combiner = field(default_factory=Mean)
    privacy: Promise | None = None
    optimizer: ServerOptimizer = field(default_factory=SGD)
    sampler: Sampler = field(default_factory=Uniform)
    admission: Admission = field(default_factory=Admission)
    quarantine: Quarantine | None = None
    breaker: CircuitBreaker | None = None
    clusters: TaskClusters | None = None
    downlink: Downlink | None = None
    client_sections: frozenset[str] = frozenset({DELTA})
    train_config: Mapping[str, ConfigValue] = field(default_factory=dict)
    parts: Parts | None = None
    factors: Literal["both", "shared_a"] | None = None
    root: Callable[[Job], Update] | None = None
    included: dict[int, int] = field(default_factory=dict)
    kept: Callable[[], Iterable[Mapping[int, int]]] = tuple
    timings: Timings = field(default_factory=Timings, init=False)
    claim: Claim = field(default_factory=Claim, init=False)

    def begin(self, job: Job, asked: int) -> Accumulator:
        """The combiner at the start of a round. A cohort that the contract fixes counts, not who is there to ask."""
        cohort = asked if self.claim.cohort is None else self.claim.cohort
        inputs = self.claim.inputs
        wanted = self.root is not None and getattr(self.combiner, "wants_root", False)
        root = self.root(job) if self.root is not None and wanted else None
        alike = self.claim.staleness is None  # else not all updates start from what this job sends
        sent = self._sent(job) if alike and getattr(self.combiner, "wants_sent", False) else None
        planned = cohort if inputs is None else inputs
        plan = Plan(job.layouts, cohort, planned, job.round, root, sent)
        return self.combiner.begin(plan)

    @staticmethod
    def _sent(job: Job) -> Vector:
        """The parameters of a job, (d,) float32."""
        return job.layouts[DELTA].flatten(unpack_model(job.records[ARRAYS]))

    def concluded(self, aggregate: Update | None, good: int, job: Job) -> Update | None:
        """What a round's aggregate becomes before the model, or any part, sees it; None where the round is void.

        Args:
            aggregate: what the combiner made; None where it had too little to combine.
            good: clients in it.
            job: what the round asked.
        """
        promise = self.privacy
        if promise is not None and promise.unconditional:
            if aggregate is None:
                aggregate = Update(self._of_nobody(job.layouts), 0.0, (), job.version)
        elif aggregate is None or good < self.admission.quorum:
            return None
        if promise is not None:
            aggregate = promise.privatise(aggregate, job.bounds)
        if self.parts is not None:
            self.parts.observe(aggregate, self._sent(job))
        return aggregate

    def _of_nobody(self, layouts: Mapping[str, Layout]) -> dict[str, Section]:
        """What the combiner makes of a cohort of which nothing came: where it starts from, or 0."""
        start = getattr(self.combiner, "memory", lambda: None)() or {}
        return {
            name: Section(np.asarray(start.get(name, np.zeros(lay.size)), np.float32), lay)
            for name, lay in layouts.items()
        }

    def applied(self, aggregate: Update, joined: Mapping[int, int], version: int) -> None:
        """The model holds the aggregate: its members are told so, and parts remember.

        Args:
            aggregate: as the model was given it.
            joined: for each client in it the round that its update was made for.
            version: of the model that holds it.
        """
        self.included |= joined
        if isinstance(self.sampler, Picker):
            self.sampler.took(joined, version)
        for part in (self.combiner, *self.stages):
            if isinstance(part, Learner):
                part.learn(aggregate)

    @property
    def attempts(self) -> int:
        """Cohorts that a round may ask, one after the other. What is paid for once is asked once."""
        repeats = self.admission.on_shortfall == "repeat"
        if self.privacy is not None and not self.privacy.repeats:
            repeats = False
        return self.admission.max_attempts if repeats else 1

    def prepare(self, there: Sequence[int], job: Job, attempt: int) -> None:
        """Pays for a round before anybody is asked; a further attempt is the same round.

        Args:
            there: clients that may be asked.
            job: what they will be asked.
            attempt: from 0.

        Raises:
            BudgetSpentError: the round must not run.
        """
        exhausted = getattr(self.sampler, "exhausted", None)
        if exhausted is not None and exhausted(there):
            raise ParticipationSpentError(
                f"round {job.round} has nobody to ask: all {len(there)} clients took part as often as they may"
            )
        if self.privacy is not None and attempt == 0:
            self.privacy.charge(job.round)

    def draw(
        self, there: Sequence[int], *, seed: int, round_number: int, attempt: int
    ) -> list[int]:
        """A cohort out of the clients that are there (logical ids, sorted), less those in quarantine and those at rest.

        A round's second attempt asks those too: the first one failed without them.
        """
        if self.quarantine is not None and attempt == 0:
            keep = self.least_clients(len(there))
            there = self.quarantine.allowed(there, round_number, keep)
        if self.privacy is None and attempt == 0:
            there = self.working(there, round_number)
        if self.privacy is not None and self.privacy.epsilon is not None:
            # What is claimed of sampling rests on nobody's foreseeing it, and a run's seed is no secret.
            seed = int.from_bytes(os.urandom(16), "big")
        drawn = self.sampler.draw(there, seed=seed, round_number=round_number, attempt=attempt)
        # Drawn first and left out then: for all others the draw is the one that the sampler has claimed.
        if self.privacy is not None:
            drawn = self.working(drawn, round_number)
        return [client for client in drawn if client not in self._apart]

    def working(self, clients: Sequence[int], round_number: int) -> list[int]:
        """Those of the clients that do not rest since they failed, or all that there must be; see `strategies.breaker`.

        Args:
            clients: logical ids, sorted: all that may be asked; under a promise those that were drawn, or are idle.
            round_number: of the round, or of the version in the making.
        """
        if self.breaker is None:
            return list(clients)
        keep = 0
        if self.privacy is None:
            # A buffer that can't fill would be waited for as long as the run allows.
            buffered = self.claim.staleness is not None
            keep = (self.claim.cohort or 1) if buffered else self.least_clients(len(clients))
        return self.breaker.allowed(clients, round_number, keep)

    def answered(self, client: int, seconds: float) -> None:
        """A client has sent what it trained, after so many seconds."""
        self.timings.observed(client, seconds)
        if self.breaker is not None:
            self.breaker.answered(client)

    def over(self, silent: Iterable[int], *, heard: bool) -> None:
        """A version is made, or given up: clients of which nothing came have failed, but where nothing came of anybody.

        Args:
            silent: logical ids; who has answered in another attempt is none.
            heard: whether any client was. A server that is cut off must not find all circuits open when it is back.
        """
        if self.breaker is None or not heard:
            return
        for client in sorted(silent):
            if self.timings.failures(client):
                self.breaker.failed(client)

    @property
    def _apart(self) -> frozenset[int]:
        """Clients whom the collector keeps out of cohorts, for what else they do in a round."""
        apart: frozenset[int] = getattr(self.collector, "apart", frozenset())
        return apart

    @property
    def unconditional(self) -> bool:
        """Whether an aggregate is released whatever came, since that must not show."""
        return self.privacy is not None and self.privacy.unconditional

    def askable(self, clients: Sequence[int], round_number: int) -> list[int]:
        """Those of the clients whom the sampler may ask now: what it picks it counts as asked."""
        may = getattr(self.sampler, "may", None)
        return [c for c in clients if may is None or may(c, round_number)]

    def pick(
        self, idle: Sequence[int], count: int, *, seed: int, round_number: int, number: int
    ) -> list[int]:
        """Clients to be asked next, out of those that are idle (logical ids, sorted), less those in quarantine.

        Args:
            idle: who may be asked.
            count: at most so many.
            seed: the run's.
            round_number: that of the version in the making.
            number: different each time.
        """
        if self.quarantine is not None:
            idle = self.quarantine.allowed(idle, round_number, min(count, len(idle)))
        idle = [client for client in idle if client not in self._apart]
        assert isinstance(self.sampler, Picker)  # checked
        return self.sampler.pick(idle, count, seed=seed, round_number=round_number, attempt=number)

    def judge(
        self, round_number: int, updates: Sequence[Update], refused: Mapping[int, str]
    ) -> tuple[int, ...] | None:
        """Who is flagged in a round that is over, as `Quarantine.judge`; None where nobody is watched."""
        if self.clusters is not None:
            self.clusters.observe(round_number, updates)
        if self.quarantine is None:
            return None
        return self.quarantine.judge(round_number, updates, refused)

    @property
    def watches(self) -> bool:
        """Whether a round's updates are looked at when it is over."""
        return self.quarantine is not None or self.clusters is not None

    def least_clients(self, most: int) -> int:
        """How many clients must be there for the quorum and the rule to have their inputs; `most` if none suffice."""
        cohort = getattr(self.sampler, "cohort", lambda available: available)
        collected = getattr(self.collector, "least_clients", lambda: 1)()

        def enough(count: int) -> bool:
            planned = self.claim.cohort if self.claim.staleness is not None else None
            asked: int = cohort(count) if planned is None else min(count, planned)
            inputs = asked if self.claim.groups is None else self.claim.groups
            return asked >= max(self.admission.quorum, collected) and inputs >= self.least_inputs(
                asked
            )

        return next((count for count in range(1, most) if enough(count)), most)

    def least_inputs(self, asked: int) -> int:
        """Updates without which the rule makes no aggregate of a round that asked so many clients."""
        least = getattr(self.combiner, "least_inputs", None)
        inputs = asked if self.claim.inputs is None else self.claim.inputs
        return 1 if least is None else int(least(inputs))

    def released(self, model: ServerModel) -> ArrayRecord:
        """The model as clients are sent it."""
        if self.downlink is not None:
            return self.downlink.release(model.view())
        return pack_model(model.view())

    def job(self, model: ServerModel) -> Job:
        """What the next round asks of each client."""
        records = {ARRAYS: self.released(model)}
        for name, vector in model.broadcast().items():
            records[name] = ArrayRecord({name: pack(vector)})
        config: dict[str, ConfigValue] = dict(self.train_config)
        layouts, bounds = dict(model.layouts), dict(self.claim.bounds)
        for stage in self.stages:
            layouts |= stage.layouts if isinstance(stage, Maker) else {}
            bounds |= stage.bounds() if isinstance(stage, Bounding) else {}
        config["sections"] = sorted(layouts)
        config["buffers"] = [name for name, kind in model.kinds.items() if kind == BUFFERS]
        for stage in self.stages:
            config |= {f"{stage.name}.{key}": value for key, value in stage.configure().items()}
        wire, packing = reshaped(layouts, self.stages), packing_of(self.stages)
        if packing is not None or wire != layouts or self.downlink is not None:
            config[REPLY_BYTES] = sum(most_bytes(name, wire[name], packing) for name in wire)
        round_number = model.version + 1
        return Job(
            round_number,
            model.version,
            records,
            config,
            self.included,
            layouts,
            model.kinds,
            bounds,
            self.admission.quorum,
            *self._carriers(),
            wire,
            packing,
            part=None if self.parts is None else partial(self._part, layouts[DELTA]),
            kept=tuple(self.kept()),
        )

    def _part(self, whole: Layout, client: int) -> Layout:
        assert self.parts is not None
        return self.parts.part(client, whole)

    def _carriers(self) -> tuple[int, int]:
        """Honest members that a sum needs for its noise, and members that this is made for; 0 where it has none."""
        return (self.claim.honest or 0, self.claim.members or 0) if self.claim.whole else (0, 0)

    def decode(self, update: Update) -> Update:
        """The server halves, in reverse, as far as there is something to see: noise covers what earlier stages did."""
        for stage in reversed(self.stages):
            update = stage.decode(update)
            if getattr(stage, "covers", False):
                break
        return update
