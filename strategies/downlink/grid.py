"""The grid that clients' models lie on: what is rounded once can be told as whole numbers, exactly.

The server's own model stays as fine as it is; what clients train on is that model with each float array rounded to
multiples of a power of two,

    h = 2^e,   e = ⌊log₂ rms(x)⌋ − bits,   x̂ = h · round(x / h),

which follows from the version alone: all clients of a version train on the same bits, whatever they held before, and no
error adds up. Any two versions differ by whole multiples of the finer of their two grids. The relative error of an
array is h / (rms·√12) ≤ 2^−bits / √12 (uniform rounding errors).

That gradients are taken at a compressed model while the server keeps its own is "MCM" of Philippenko & Dieuleveut 2021,
"Preserved central model for faster bidirectional compression in distributed settings", section 2; here the compression
is a rounding, so that its error is bounded at each step and needs no memory.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

OF_ZEROS: Final = 1023
"""The exponent of an array of zeros, which lies on any grid: the other version's decides."""
LEAST: Final = -1074
"""The exponent of the smallest float64."""

_EXACT: Final = float(1 << 52)
"""Whole numbers below are exact in float64, and so are their differences."""


def exponent_of(array: Array, bits: int) -> int | None:
    """The exponent e of an array's grid; 0 for integers; None where it has none: values are not finite, or nearly so.

    Args:
        array: of floats or integers, any shape.
        bits: how far below the array's rms the grid lies.
    """
    if array.dtype.kind != "f":
        return 0
    limits = np.finfo(array.dtype.name)
    largest = float(np.max(np.abs(array), initial=0.0))
    if not largest < float(limits.max) / 4:  # NaN too
        return None
    if not largest:
        return OF_ZEROS
    # Against the largest element, so that squares neither overflow nor vanish.
    share = np.square(np.divide(array, largest, dtype=np.float64)).mean()
    _, above = np.frexp(largest * np.sqrt(share))
    _, least = np.frexp(float(limits.smallest_subnormal))
    return max(int(above) - 1 - bits, int(least) - 1)


def rounded(array: Array, exponent: int | None) -> Array:
    """The array on its grid, in its own dtype, no zero negative; itself where there is none to round.

    Exact in the array's dtype: an element of p significant bits beyond 2^p·h is a multiple of h as it is.
    """
    if array.dtype.kind != "f" or exponent is None:
        return array
    values = np.ldexp(array.astype(np.float64).ravel(), -exponent)
    np.rint(values, out=values)
    np.ldexp(values, exponent, out=values)
    values += 0.0  # −0 would come back as 0, and the digest would differ
    return values.astype(array.dtype).reshape(array.shape)


def multiples(array: Array, exponent: int) -> NDArray[np.int64] | None:
    """The array as whole multiples of 2^exponent, flat; None where it is none, or past 2⁵².

    Integers are taken modulo 2⁶⁴.
    """
    if array.dtype.kind != "f":
        return array.astype(np.int64).ravel()
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.ldexp(array.astype(np.float64).ravel(), -exponent)
        whole = np.abs(values) < _EXACT  # False for NaN
        if not (whole.all() and (np.rint(values) == values).all()):
            return None
    return values.astype(np.int64)


def from_multiples(whole: NDArray[np.int64], exponent: int, like: Array) -> Array:
    """The array of these multiples of 2^exponent, in the dtype and shape of `like`."""
    if like.dtype.kind != "f":
        return whole.astype(like.dtype).reshape(like.shape)
    with np.errstate(over="ignore"):
        values = np.ldexp(whole.astype(np.float64), exponent)
        return values.astype(like.dtype).reshape(like.shape)
