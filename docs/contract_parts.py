"""The parts that the tables "what composes with what" choose from, and what the contract says of each choice.

A new part is one more entry in CLIENTS, STAGES, COMBINERS or SERVERS; of privacy, in PROMISES, COLLECTORS or RULES; of
compression, in COMPRESSIONS; of adapters, in ADAPTED or BESIDE. Must not know how a table is laid out or where it
stands: that is `contract_table.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np

from strategies.collectors import Ckks, Masked, Plain
from strategies.combiners import (
    Bucketing,
    Bulyan,
    CenteredClipping,
    FLTrust,
    GeometricMedian,
    Krum,
    LoraFedEx,
    LoraMean,
    LoraPartitioned,
    LoraStack,
    LoraSvd,
    LoraZeroPad,
    MajorityVote,
    Mean,
    Median,
    MultiKrum,
    NearestNeighborMixing,
    NormBounding,
    TrimmedMean,
)
from strategies.contract import Checked, Claim, ContractError, check
from strategies.pipeline import Pipeline
from strategies.privacy import Central, Distributed, Ftrl, Local, OwnAccounts
from strategies.protocols import Collector, Combiner, Job, Promise, Sampler, Stage
from strategies.samplers import Poisson, Spaced, Uniform
from strategies.schedulers import Buffered
from strategies.server_models import SGD, Adagrad, Adam, Scaffold, ServerOptimizer, Yogi
from strategies.stages import AdaptiveClip, Clip, PowerSgd, Quantize, RandomK, Sign, TopK
from strategies.update import CONTROL, DELTA, Section, Update

COHORT = 9
"""Clients planned a round: three for each of three groups."""

NOISE = 0.1
"""Noise over the clip's bound, small enough that a test sees what it is added to."""

SIZE = 2
"""Parameters of the model that a test trains."""


@dataclass(frozen=True)
class Clients:
    """A kind of client: how its updates are collected, and which sections it sends."""

    collector: Collector
    sections: frozenset[str]


CLIENTS: dict[str, Clients] = {
    "vanilla Flower clients": Clients(Plain(vanilla=True), frozenset({DELTA})),
    "`client=sgd`, `proximal`": Clients(Plain(), frozenset({DELTA})),
    "`client=scaffold`": Clients(Plain(), frozenset({DELTA, CONTROL})),
    "`collector=masked`": Clients(Masked(max_weight=1000), frozenset({DELTA})),
    "`collector=ckks`": Clients(Ckks(max_weight=1000), frozenset({DELTA})),
    "`collector=masked_groups`": Clients(Masked(groups=3), frozenset({DELTA})),
}
STAGES: dict[str, tuple[Stage, ...]] = {"": (), "with `clip`": (Clip(),)}
COMBINERS: dict[str, Combiner] = {
    "mean, by examples": Mean(weighting="examples"),
    "mean, uniform": Mean(weighting="uniform"),
    "`krum`": Krum(f=0),
    "`multi_krum`": MultiKrum(f=0),
    "`bulyan`": Bulyan(f=0),
    "`median`": Median(f=0),
    "`trimmed_mean`": TrimmedMean(f=0),
    "`geometric_median`": GeometricMedian(f=0),
    "`centered_clipping`": CenteredClipping(f=0),
    "`norm_bounding`": NormBounding(f=0),
    "`majority_vote`": MajorityVote(f=0),
    "`fltrust`": FLTrust(f=0),
    "`nnm`": NearestNeighborMixing(f=0),
    "`bucketing`": Bucketing(f=0),
    "`lora_mean`": LoraMean(),
    "`lora_zero_pad`": LoraZeroPad(),
    "`lora_svd`": LoraSvd(),
    "`lora_partitioned`": LoraPartitioned(),
    "`lora_stack`": LoraStack(),
    "`lora_fedex`": LoraFedEx(),
}
SERVERS: dict[str, type[ServerOptimizer]] = {
    "`sgd`": SGD,
    "`adagrad`": Adagrad,
    "`adam`": Adam,
    "`yogi`": Yogi,
    "`scaffold`": Scaffold,
}


@dataclass(frozen=True)
class Private:
    """A promise of privacy, with the sampler and the clip that go with it."""

    promise: Callable[[], Promise | None]
    sampler: Callable[[], Sampler]
    clip: Callable[[], Stage] = Clip


def _everyone() -> Sampler:
    return Poisson(fraction=1.0, population=COHORT)


def _apart() -> Sampler:
    return Spaced(participations=3, separation=2, fraction=0.5, population=2 * COHORT)


def _settings() -> dict[str, float | int]:
    return {"noise_multiplier": NOISE, "population": COHORT, "rounds": 2}


PROMISES: dict[str, Private] = {
    "`none`": Private(lambda: None, lambda: Uniform(population=COHORT)),
    "`central`": Private(lambda: Central(**_settings()), _everyone),
    "`central` with `clip=adaptive`": Private(
        lambda: Central(**_settings()), _everyone, AdaptiveClip
    ),
    "`ftrl`": Private(lambda: Ftrl(**_settings()), _apart),
    "`local`": Private(lambda: Local(**_settings()), lambda: Uniform(population=COHORT)),
    "`distributed`": Private(lambda: Distributed(size=SIZE, **_settings()), _everyone),
    "`distributed` with `clip=adaptive`": Private(
        lambda: Distributed(size=SIZE, **_settings()), _everyone, AdaptiveClip
    ),
    "`none` with `client=dp_sgd`": Private(
        lambda: OwnAccounts(1e-5, "pld", budget=8.0), lambda: Uniform(population=COHORT)
    ),
}
COLLECTORS: dict[str, Callable[[], Collector]] = {
    "`collector=plain`": Plain,
    "`collector=bare`": lambda: Plain(metrics=False),
    "`collector=masked`": lambda: Masked(metrics=()),
    "`collector=masked_whole`": lambda: Masked(whole=True, metrics=()),
    "`collector=masked_whole` in groups": lambda: Masked(whole=True, metrics=(), groups=3),
    "`collector=ckks`": lambda: Ckks(max_weight=None, metrics=()),
}
RULES: dict[str, Combiner] = {
    "`mean`": Mean(weighting="examples"),
    "`uniform_mean`": Mean(weighting="uniform"),
    "`cohort_mean`": Mean(weighting="uniform", denominator="cohort"),
    "a robust rule": Median(f=0),
}
COMPRESSIONS: dict[str, Callable[[], tuple[Sequence[Stage], Sequence[Stage]]]] = {
    "`none`": lambda: ((), ()),
    "`top_k`": lambda: TopK(ratio=0.5).stages(),
    "`random_k`": lambda: RandomK(ratio=1.0).stages(),
    "`quantize`": lambda: Quantize().stages(),
    "`power_sgd`": lambda: PowerSgd().stages(),
    "`sign`": lambda: Sign().stages(),
}
COMPRESSED: dict[str, tuple[Callable[[], Promise | None], Combiner]] = {
    "a mean": (lambda: None, Mean(weighting="uniform")),
    "a robust rule": (lambda: None, Krum(f=0)),
    "one by coordinate": (lambda: None, Median(f=0)),
    "`privacy=central`": (
        lambda: Central(**_settings()),
        Mean(weighting="uniform", denominator="cohort"),
    ),
    "`privacy=local`": (lambda: Local(**_settings()), Mean(weighting="uniform")),
    "`privacy=distributed`": (
        lambda: Distributed(size=SIZE, **_settings()),
        Mean(weighting="uniform"),
    ),
}
"""What is done with compressed updates: a promise of privacy, where there is one, and a rule."""


ADAPTERS: dict[str, Claim] = {
    "both factors": Claim(factors="both"),
    "both, unequal": Claim(factors="both", parts=True),
    "`share_a`": Claim(factors="shared_a"),
    "`share_a`, unequal": Claim(factors="shared_a", parts=True),
}
"""Models of adapters: which factors are trained, and whether all clients train the same ranks and heads."""
ADAPTED: dict[str, Combiner] = {
    "`mean`": Mean(),
    "`lora_mean`": LoraMean(),
    "`lora_mean` by task": LoraMean(by_head=True),
    "`lora_mean` over the cohort": LoraMean(weighting="uniform", denominator="cohort"),
    "`lora_zero_pad`": LoraZeroPad(),
    "`lora_svd`": LoraSvd(),
    "`lora_partitioned`": LoraPartitioned(),
    "`lora_stack`": LoraStack(),
    "`lora_fedex`": LoraFedEx(),
    "`krum`": Krum(f=0),
    "`median`": Median(f=0),
}
BESIDE: dict[str, Callable[[], tuple[Promise | None, ServerOptimizer]]] = {
    "`server=sgd`": lambda: (None, SGD()),
    "`server=adam`": lambda: (None, Adam()),
    "`server.momentum=0.9`": lambda: (None, SGD(momentum=0.9)),
    "`scheduler=buffered`": lambda: (None, SGD()),
    "`privacy=central`": lambda: (Central(**_settings()), SGD()),
}
"""What is done with what comes of adapters."""
WAYS: tuple[Literal["seen", "masked"], ...] = ("seen", "masked")
"""Whether the server sees each update, or their sum."""


def root_update(job: Job) -> Update:
    """The server's own update, where a rule asks for one: 1 everywhere."""
    sections = {
        name: Section(np.ones(layout.size, np.float32), layout)
        for name, layout in job.layouts.items()
    }
    return Update(sections, 1.0, (), job.version)


@dataclass(frozen=True)
class Combination:
    """One choice of each part, by name."""

    client: str
    stage: str
    combiner: str
    server: str

    def pipeline(self) -> Pipeline:
        """The pipeline of these parts, not yet checked."""
        clients = CLIENTS[self.client]
        return Pipeline(
            collector=clients.collector,
            stages=STAGES[self.stage],
            combiner=copy(COMBINERS[self.combiner]),  # some remember their rounds
            optimizer=SERVERS[self.server](),
            client_sections=clients.sections,
            root=root_update,
        )

    def answer(self) -> Claim | ContractError:
        """What the contract says of it."""
        try:
            return self.pipeline().check()
        except ContractError as error:
            return error


@dataclass(frozen=True)
class PrivateCombination:
    """One choice of each part that privacy has to do with, by name."""

    privacy: str
    collector: str
    rule: str

    def pipeline(self) -> Pipeline:
        """The pipeline of these parts, each made anew, not yet checked."""
        parts, clip = PROMISES[self.privacy], PROMISES[self.privacy].clip()
        promise = parts.promise()
        noise = () if promise is None else promise.stages(getattr(clip, "bounds", dict))
        return Pipeline(
            collector=COLLECTORS[self.collector](),
            stages=[clip, *noise],
            combiner=copy(RULES[self.rule]),
            privacy=promise,
            sampler=parts.sampler(),
        )

    def answer(self) -> Claim | ContractError:
        """What the contract says of it."""
        try:
            return self.pipeline().check()
        except ContractError as error:
            return error


@dataclass(frozen=True)
class CompressedCombination:
    """One choice of each part that compression has to do with, by name."""

    compression: str
    use: str
    collector: str

    def pipeline(self) -> Pipeline:
        """The pipeline of these parts, each made anew, not yet checked."""
        (before, behind), clip = COMPRESSIONS[self.compression](), Clip()
        make, combiner = COMPRESSED[self.use]
        promise = make()
        noise = () if promise is None else promise.stages(clip.bounds)
        return Pipeline(
            collector=COLLECTORS[self.collector](),
            stages=[*before, clip, *noise, *behind],
            combiner=copy(combiner),
            privacy=promise,
            sampler=_everyone(),
        )

    def answer(self) -> Claim | ContractError:
        """What the contract says of it."""
        try:
            return self.pipeline().check()
        except ContractError as error:
            return error


@dataclass(frozen=True)
class AdaptedCombination:
    """One choice of each part that adapters have to do with, by name."""

    adapters: str
    way: Literal["seen", "masked"]
    beside: str
    combiner: str

    def parts(self) -> Sequence[Checked]:
        """The parts in the order of a pipeline, each made anew."""
        promise, optimizer = BESIDE[self.beside]()
        combiner = ADAPTED[self.combiner]
        examples = getattr(combiner, "weighting", "uniform") == "examples"
        sampler: Sampler = Uniform(population=COHORT) if promise is None else _everyone()
        cohort = 3 if self.way == "masked" else 1
        buffered = self.beside == "`scheduler=buffered`"
        scheduler = (Buffered(buffer=COHORT // cohort, cohort=cohort),) if buffered else ()
        collector: Collector = (
            Masked(max_weight=1000 if examples else None, metrics=() if promise else ("loss",))
            if self.way == "masked"
            else Plain(metrics=promise is None)
        )
        promised = () if promise is None else (promise,)
        return (sampler, *scheduler, collector, Clip(), combiner, *promised, optimizer)

    def answer(self) -> Claim | ContractError:
        """What the contract says of it."""
        begun = replace(
            ADAPTERS[self.adapters],
            set_by={"factors": "the model's adapters", "parts": "the clients' ranks and heads"},
        )
        try:
            return check(self.parts(), begun)
        except ContractError as error:
            return error


def combinations() -> Iterator[Combination]:
    """Every choice of one of each."""
    for names in product(CLIENTS, STAGES, COMBINERS, SERVERS):
        yield Combination(*names)


def private_combinations() -> Iterator[PrivateCombination]:
    """Likewise, of the parts that privacy has to do with."""
    for names in product(PROMISES, COLLECTORS, RULES):
        yield PrivateCombination(*names)


def compressed_combinations() -> Iterator[CompressedCombination]:
    """Likewise, of the parts that compression has to do with."""
    for names in product(COMPRESSIONS, COMPRESSED, COLLECTORS):
        yield CompressedCombination(*names)


def adapted_combinations() -> Iterator[AdaptedCombination]:
    """Likewise, of the parts that adapters have to do with."""
    for adapters, way, beside, combiner in product(ADAPTERS, WAYS, BESIDE, ADAPTED):
        yield AdaptedCombination(adapters, way, beside, combiner)
