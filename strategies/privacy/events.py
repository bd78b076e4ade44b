"""What one release costs, as data. A mechanism says which release it will make; accountants say what many come to.

Events hold numbers and no opinion: a noise multiplier is noise over sensitivity, whoever made the noise, and a claim of
amplification is made by naming how the units were sampled. What an accountant does not know it refuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from strategies.ranges import Ranged

Relation = Literal["add_or_remove_one", "replace_one"]
"""Which two inputs are neighbours: one has a unit more than the other, or has another in the place of one."""

Sampling = Literal["none", "poisson", "fixed"]
"""How units come into a release, as far as chance is claimed: not at all, each by its own coin, or so many of all."""


@dataclass(frozen=True)
class GaussianRelease(Ranged):
    """A vector released with Gaussian noise.

    Attributes:
        noise_multiplier: the noise's standard deviation over the L2 change that one unit makes, under `relation`.
        rate: probability that a unit is in (`poisson`), or the share of all units that are (`fixed`); 1 for `none`.
        sampling: what of it may be claimed.
        relation: the neighbouring relation.
    """

    noise_multiplier: Annotated[float, Gt(0)]
    rate: Annotated[float, Ge(0), Le(1)] = 1.0
    sampling: Sampling = "none"
    relation: Relation = "add_or_remove_one"


@dataclass(frozen=True)
class LatticeRelease(Ranged):
    """A sum of integer vectors, released with the sum of integer noise that its members added.

    Attributes:
        noise: the law of each member's share, an element each: the discrete Gaussian with variance parameter σ², or a
            Skellam variable with variance σ² (the difference of two Poisson ones with mean σ²/2).
        variance: σ² of one share, in squared steps of the lattice.
        shares: how many honest shares the sum holds at least.
        l2: L2 change of the integer sum that one unit makes, after rounding, in steps.
        l1: L1 change, likewise.
        dimension: elements of the vector.
        rate: probability that a unit is in; 1 for `none`.
        sampling: what of it may be claimed.
        relation: the neighbouring relation.
    """

    noise: Literal["discrete_gaussian", "skellam"]
    variance: Annotated[float, Gt(0)]
    shares: Annotated[int, Ge(1)]
    l2: Annotated[float, Gt(0)]
    l1: Annotated[float, Gt(0)]
    dimension: Annotated[int, Ge(1)]
    rate: Annotated[float, Ge(0), Le(1)] = 1.0
    sampling: Sampling = "none"
    relation: Relation = "add_or_remove_one"


Release = GaussianRelease | LatticeRelease
"""One release."""
