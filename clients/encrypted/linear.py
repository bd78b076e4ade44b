"""Linear layers on ciphertexts: exact matrix products modulo a prime, by floating-point matrix multiplication.

A weight that is the same in all slots is one integer in the whole ring, so that a layer of weights times ciphertexts is
an integer matrix times a matrix of residues. Residues of up to 60 bits are cut into limbs that are short enough for
float64 products and sums to be exact integers (below 2^50), each limb goes through BLAS, and the limbs are joined
modulo the prime. The limit is that of a float64 product: 2 · outputs · inputs · columns operations a limb.

Only integers are known here: no scale, no slot, no key.
"""

from __future__ import annotations

from math import ceil
from typing import Final

import numpy as np
from numpy.typing import NDArray

EXACT_BITS: Final = 50
"""Sums of products of limbs and weights stay below 2^50: exact in float64, and added to a residue without overflow."""
_BLOCK: Final = 4096
"""Columns at a time: a block of limbs stays in the processor's cache."""
_SHORTEST: Final = 8


class WeightRangeError(ValueError):
    """Weights too large for an exact product."""


def quantised(weights: NDArray[np.floating], scale: float) -> NDArray[np.int64]:
    """Weights times a scale, rounded to integers.

    Raises:
        WeightRangeError: one is not finite, or too large to be exact.
    """
    scaled = np.rint(np.asarray(weights, np.float64) * scale)
    if not np.isfinite(scaled).all() or (scaled.size and float(np.abs(scaled).max()) >= 2.0**42):
        raise WeightRangeError(
            f"a weight of {float(np.abs(weights).max()):g} at scale 2^{np.log2(scale):.0f} is too large for an exact"
            " product: the training has diverged (lower server.lr), or the scale is wrong"
        )
    return scaled.astype(np.int64)


def matmul(
    weights: NDArray[np.int64], columns: NDArray[np.uint64], prime: int
) -> NDArray[np.uint64]:
    """The product weights · columns modulo a prime.

    Args:
        weights: (outputs, inputs).
        columns: residues (inputs, n) below the prime; may be a strided view.
        prime: of 40 to 60 bits.

    Returns:
        Residues (outputs, n).

    Raises:
        WeightRangeError: a row of weights is too long for exact sums.
    """
    width = _limb_bits(weights, prime)
    factors = weights.astype(np.float64)
    out = np.empty((len(weights), columns.shape[1]), np.uint64)
    for start in range(0, columns.shape[1], _BLOCK):
        block = columns[:, start : start + _BLOCK]
        out[:, start : start + _BLOCK] = _product(factors, block, prime, width)
    return out


def _limb_bits(weights: NDArray[np.int64], prime: int) -> int:
    """Bits of a limb, with which the largest possible sum is exact."""
    longest = int(np.abs(weights).sum(axis=1).max(initial=1))
    bits = prime.bit_length()
    most = EXACT_BITS - max(longest, 1).bit_length()
    if most < _SHORTEST:
        raise WeightRangeError(
            f"a row of weights sums to 2^{longest.bit_length()}, and exact products hold 2^{EXACT_BITS - _SHORTEST}"
        )
    return ceil(bits / ceil(bits / most))


def _product(
    factors: NDArray[np.float64], block: NDArray[np.uint64], prime: int, width: int
) -> NDArray[np.uint64]:
    """One block of columns: limbs from the highest down, by Horner's rule modulo the prime."""
    mask, at = np.uint64((1 << width) - 1), ceil(prime.bit_length() / width) - 1
    total: NDArray[np.int64] | None = None
    for shift in range(at * width, -1, -width):
        limb = ((block >> np.uint64(shift)) & mask).astype(np.float64)
        part = (factors @ limb).astype(np.int64)
        if prime < 1 << EXACT_BITS:
            part %= prime
        total = part if total is None else _shifted(total, width, prime) + part
        _reduce(total, prime)
    assert total is not None
    return total.view(np.uint64)


def _shifted(values: NDArray[np.int64], width: int, prime: int) -> NDArray[np.int64]:
    """What values · 2^width is modulo a prime, up to one prime too much or too little; values are in [0, prime).

    The quotient is below 2^width, so that its double is at most one off; products wrap round 2^64 without harm.
    """
    quotient = (values * (2.0**width / prime)).astype(np.int64)
    quotient *= prime
    moved = values << width
    moved -= quotient
    return moved


def _reduce(values: NDArray[np.int64], prime: int) -> None:
    """Brings values of magnitude below 2^50 + 2 · prime into [0, prime), in place."""
    for _ in range(2):
        values += (values >> 63) & prime
    for _ in range(2):
        values -= prime
        values += (values >> 63) & prime
