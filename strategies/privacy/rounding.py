"""Rounding to whole steps at random, on the condition that the vector does not become long: what accounting rests on.

Kairouz, Liu & Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
Aggregation", Algorithm 1 and Proposition 22. Each x becomes ⌊x⌋ + 1 with the probability of its part above ⌊x⌋, else
⌊x⌋, so that the mean is x. A vector of norm c could grow to c + √d by this, but is with a probability of at least 1 − β
no longer than √(c² + d/4 + √(2·log(1/β))·(c + √d/2)); it is rounded again until it is within the smaller of the two.
That bound holds always: what one client can change is known *after* rounding, for every vector of norm c.

The condition biases the mean, by at most β/(1 − β)·√d in norm, since no element moves by more than a step, and in
practice by nothing: the parts above ⌊x⌋ add about d/6 to a square rather than d/4, and long vectors are rounded once.

A whole number is never larger than its square, so the L1 norm of an integer vector is at most its squared L2 norm.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from strategies.secagg.keys import KEY_BYTES
from strategies.secagg.masks import BLOCK, ZEROS, keystream

BETA = math.exp(-0.5)
"""The paper's choice: √(2·log(1/β)) = 1, and a rounding is repeated with a probability below 0.61."""
LARGEST_NORM = 2.0**26
"""Squares of norms up to it are exact in float64."""

_SLACK = 1e-4
"""By how much of itself a vector may be longer than it should, from float32 arithmetic."""
_ATTEMPTS = 1_000
"""Of roundings that fail with a probability below 0.61: all do in 10⁻²¹⁵ of all cases."""


def rounded_l2(norm: float, dimension: int, beta: float = BETA) -> float:
    """The largest L2 norm after rounding, in steps, of a (dimension,) vector whose norm was at most `norm` steps.

    Args:
        norm: c, at least 0.
        dimension: d, at least 1.
        beta: above 0 and below 1: the probability with which a rounding may have to be repeated.

    Raises:
        ValueError: one of them is outside its range.
    """
    if not (0 <= norm <= LARGEST_NORM and dimension >= 1 and 0 < beta < 1):
        raise ValueError(f"norm = {norm!r}, dimension = {dimension!r}, beta = {beta!r}: no bound")
    root = math.sqrt(dimension)
    likely = norm**2 + dimension / 4 + math.sqrt(-2 * math.log(beta)) * (norm + root / 2)
    return min(norm + root, math.sqrt(likely))


def rounded_l1(l2: float, dimension: int) -> float:
    """The largest L1 norm of an integer (dimension,) vector whose L2 norm is at most `l2`."""
    return min(l2**2, math.sqrt(dimension) * l2)


def rounded(
    vector: NDArray[np.float64],
    norm: float,
    beta: float = BETA,
    entropy: Callable[[int], bytes] = os.urandom,
) -> NDArray[np.int64]:
    """The vector in whole steps, (d,) int64, no longer than `rounded_l2(norm, d, beta)`.

    Args:
        vector: (d,) float64, in steps.
        norm: what its L2 norm is at most; one that is longer by up to a part in 10,000, by float32 arithmetic, is
            scaled down to it.
        beta: as in `rounded_l2`.
        entropy: gives that many uniform bytes: the key of the keystream that all rounding is drawn from.

    Raises:
        ValueError: the vector is longer than `norm`, or not finite.
    """
    most = rounded_l2(norm, len(vector), beta)
    length = math.sqrt(float(vector @ vector))
    if not length <= norm * (1 + _SLACK):
        raise ValueError(f"a vector of norm {length:g}, where {norm:g} was promised")
    if length > norm:
        vector = vector * (norm / length)
    stream = keystream(entropy(KEY_BYTES))
    floor = np.floor(vector)
    part = vector - floor
    words = np.empty(BLOCK // 2, np.uint64)
    for _ in range(_ATTEMPTS):
        values = floor.copy()
        for begin in range(0, len(vector), len(words)):
            block = part[begin : begin + len(words)]
            uniform = words[: len(block)]
            stream.update_into(ZEROS[: uniform.nbytes], uniform.view(np.uint8).data)
            values[begin : begin + len(words)] += uniform * 2.0**-64 < block
        if float(values @ values) <= most**2:
            return values.astype(np.int64)
    raise RuntimeError(f"{_ATTEMPTS} roundings were all longer than {most:g} steps")
