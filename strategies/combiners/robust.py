"""What robust rules have in common: they see all of a round's updates at once, and tolerate f of them being anything.

f is what the user configured: all clients of a round whose update may be wrong, by malice or by fault. Too few replies
make a round void, they never lower f. An update that came and was refused as wrong is one of the f, so that f − 1 of
those that are left may be wrong.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, ClassVar, Final

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from strategies.combiners.rows import Rows, Stack
from strategies.contract import Claim, ContractError, Visibility, name_of
from strategies.protocols import Plan
from strategies.ranges import Ranged
from strategies.update import MAXIMUM_SECTIONS, Layout, Section, Update, Vector

DEFAULT_SHARE: Final = 0.3
"""Of the inputs, how many may lie when nobody says otherwise and the rule can bear it."""


@dataclass(frozen=True)
class Side:
    """What a rule may look at beside the updates.

    Attributes:
        round: the round's number.
        planned: inputs that were planned, for rules whose denominator does not depend on who replied.
        root: the server's own update as a row, in the pieces of the others'; None where it has none.
        centre: what the last rounds came to, as a row; None in the first round and for rules without a memory.
        discounts: what the staleness of each row leaves of its influence, (n,) in [0, 1]; None where all are fresh.
        threads: that share the work of ordering columns; more than one rarely pays (docs/robustness.md).
    """

    round: int = 1
    planned: int = 1
    root: tuple[Vector, ...] | None = None
    centre: tuple[Vector, ...] | None = None
    discounts: NDArray[np.float64] | None = None
    threads: int = 1


@dataclass
class Robust(Ranged, ABC):
    """A rule over all updates of a round, each with the same say whatever its client declares.

    Attributes:
        f: how many of a round's inputs (clients, or groups where the server sees sums of groups) may send anything at
            all; None for the smaller of ⌊0.3·n⌋ and the most that the rule can bear.
    """

    f: Annotated[int, Ge(0)] | None = None

    label: ClassVar[str] = "robust rule"
    by_coordinate: ClassVar[bool] = False
    """Whether the rule compares clients coordinate by coordinate."""
    by_distance: ClassVar[bool] = False
    """Whether a rule by coordinate goes by distances of whole updates, too; all others do."""
    wants_root: ClassVar[bool] = False
    """Whether the rule holds updates against one of the server's own."""
    discounts: ClassVar[bool] = False
    """Whether the rule itself weighs what it selects by `Side.discounts`. What others make of a round is scaled as a
    whole, by the mean of the discounts: a rule's choice among values is no sum that each could be weighed in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.f is not None and not isinstance(self.f, int | np.integer):
            raise ValueError(f"f = {self.f!r}: a number of clients is a whole number")

    @abstractmethod
    def least(self, f: int) -> int:
        """Inputs below which the rule promises nothing against f liars."""

    @abstractmethod
    def combine(self, rows: Rows, f: int, side: Side) -> Vector:
        """The rule itself: `rows` of at least `least(f)` updates to one vector (d,), float32."""

    def tolerance(self, inputs: int) -> int:
        """How many of so many planned inputs may lie."""
        if self.f is not None:
            return self.f
        f = int(DEFAULT_SHARE * inputs)
        while f > 0 and self.least(f) > inputs:
            f -= 1
        return f

    def check(self, claim: Claim) -> Claim:
        """Refuses sums, updates that can't be compared, too few inputs for f, and what the rule itself can't work with.

        Leaves no sensitivity.
        """
        claim.need_visibility(
            self,
            Visibility.GROUP,
            why="it compares updates with one another, and the server sees their sum only",
            instead="use combiner=mean, or collector=masked_groups",
        )
        self._need_comparable(claim)
        self.needs(claim, self)
        if claim.inputs is not None:
            f = self.tolerance(claim.inputs)
            claim.need_groups(self, self.least(f), f=f, rule=self.label)
        elif self.f is None:
            raise ContractError(
                claim.source("cohort"),
                name_of(self),
                "f is a share of the cohort unless it is given, and nothing fixes the cohort's size",
                "set f (combiner.f=1), the number of clients a round that may lie",
            )
        stated = self.states(
            claim.given(self, weighting="uniform", denominator="replies", sensitivity=None)
        )
        if claim.staleness is not None and stated.sensitivity is not None:
            # One client's age is in the mean of the discounts, which scales all of what the rule makes (`Held.result`).
            stated = stated.given(self, sensitivity=None)
        return stated

    def _need_comparable(self, claim: Claim) -> None:
        """Refuses updates of which each speaks of another part, and distances between factors in bases of their own.

        Raises:
            ContractError: two honest updates differ for what they speak of, or how they put it.
        """
        claim.need_comparable(self)
        if claim.factors == "both" and (self.by_distance or not self.by_coordinate):
            raise ContractError(
                claim.source("factors"),
                name_of(self),
                "it compares whole updates, and many B and A have one product B·A: factors of equal models lie apart",
                "set model.share_a=true, with which distances of B are those of the adapters; or combiner=median",
            )

    def needs(self, claim: Claim, part: object) -> None:
        """What of a claim the rule needs beside enough inputs; refusals are in the name of `part`."""
        if self.by_coordinate:
            claim.need_shared_support(part)

    def states(self, claim: Claim) -> Claim:
        """What holds after the rule beyond what holds after all of them."""
        return claim

    def least_inputs(self, planned: int) -> int:
        """Replies without which a round of so many planned inputs is void."""
        return self.least(self.tolerance(planned))

    def promise(self, planned: int) -> str:
        """For a user: what the rule bears of so many planned inputs."""
        f = self.tolerance(planned)
        return f"{self.described}: {f} of {planned} may lie, {self.least(f)} must reply"

    @property
    def described(self) -> str:
        """The rule in words."""
        return self.label

    def begin(self, plan: Plan) -> Held:
        """An accumulator that keeps the round's updates, as they came, until all are there."""
        return Held(self, plan)

    def memory(self) -> Mapping[str, Vector] | None:
        """Vectors by section that the rule keeps from round to round."""
        return None


class Held:
    """A round's updates, held until the rule can see all of them. The vectors stay in their replies' own bytes."""

    def __init__(self, rule: Robust, plan: Plan) -> None:
        self._rule, self._plan = rule, plan
        self._updates: list[Update] = []

    def add(self, update: Update) -> None:
        """Takes one update; sections as in the plan's layouts."""
        self._updates.append(update)

    def result(self, refused: int = 0) -> Update | None:
        """The rule's update over all members, in the order of their logical ids; None when too few are there."""
        f = self._remaining_liars(refused)
        if f is None or not self._updates:
            return None
        # Ties must not be decided by who replied first.
        updates = sorted(self._updates, key=lambda update: update.members)
        layouts = self._plan.layouts
        names = [name for name in layouts if name not in MAXIMUM_SECTIONS]
        rows = Stack([_pieces(update, names) for update in updates])
        vector = self._rule.combine(rows, f, self._side(names, updates))
        if not self._rule.discounts and any(update.discount != 1 for update in updates):
            vector = vector * np.float32(fmean(update.discount for update in updates))
        sections = _sections(vector, names, layouts)
        for name in layouts.keys() & MAXIMUM_SECTIONS:
            counters = _largest_honest([update.sections[name].vector for update in updates], f)
            sections[name] = Section(counters, layouts[name])
        members = sorted(client for update in updates for client in update.members)
        return Update(sections, float(len(members)), tuple(members), updates[0].version)

    def _remaining_liars(self, refused: int) -> int | None:
        """How many of the updates that are there may lie; None when the rule can't bear that many."""
        f, inputs = self._rule.tolerance(self._plan.inputs), len(self._updates)
        if inputs >= self._rule.least(f):
            return f
        left = f - refused
        return left if left >= 0 and inputs >= self._rule.least(left) else None

    def _side(self, names: list[str], updates: list[Update]) -> Side:
        discounts = np.array([update.discount for update in updates])
        plan, memory = self._plan, self._rule.memory()
        root = None if plan.root is None else {n: s.vector for n, s in plan.root.sections.items()}
        return Side(
            round=plan.round,
            planned=plan.inputs,
            root=self._fitting(root, names, "the server's own update"),
            centre=self._fitting(memory, names, "the remembered aggregate"),
            discounts=None if (discounts == 1).all() else discounts,
        )

    def _fitting(
        self, vectors: Mapping[str, Vector] | None, names: list[str], what: str
    ) -> tuple[Vector, ...] | None:
        """Vectors beside the updates, in the order of their sections; raises `ValueError` where they do not fit."""
        if vectors is None:
            return None
        for name in names:
            size = self._plan.layouts[name].size
            if name not in vectors or vectors[name].shape != (size,):
                raise ValueError(f"{what} has no section {name} of {size} elements")
        return tuple(vectors[name] for name in names)


def _pieces(update: Update, names: list[str]) -> tuple[Vector, ...]:
    return tuple(update.sections[name].vector for name in names)


def _sections(
    vector: Vector, names: list[str], layouts: Mapping[str, Layout]
) -> dict[str, Section]:
    """The vector over all sections, cut into each one's own again."""
    sections, begin = {}, 0
    for name in names:
        end = begin + layouts[name].size
        sections[name] = Section(vector[begin:end], layouts[name])
        begin = end
    return sections


def _largest_honest(counters: list[Vector], f: int) -> Vector:
    """The largest increase of each counter that f liars cannot have made up: the (f + 1)-th largest."""
    matrix = np.stack(counters)
    place = len(matrix) - 1 - min(f, len(matrix) - 1)
    return np.asarray(np.partition(matrix, place, axis=0)[place] + np.float32(0), np.float32)
