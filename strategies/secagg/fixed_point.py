"""Real numbers as integers modulo 2³², so that sums of several members' never wrap.

A member's x, within ±limit, is sent as round(x·scale), at most `top` = scale·limit in size, an integer. With n members
and |Σ noise| ≤ headroom, a sum lies within ±(n·top + headroom·scale), and `top` is the largest integer that keeps this
within ±(2³¹ − 1):

    top = ⌊(2³¹ − 1) / (n + headroom / limit)⌋,     step = 1 / scale = limit / top ≈ limit·n / 2³¹.

**The error of a weighted mean** Σ wᵢxᵢ / Σ wᵢ. Member i encodes fᵢ·xᵢ, fᵢ = wᵢ / w_max, each rounded by at most half a
step; weights go as whole numbers of examples and are summed exactly (`masking.codings`). So for k members the numerator
is off by e, at most k·step/2, and the denominator D = Σ fᵢ = k·mean(w) / w_max is right:

    |e| / D ≤ (step / 2)·(w_max / mean(w)) ≈ (n / 2³²)·limit·(w_max / mean(w)),

whatever k. Its rms is smaller: errors of rounding to the nearest step are uniform and independent, of variance
step²/12, so that the mean is off by √(k/12)·step / D. Stochastic rounding errs by up to a whole step, with a variance
that is step²/6 on average, but is unbiased: over members and elements its errors average out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt
from cryptography.hazmat.primitives.ciphers import CipherContext
from numpy.typing import NDArray

from strategies.ranges import Ranged
from strategies.secagg.masks import BLOCK, ZEROS, keystream

LARGEST = 2**31 - 1
"""The largest integer of the ring, as a signed one."""

_FLOAT64 = 2**-18
"""More than float64 itself adds to an error, in steps: products below 2³¹ are off by 2⁻²², a mean by a few of these."""

Rounding = Literal["nearest", "stochastic"]


@dataclass(frozen=True)
class FixedPoint(Ranged):
    """The ring's view of values within ±limit.

    Attributes:
        limit: values beyond are saturated.
        members: how many encoded vectors a sum may hold.
        headroom: what noise may add to a sum in size, in the values' units; room for its tails.

    Raises:
        ValueError: a setting outside its range, or no room for a single step.
    """

    limit: Annotated[float, Gt(0)]
    members: Annotated[int, Ge(1)]
    headroom: Annotated[float, Ge(0)] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1 or math.isinf(self.scale):
            raise ValueError(
                f"{self.members} members within ±{self.limit} and noise within ±{self.headroom} leave no step in 32"
                f" bits: fewer members, a larger limit or less noise"
            )

    @property
    def top(self) -> int:
        """The largest encoded value."""
        room = self.members + Fraction(self.headroom) / Fraction(self.limit)  # exact
        return int(LARGEST / room)

    @property
    def scale(self) -> float:
        """Steps in a unit."""
        return self.top / self.limit

    @property
    def step(self) -> float:
        """The distance of neighbouring values, in the values' units."""
        return self.limit / self.top

    def error(self, spread: float = 1.0, *, rounding: Rounding = "nearest") -> float:
        """The worst error of an element of the weighted mean, as derived above; saturation and noise are not in it.

        Args:
            spread: w_max / mean(w), at least 1.
            rounding: how members round.
        """
        return (_FLOAT64 + (0.5 if rounding == "nearest" else 1.0)) * self.step * spread

    def noise(self, *, rounding: Rounding = "nearest") -> float:
        """The rms error of one element of one member's vector."""
        return self.step / math.sqrt(12 if rounding == "nearest" else 6)

    def encode(
        self,
        vector: NDArray[np.float32],
        out: NDArray[np.uint32],
        *,
        factor: float = 1.0,
        rounding: Rounding = "nearest",
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> int:
        """Writes factor·x for each x of a (d,) vector to the (d,) `out`, modulo 2³².

        Args:
            vector: saturated at ±limit on the way; stays as it is.
            out: written in full, unless an error is raised.
            factor: 0 to 1: the member's weight over the largest weight.
            rounding: to the nearest step; or up with the probability of the part above the step below, so that the
                mean is x to 2⁻³² of a step, from the keystream of a fresh key.
            entropy: gives that many uniform bytes: the key.

        Returns:
            How many elements were saturated.

        Raises:
            ValueError: the vector holds NaN or an infinity, `factor` is outside 0 … 1, or shapes differ.
        """
        if not 0 <= factor <= 1:
            raise ValueError(f"factor = {factor!r}: must be from 0 to 1, or sums could wrap")
        if vector.shape != out.shape:
            raise ValueError(f"a vector of shape {vector.shape} into one of {out.shape}")
        up = _Up(keystream(entropy(32))) if rounding == "stochastic" else None
        scale, top, saturated = factor * self.scale, self.top, 0
        scaled = np.empty(min(BLOCK, len(vector)))
        for begin in range(0, len(vector), BLOCK):
            block = vector[begin : begin + BLOCK]
            values = scaled[: len(block)]
            saturated += self._saturate(block, values, begin)
            values *= scale
            if up is None:
                np.rint(values, out=values)
            else:
                up.round(values)
            # `scale` is itself rounded: at the very edge a product may come out one step too large.
            np.clip(values, -top, top, out=values)
            np.copyto(out[begin : begin + BLOCK].view(np.int32), values, casting="unsafe")
        return saturated

    def _saturate(self, block: NDArray[np.float32], values: NDArray[np.float64], begin: int) -> int:
        """Copies the block into `values`, saturated; gives how many were."""
        lowest, highest = float(block.min()), float(block.max())  # NaN where there is one
        np.copyto(values, block)
        if -self.limit <= lowest and highest <= self.limit:
            return 0
        if not np.isfinite(block).all():
            place = int(np.flatnonzero(~np.isfinite(block))[0])
            raise ValueError(
                f"element {begin + place} is {block[place]}: only finite values travel"
            )
        beyond = int(np.count_nonzero(np.abs(values) > self.limit))
        np.clip(values, -self.limit, self.limit, out=values)
        return beyond

    def decode(self, total: NDArray[np.uint32]) -> NDArray[np.float64]:
        """A sum of encoded vectors, modulo 2³², in the values' units: a new (d,) vector."""
        return np.multiply(total.view(np.int32), self.step, dtype=np.float64)


class _Up:
    """Stochastic rounding in place: x becomes ⌊x⌋ + 1 where u·2⁻³² is below x − ⌊x⌋, u from a keystream."""

    def __init__(self, stream: CipherContext) -> None:
        self._stream = stream
        self._words = np.empty(BLOCK, "<u4")
        self._floor = np.empty(BLOCK)
        self._uniform = np.empty(BLOCK)

    def round(self, values: NDArray[np.float64]) -> None:
        """Rounds a (≤ BLOCK,) vector."""
        size = len(values)
        words, floor, uniform = self._words[:size], self._floor[:size], self._uniform[:size]
        self._stream.update_into(ZEROS[: words.nbytes], words.view(np.uint8).data)
        np.multiply(words, 2.0**-32, out=uniform)
        np.floor(values, out=floor)
        values -= floor
        np.less(uniform, values, out=values)
        values += floor
