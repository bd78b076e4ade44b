"""How a client's update becomes whole steps, and how many of them noise is: the numbers of distributed privacy.

All sections of an update stand in one long integer vector of dimension d, each at a scale of its own, so that one
release describes a round (Kairouz, Liu & Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated
Learning with Secure Aggregation", §4). With c the norm before rounding, in steps, and L after it (`rounded_l2`):

    Δ = L, or 2L where a unit is replaced;  σ = z·Δ/√shares, of one share;  scale of a section = its part of c / bound.

c is the same in every round, whatever the bounds: scales follow an adaptive clip, and the release does not change.

**Room.** Every element of a client's vector is within ±R, R = min(2²⁴ − 1, ⌊(2³¹ − 1)/members⌋): whole numbers that
float32 holds and whose sum does not wrap. c is the largest one with L + t ≤ R: t = 20σ for discrete Gaussians, whose
tails are below 2·exp(−t²/(2σ²)) since their moments are no larger than a Gaussian's (Canonne, Kamath & Steinke 2020,
"The Discrete Gaussian for Differential Privacy"), and t = 20σ + 134 for Skellam shares, by Bernstein's inequality for
steps of ±1, 2·exp(−t²/(2σ² + 2t/3)). Both are 2·exp(−200), or 2⁻²⁸⁷, an element: with 2⁸⁰ elements of all members and
rounds, less than 2⁻²⁰⁰ in all.

**The clip's bit** gets as much of c² as noise of σ_b = members/20 on the sum of bits asks for (Andrew et al. 2021,
"Differentially Private Learning with Adaptive Clipping", Theorem 1), and no more than a quarter. The others have one
scale, so that an element of each is noised alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from annotated_types import Ge, Gt, MinLen

from strategies.privacy.events import LatticeRelease, Relation, Sampling
from strategies.privacy.lattice import share_variance
from strategies.privacy.rounding import LARGEST_NORM, rounded_l1, rounded_l2
from strategies.ranges import Ranged
from strategies.update import CLIP_BIT

_RING = 2**31 - 1
_EXACT = 2**24 - 1
"""Whole numbers up to it are exact in float32."""
_TAIL = 20
"""Standard deviations within which a share lies: exp(−20²/2) = exp(−200)."""
_JUMPS = 134
"""What Bernstein's inequality adds for Skellam shares: t = 20σ + 134 gives t² ≥ 200·(2σ² + 2t/3)."""
_BIT_SHARE = 20
_MOST_BIT = 0.25
_RARE = 40 * math.log(2)
"""Of the sums of honest members, one in 2⁴⁰ is longer than what is believed of them."""
_WORST_ROUNDING = 1.25
"""Times by which rounding may lengthen a vector, and so noise: beyond it there is no use."""


@dataclass(frozen=True)
class Steps(Ranged):
    """Numbers that server and accountant agree on.

    Attributes:
        noise: the law of a share.
        noise_multiplier: z, standard deviation of the noise of `shares` shares over Δ.
        shares: honest members that every opened sum has at least.
        members: members that a sum has at most.
        dimensions: elements by section.
        relation: the neighbouring relation; `add_or_remove_one` is a member whose vector counts or is zero.

    Raises:
        ValueError: a setting is outside its range, or they leave no room in the ring.
    """

    noise: Literal["discrete_gaussian", "skellam"]
    noise_multiplier: Annotated[float, Gt(0)]
    shares: Annotated[int, Ge(1)]
    members: Annotated[int, Ge(1)]
    dimensions: Annotated[Mapping[str, int], MinLen(1)]
    relation: Relation = "add_or_remove_one"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shares > self.members:
            raise ValueError(f"{self.shares} shares of {self.members} members")
        if self.norm <= 0 or self.rounded > _WORST_ROUNDING * self.norm:
            raise ValueError(
                f"{self.members} members, {self.shares} of them sure to add noise of z = {self.noise_multiplier:g},"
                f" and {self.dimension:,} elements leave too few steps in 32 bits: fewer members in a sum, more shares,"
                f" less noise or a smaller model"
            )

    @property
    def dimension(self) -> int:
        """d, elements of all sections."""
        return sum(self.dimensions.values())

    @property
    def most(self) -> int:
        """R: the largest magnitude of an element of a client's noised vector."""
        return min(_EXACT, _RING // self.members)

    @cached_property
    def norm(self) -> float:
        """c: the L2 norm of a client's whole vector before rounding, in steps; 0 where there is no room."""
        spread = 1 + _TAIL * self._ratio / math.sqrt(self.shares)
        l2 = (self.most - (_JUMPS if self.noise == "skellam" else 0)) / spread
        low, high = 0.0, min(max(l2, 0.0), LARGEST_NORM)
        for _ in range(
            60
        ):  # rounded_l2 grows with the norm: halving finds it to float64's precision
            middle = (low + high) / 2
            low, high = (
                (middle, high) if rounded_l2(middle, self.dimension) <= l2 else (low, middle)
            )
        return low

    @property
    def rounded(self) -> float:
        """L: the L2 norm of a client's whole vector after rounding, at most, in steps."""
        return rounded_l2(self.norm, self.dimension)

    @property
    def l2(self) -> float:
        """Δ: L2 change of the sum that one unit makes, in steps."""
        return self._change * self.rounded

    @property
    def variance(self) -> float:
        """σ² of one share, in squared steps."""
        return share_variance(self.noise_multiplier, self.l2, self.shares)

    def longest(self, members: int) -> float:
        """L2 norm, in steps, that the sum of so many honest members passes once in 2⁴⁰ at most.

        All their vectors may point one way, which makes members·L. A sum of discrete Gaussians has no longer tails than
        a Gaussian of its variance s², for which P[‖x‖² > s²·(d + 2√(dt) + 2t)] ≤ exp(−t) (Hsu, Kakade & Zhang 2012, "A
        Tail Inequality for Quadratic Forms of Subgaussian Random Vectors", Theorem 2.1). Skellam shares are held to
        the same and their jumps, an element: they are thousands of steps wide, and Gaussian but for their far tails.
        """
        d = self.dimension
        spread = math.sqrt(members * self.variance * (d + 2 * math.sqrt(d * _RARE) + 2 * _RARE))
        jumps = _JUMPS * math.sqrt(d) if self.noise == "skellam" else 0.0
        return members * self.rounded + spread + jumps

    @property
    def _change(self) -> int:
        return 2 if self.relation == "replace_one" else 1

    @property
    def _ratio(self) -> float:
        """√shares·σ over L."""
        return self.noise_multiplier * self._change

    def scales(self, bounds: Mapping[str, float]) -> dict[str, float]:
        """Steps in a unit of each section, so that all together are no longer than `norm`.

        Args:
            bounds: L2 bound of one client's vector by section.

        Raises:
            ValueError: other sections are bounded than have dimensions, or a bound is not above 0.
        """
        if set(bounds) != set(self.dimensions) or not all(
            0 < bound < math.inf for bound in bounds.values()
        ):
            raise ValueError(f"bounds {dict(bounds)} for sections {sorted(self.dimensions)}")
        rest = {name: bound for name, bound in bounds.items() if name != CLIP_BIT}
        part = self._bit_part(bounds[CLIP_BIT]) if CLIP_BIT in bounds and rest else 0.0
        joint = math.hypot(*(rest or bounds).values())
        scales = dict.fromkeys(rest or bounds, math.sqrt(1 - part) * self.norm / joint)
        if CLIP_BIT not in scales and CLIP_BIT in bounds:
            scales[CLIP_BIT] = math.sqrt(part) * self.norm / bounds[CLIP_BIT]
        return scales

    def _bit_part(self, bound: float) -> float:
        """The bit's part of c²: (z·Δ/L·bound / σ_b)²."""
        return min(_MOST_BIT, (self._ratio * bound * _BIT_SHARE / self.members) ** 2)

    def release(self, rate: float = 1.0, sampling: Sampling = "none") -> LatticeRelease:
        """One round's release, for the accountant.

        Args:
            rate: probability that a unit is in, or the share of all that are.
            sampling: what of it may be claimed. Against a server, who knows the members of a sum, nothing.
        """
        return LatticeRelease(
            self.noise,
            self.variance,
            self.shares,
            self.l2,
            self._change * rounded_l1(self.rounded, self.dimension),
            self.dimension,
            rate,
            sampling,
            self.relation,
        )
