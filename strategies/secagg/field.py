"""GF(2¹⁶): polynomials over GF(2) modulo x¹⁶ + x¹² + x³ + x + 1, as uint16 arrays.

Addition is exclusive or. x generates the multiplicative group, so that a product is one addition of logarithms. The
tables are indexed by the values themselves: time and cache traffic depend on them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ORDER = (1 << 16) - 1
"""Elements other than 0: the order of the multiplicative group."""

_POLYNOMIAL = 0b1_0001_0000_0000_1011


def _times(values: NDArray[np.uint32], factor: int) -> NDArray[np.uint32]:
    """The values times `factor`, by shifting and adding, as in a multiplication by hand."""
    product = np.zeros_like(values)
    while factor:
        if factor & 1:
            product ^= values
        values = values << np.uint32(1)
        values ^= (values >> np.uint32(16)) * np.uint32(_POLYNOMIAL)
        factor >>= 1
    return product


def _powers() -> NDArray[np.uint32]:
    """x⁰, x¹, …, x^ORDER: the list so far, and the same times x to its length."""
    powers = np.ones(1, np.uint32)
    following = 0b10
    while len(powers) <= ORDER:
        powers = np.concatenate([powers, _times(powers, following)])
        following = int(_times(np.array([following], np.uint32), following)[0])
    return powers


def _tables() -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """exp, and log with a "logarithm" of 0 so large that exp of it plus any logarithm is 0."""
    powers = _powers()[:ORDER].astype(np.uint16)
    exp = np.concatenate([powers, powers, np.zeros(2 * ORDER + 1, np.uint16)])
    log = np.empty(ORDER + 1, np.int64)
    log[powers] = np.arange(ORDER)
    log[0] = 2 * ORDER
    return exp, log


EXP, LOG = _tables()


def multiply(a: NDArray[np.uint16], b: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """The products a · b, element by element, with broadcasting."""
    product: NDArray[np.uint16] = EXP[LOG[a] + LOG[b]]
    return product
