"""What may be composed: a `Claim` about the updates, folded through the parts of a pipeline before anything runs.

Each part reads what the parts before it promised, refuses what it can't soundly work with, and states what holds
after it. The claim remembers who set each property, so a refusal names both parts, why they clash, and the mend.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from math import sqrt
from typing import Literal, Protocol

from strategies.update import BUFFERS, COUNTERS, DELTA


class Visibility(IntEnum):
    """What the server sees of the updates; a larger value shows more."""

    SUM = 0
    GROUP = 1
    EACH = 2


class ContractError(ValueError):
    """Two parts that may not be composed.

    Attributes:
        first: the part that made the promise, or that failed to make one.
        second: the part that can't work with it.
        why: the reason, a clause.
        instead: what to use, a clause in the imperative.
    """

    def __init__(self, first: str, second: str, why: str, instead: str) -> None:
        super().__init__(f"{second} cannot be composed with {first}: {why}; {instead}")
        self.first, self.second, self.why, self.instead = first, second, why, instead


@dataclass(frozen=True)
class Claim:
    """What is known of the updates at one place of the pipeline.

    Attributes:
        visibility: what the server sees.
        groups: how many group sums there are a round (with `Visibility.GROUP`).
        cohort: clients planned a round, None where the scheme does not fix it.
        sampling: how a cohort comes about; only `poisson` and `fixed` are the server's own draw.
        rate: the probability that a client is asked (`poisson`), or the share of all that are (`fixed`).
        participations: rounds that a client takes part in at most; None for any number.
        separation: rounds from one of a client's to its next, at least.
        weighting: what a client's influence depends on.
        summed: how what the server sees weights its members: sums, or updates that tell no weight; None where it
            knows each update's own.
        members: clients in one sum at most; None where the server sees each update.
        honest: of those in any sum that is opened, the honest ones at least, as far as the collector's numbers go.
        denominator: what a mean divides by: the weight of those who replied, or the cohort planned.
        sections: names of the vectors that an update holds.
        bounds: L2 bound of one client's contribution, by section; a section that is absent has none.
        sensitivity: L2 change of the combined vector when one client is added or removed (with `fixed` sampling:
            replaced), None where unbounded.
        adaptive: whether the bounds change with what the clients send.
        private: the mechanism that made the updates private before they were combined, None where none did.
        support: whether all clients speak of the same coordinates: all, or those of one version of the model, which
            those of one session are.
        clear: what travels unprotected beside the vectors.
        metrics: training metrics that are summed under a mask beside the vectors, and seen as sums.
        whole: whether sums are of the very integers that members give, each a whole step.
        packed: the stage behind which vectors are bytes, None where they travel as they are.
        sessions: exchanges with cohorts of their own that one aggregate is made of, `cohort` being all of their
            clients; 1 in rounds.
        staleness: versions that a client's model may be behind the one that its update is applied to; None in rounds,
            where all have the present one.
        client_half: whether clients run their half of the pipeline (a vanilla client only returns weights).
        root: whether the server has an update of its own, from root data, to hold the others against.
        watched: whether clients are left out of later rounds for what their updates were.
        measured: whether who is asked, or waited for, depends on how long clients took.
        quorum: good updates without which a round is void.
        factors: where the model is one of low-rank adapters, whether clients train `both` factors of each product, or
            share one and train the other (`shared_a`); None where parameters are no factors.
        parts: whether clients train different parts of the model, such as adapters of unequal ranks.
        replaced: whether the combined update takes the model to a point, rather than a way from where it is: only a
            server step of exactly 1 makes sense of it.
        served: where the server itself trains a part of each update: on what the client sent alone (`each`), or on
            what all of a round sent (`shared`); None where clients train all of it.
        blind: whether clients are sent no model: whoever has it computes for them on ciphertexts, and a mean over a
            mini-batch is the least that they open.
        set_by: the part that set each property.
    """

    visibility: Visibility = Visibility.EACH
    groups: int | None = None
    cohort: int | None = None
    sampling: Literal["poisson", "fixed", "uncontrolled"] = "uncontrolled"
    rate: float | None = None
    participations: int | None = None
    separation: int = 1
    weighting: Literal["uniform", "examples"] = "uniform"
    summed: Literal["uniform", "examples"] | None = None
    members: int | None = None
    honest: int | None = None
    denominator: Literal["replies", "cohort"] = "replies"
    sections: frozenset[str] = frozenset({DELTA})
    bounds: Mapping[str, float] = field(default_factory=dict)
    sensitivity: float | None = None
    adaptive: bool = False
    private: str | None = None
    support: Literal["shared", "per_version", "per_client"] = "shared"
    clear: frozenset[str] = frozenset()
    metrics: frozenset[str] = frozenset()
    whole: bool = False
    packed: str | None = None
    sessions: int = 1
    staleness: int | None = None
    client_half: bool = True
    root: bool = False
    watched: bool = False
    measured: bool = False
    quorum: int = 1
    factors: Literal["both", "shared_a"] | None = None
    parts: bool = False
    replaced: bool = False
    served: Literal["each", "shared"] | None = None
    blind: bool = False
    set_by: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = set(self.set_by) - {item.name for item in fields(self)}
        if unknown:
            raise ValueError(f"a claim has no property {sorted(unknown)}")

    def given(self, part: object, **changes: object) -> Claim:
        """The claim after `part`, which sets the properties named.

        Raises:
            ContractError: the part would show the server more than the parts before it allow.
        """
        seen = changes.get("visibility", self.visibility)
        if isinstance(seen, Visibility) and seen > self.visibility:
            raise ContractError(
                self.source("visibility"),
                name_of(part),
                f"the server sees {self.visibility.name} of the updates and no later part can widen that",
                "put the part that narrows what is seen last",
            )
        set_by = {**self.set_by, **dict.fromkeys(changes, name_of(part))}
        return replace(self, set_by=set_by, **changes)  # type: ignore[arg-type]

    def source(self, *properties: str) -> str:
        """The part that set the first of the properties that any part set; the pipeline's defaults otherwise."""
        return next(
            (self.set_by[item] for item in properties if item in self.set_by),
            "the pipeline's default",
        )

    def l2_bound(self) -> float | None:
        """Joint L2 bound of all sections of one client, None when one of them has none."""
        if not self.sections <= set(self.bounds):
            return None
        return sqrt(sum(self.bounds[name] ** 2 for name in self.sections))

    @property
    def inputs(self) -> int | None:
        """Updates that the server sees a round: one a client, or one a group; None where nothing fixes it."""
        return self.groups if self.visibility is Visibility.GROUP else self.cohort

    @property
    def updates(self) -> int:
        """Updates that come of a buffer or round as it is planned, 1 where nothing fixes it."""
        return 1 if self.visibility is Visibility.SUM else self.inputs or 1

    def need_visibility(self, part: object, least: Visibility, *, why: str, instead: str) -> None:
        """Refuses when the server sees less than `least`."""
        if self.visibility < least:
            raise ContractError(self.source("visibility"), name_of(part), why, instead)

    def need_groups(self, part: object, least: int, *, f: int, rule: str) -> None:
        """Refuses when a rule over n independent inputs (clients, or group sums) is given fewer than `least`."""
        if self.inputs is not None and self.inputs < least:
            raise ContractError(
                self.source("groups", "cohort"),
                name_of(part),
                f"{rule} with f = {f} needs at least {least} inputs a round and gets {self.inputs}",
                "ask more clients a round, or " + ("lower f" if f else "use another combiner"),
            )

    def need_sensitivity(self, part: object) -> float:
        """The sensitivity that central noise is scaled to; refuses where the combined vector has none."""
        if self.sensitivity is None:
            raise ContractError(
                self.source("sensitivity", "weighting"),
                name_of(part),
                "one client can move the combined vector by any amount, so no noise hides it",
                "clip every section (clip=fixed), plan a cohort (sampler=poisson), and use combiner=cohort_mean;"
                " strategy=dp chooses all of them",
            )
        return self.sensitivity

    def need_comparable(self, part: object) -> None:
        """Refuses what compares updates where two honest ones differ for what they speak of, or all have one part.

        Raises:
            ContractError: clients train different parts of the model, or the server one part with all of them.
        """
        if self.parts:
            raise ContractError(
                self.source("parts"),
                name_of(part),
                "clients train different parts of the model, and where one has nothing its zeros would be judged",
                "use combiner=lora_mean and quarantine=none, or give all clients one rank and one head",
            )
        if self.served == "shared":
            raise ContractError(
                self.source("served"),
                name_of(part),
                "a liar's activations have trained the upper part that every update has, before any is compared",
                "set collector.variant=v1",
            )

    def need_bounds(self, part: object) -> None:
        """Refuses where a client's update has a section of any length."""
        if self.l2_bound() is None:
            raise ContractError(
                self.source("bounds", "sections"),
                name_of(part),
                "an update without a bound is hidden by no noise",
                "clip every section (clip=fixed)",
            )

    def need_public_choice(self, part: object) -> None:
        """Refuses where what clients sent or took, unreleased, decides who takes part, as no ε accounts for."""
        if self.watched:
            raise ContractError(
                self.source("watched"),
                name_of(part),
                "who is left out of later rounds, or told to be alike, would tell of updates without any noise",
                "use quarantine=none under a central ε, and clusters=none; admission and clip= look at a client's own"
                " update only",
            )

        if self.measured:
            raise ContractError(
                self.source("measured"),
                name_of(part),
                "who takes part would tell how long others took, and so how many examples they have, without any noise",
                "use sampler=poisson or uniform, and give scheduler.deadline in seconds",
            )

    def need_root(self, part: object) -> None:
        """Refuses where the server has no update of its own."""
        if not self.root:
            raise ContractError(
                self.source("root"),
                name_of(part),
                "the server has no root data to train an update of its own on",
                "set task.root_examples=100 (in Python: Pipeline(root=...)), or use another combiner",
            )

    def need_shared_support(self, part: object) -> None:
        """Refuses where clients speak of different coordinates."""
        if self.support != "shared":
            raise ContractError(
                self.source("support"),
                name_of(part),
                "clients send different coordinates, and this part works coordinate by coordinate",
                "use a selection that all clients share (seeded random-k)",
            )

    def need_nothing_in_clear(self, part: object) -> None:
        """Refuses where anything travels unprotected beside the vector, as masks and DP require."""
        if self.clear:
            raise ContractError(
                self.source("clear"),
                name_of(part),
                f"{', '.join(sorted(self.clear))} would travel in clear beside the protected vector",
                "use collector=bare, which asks for vectors alone (or sums, with metrics inside), and uniform weights"
                if self.served is None and not self.blind
                else "set collector.metrics=false, and weigh clients alike",
            )

    def need_nothing_summed(self, part: object) -> None:
        """Refuses where sums of the clients' metrics would be seen, which no noise hides."""
        if self.metrics:
            raise ContractError(
                self.source("metrics"),
                name_of(part),
                f"the sum of the clients' {', '.join(sorted(self.metrics))} would be seen without noise",
                "set collector.metrics=[]",
            )

    def need_no_figures_asked(self, every: int) -> None:
        """Refuses to evaluate on the clients' own test parts, every so many rounds, where that can't be.

        Raises:
            ContractError: nothing may go in clear, or clients have a half of the model.
        """
        if every and self.served is not None:
            raise ContractError(
                self.source("served"),
                "evaluate.federated_every",
                "clients hold a half of the model, and can't say how the whole does on their examples",
                "set evaluate.federated_every=0, and evaluate on the server",
            )
        guarded = "visibility" if self.visibility < Visibility.EACH else "private"
        if every and (self.visibility < Visibility.EACH or self.private is not None):
            raise ContractError(
                self.source(guarded),
                "evaluate.federated_every",
                "each client's number of test examples, loss and metrics would come in clear",
                "set evaluate.federated_every=0 (in Python: federated_every=0), and evaluate on the server",
            )

    def need_no_statistics(self, part: object) -> None:
        """Refuses models with running statistics, which can't be part of a sum that nobody looks into."""
        beside = sorted(self.sections & {BUFFERS, COUNTERS})
        if beside:
            raise ContractError(
                self.source("sections"),
                name_of(part),
                f"the model has {' and '.join(beside)} (BatchNorm's running statistics), which can be in no such sum",
                "use GroupNorm instead of BatchNorm",
            )

    def need_client_half(self, part: object) -> None:
        """Refuses where clients do not run their half of the pipeline."""
        if not self.client_half:
            raise ContractError(
                self.source("client_half"),
                name_of(part),
                "a vanilla client returns weights and does not run a part's client half",
                "add `strategies.pipeline_mod` to the ClientApp, or leave the part out",
            )

    def need_model_sent(self, part: object, *, why: str, instead: str) -> None:
        """Refuses where clients are sent no model, and never see what came of a single example."""
        if self.blind:
            raise ContractError(self.source("blind"), name_of(part), why, instead)

    def need_rounds(self, part: object, *, why: str, instead: str) -> None:
        """Refuses updates that started from several versions of the model."""
        if self.staleness is not None:
            raise ContractError(self.source("staleness"), name_of(part), why, instead)

    def need_sections(self, part: object, names: Iterable[str], *, instead: str) -> None:
        """Refuses where updates lack a section that `part` reads."""
        missing = sorted(set(names) - self.sections)
        if missing:
            raise ContractError(
                self.source("sections", "client_half"),
                name_of(part),
                f"updates have no section {', '.join(missing)}",
                instead,
            )


class Checked(Protocol):
    """Anything with a contract."""

    def check(self, claim: Claim) -> Claim:
        """Folds the contract: refuses or restates `claim`; raises `ContractError`."""
        ...


def name_of(part: object) -> str:
    """How a message names a part: its `label` where it has one, else the name of its class."""
    return str(getattr(part, "label", part if isinstance(part, str) else type(part).__name__))


def check(parts: Iterable[Checked], claim: Claim | None = None) -> Claim:
    """Folds a claim through the parts, in order.

    Raises:
        ContractError: two parts may not be composed.
    """
    claim = claim if claim is not None else Claim()
    for part in parts:
        checked: object = part.check(claim)
        if not isinstance(checked, Claim):
            raise ContractError(
                name_of(part),
                name_of(part),
                f"its check() gives {type(checked).__name__}, not a claim",
                "return the claim, or claim.given(...)",
            )
        claim = checked
    return claim
