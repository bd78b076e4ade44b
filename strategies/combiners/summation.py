"""A running sum of float32 vectors that does not depend on the order in which they come.

Replies arrive in any order, and a float64 sum differs in its last bit with the order: two runs with the same seed
would drift apart. A compensated sum carries the rounding error of every addition along (Knuth's TwoSum, as in
Ogita, Rump & Oishi 2005, "Accurate sum and dot product", Algorithm 4.4), which leaves an error of about n²·2⁻¹⁰⁴
relative to Σ|x|: the rounded result is the same for every order, up to odds of about n²·2⁻⁵¹ an element.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 13
"""Elements at a time: six float64 buffers of this length stay in a core's second-level cache."""


class CompensatedSum:
    """Σ wᵢ·xᵢ over (size,) float32 vectors, in float64 with compensation: 16 bytes an element, however many come.

    Weights are taken as float64. The products are exact for whole-number weights up to 2²⁹.
    """

    def __init__(self, size: int) -> None:
        self._sum = np.zeros(size)
        self._lost = np.zeros(size)
        self._scratch = np.empty((3, min(size, _BLOCK)))

    def add(self, vector: NDArray[np.float32], weight: float = 1.0) -> None:
        """Adds `weight` times a (size,) vector, in one pass."""
        for begin in range(0, len(vector), _BLOCK):
            block = slice(begin, min(begin + _BLOCK, len(vector)))
            total, lost = self._sum[block], self._lost[block]
            term, after, part = self._scratch[:, : len(total)]
            np.multiply(vector[block], weight, out=term, dtype=np.float64)
            np.add(total, term, out=after)
            # TwoSum: the part of `term` that arrived, then what was lost of `total` and of `term`.
            np.subtract(after, total, out=part)
            term -= part
            np.subtract(after, part, out=part)
            total -= part
            lost += total
            lost += term
            total[...] = after

    def mean(self, divisor: float) -> NDArray[np.float64]:
        """The sum divided by `divisor`, as a new (size,) float64 vector."""
        return (self._sum + self._lost) / divisor
