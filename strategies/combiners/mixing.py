"""Wrappers that make updates more alike before any other rule sees them: nearest-neighbour mixing and bucketing.

Both replace the updates by means of them, x ← W·x with rows of W that sum to 1. The means are never written down: the
inner rule reads them block by block, and rules over distances take W·G·Wᵀ for their Gram matrix.
"""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge

from strategies.combiners.coordinates import TrimmedMean
from strategies.combiners.distances import Matrix, squared_distances
from strategies.combiners.robust import Robust, Side
from strategies.combiners.rows import Mixed, Rows
from strategies.contract import Claim
from strategies.protocols import Learner
from strategies.seeds import generator
from strategies.state import State, mapping_in
from strategies.update import Update, Vector


def neighbour_weights(distances: Matrix, f: int) -> Matrix:
    """W of nearest-neighbour mixing: row i averages the n − f updates nearest to update i, itself among them."""
    n = len(distances)
    keep = n - f
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :keep]
    weights = np.zeros((n, n))
    np.put_along_axis(weights, nearest, 1 / keep, axis=1)
    return weights


def bucket_weights(n: int, size: int, rng: np.random.Generator) -> Matrix:
    """W of bucketing: ⌈n / size⌉ means over a random partition, the last bucket smaller where n leaves a rest."""
    shuffled = rng.permutation(n)
    weights = np.zeros((ceil(n / size), n))
    for bucket, begin in enumerate(range(0, n, size)):
        members = shuffled[begin : begin + size]
        weights[bucket, members] = 1 / len(members)
    return weights


@dataclass
class Wrapper(Robust):
    """A rule on means of the updates.

    Attributes:
        rule: the inner rule, which tolerates the wrapper's f.

    Raises:
        ValueError: the inner rule is no robust one, was given another f, or divides by the cohort.
    """

    rule: Robust = field(default_factory=TrimmedMean)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rule, Robust):
            raise ValueError(
                f"rule is a {type(self.rule).__name__}: take a robust rule of strategies.combiners, as TrimmedMean"
            )
        if getattr(self.rule, "denominator", "replies") != "replies":
            raise ValueError(
                "rule.denominator = cohort: means of updates have no sensitivity, and no cohort to be divided by"
            )
        if self.f is None:
            self.f = self.rule.f
        elif self.rule.f not in (None, self.f):
            raise ValueError(
                f"f = {self.f}, but its rule has f = {self.rule.f}: give f to one of them"
            )

    @property
    def described(self) -> str:
        """Both rules in words."""
        return f"{self.label}, then {self.rule.described}"

    @property
    def wants_root(self) -> bool:  # type: ignore[override]
        """Whether the inner rule does."""
        return self.rule.wants_root

    @property
    def discounts(self) -> bool:  # type: ignore[override]
        """Whether the inner rule does."""
        return self.rule.discounts

    @abstractmethod
    def mixing(self, rows: Rows, f: int, side: Side) -> Matrix:
        """W, (m, n) float64."""

    def combine(self, rows: Rows, f: int, side: Side) -> Vector:
        """See `Robust.combine`."""
        weights = self.mixing(rows, f, side)
        if side.discounts is not None:  # a mean of updates is as stale as they are on average
            side = replace(side, discounts=weights @ side.discounts)
        return self.rule.combine(Mixed(rows, weights), f, side)

    def needs(self, claim: Claim, part: object) -> None:
        """What the inner rule needs."""
        self.rule.needs(claim, part)

    def memory(self) -> Mapping[str, Vector] | None:
        """The inner rule's."""
        return self.rule.memory()

    def learn(self, aggregate: Update) -> None:
        """For the inner rule, where it learns."""
        if isinstance(self.rule, Learner):
            self.rule.learn(aggregate)

    def state_dict(self) -> State:
        """The inner rule's state."""
        return {"rule": self.rule.state_dict() if isinstance(self.rule, Learner) else {}}

    def load_state_dict(self, state: State) -> None:
        """Gives the inner rule its state."""
        if isinstance(self.rule, Learner):
            self.rule.load_state_dict(mapping_in(state, "rule"))


@dataclass
class NearestNeighborMixing(Wrapper):
    """NNM: each update is replaced by the mean of its n − f nearest, itself included. Needs n > 2f.

    Allouah et al. 2023, "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity", Algorithm 2.
    """

    label: ClassVar[str] = "nearest-neighbour mixing"

    def least(self, f: int) -> int:
        """2f + 1, and what the inner rule needs."""
        return max(2 * f + 1, self.rule.least(f))

    def needs(self, claim: Claim, part: object) -> None:
        """What the inner rule needs, but for shared coordinates: any two of its rows have n − 2f updates in common.

        An update of few coordinates is zero elsewhere, and a rule by coordinates would trim what one client alone
        sends. Of means over n − f of them most hold what any one sends (docs/everything_on.md has the figure).
        """
        super().needs(replace(claim, support="shared"), part)

    def mixing(self, rows: Rows, f: int, side: Side) -> Matrix:
        """See `neighbour_weights`."""
        return neighbour_weights(squared_distances(rows.gram), f)


@dataclass
class Bucketing(Wrapper):
    """Means of random buckets of updates, which vary less than single ones; f of the buckets may be spoilt.

    Karimireddy, He & Jaggi 2022, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", Algorithm 1.

    Attributes:
        size: s, updates a bucket.
        seed: of the buckets, which then repeat with the run; None draws them from the operating system's entropy, so
            that no client can know whom it will be averaged with.
    """

    size: Annotated[int, Ge(1)] = 2
    seed: int | None = None

    label: ClassVar[str] = "bucketing"

    def least(self, f: int) -> int:
        """As many as make the buckets that the inner rule needs."""
        return (self.rule.least(f) - 1) * self.size + 1

    def mixing(self, rows: Rows, f: int, side: Side) -> Matrix:
        """See `bucket_weights`."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return bucket_weights(rows.n, self.size, generator(seed, "buckets", side.round))
