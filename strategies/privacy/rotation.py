"""A random rotation that spreads a vector's length over all its elements, so that rounding costs each of them alike.

The randomised Hadamard transform (Ailon & Chazelle 2009, "The Fast Johnson-Lindenstrauss Transform", §4; in private
aggregation Kairouz, Liu & Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
Aggregation", Algorithm 1): random signs, then a Walsh-Hadamard matrix over √m. It exists for m = 2ᵏ only, and padding
would nearly double what is sent in the worst case. So for d elements two of m = 2^⌊log₂ d⌋ are applied, one to the
first m elements and another, with signs of its own, to the last m; they overlap, since 2m > d, and each is orthogonal,
so their product is. A one-hot vector's largest element falls to about √(2·log d / m).

The signs come of a seed that all clients of a round share and that is no secret. The transform is made of products with
small Hadamard matrices, H_{ab} = H_a ⊗ H_b, which the linear algebra library does at its best.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from cryptography.hazmat.primitives.ciphers import CipherContext
from numpy.typing import NDArray

from strategies.secagg.masks import ZEROS, keystream

Floats = NDArray[np.float32]

_BITS = 5
"""A small matrix is 2⁵ wide at most: larger ones cost more products than they save passes through memory."""


class Rotation:
    """An orthogonal map of (d,) float32 vectors.

    Args:
        seed: 32 bytes; the same ones make the same map.
        size: d, at least 1.

    Raises:
        ValueError: a seed of another length, or no elements.
    """

    def __init__(self, seed: bytes, size: int) -> None:
        if size < 1:
            raise ValueError(f"a vector of {size} elements has no direction")
        self._size = size
        self._window = 1 << (size.bit_length() - 1)
        stream = keystream(seed)
        self._first = _signs(stream, self._window)
        self._last = _signs(stream, self._window) if self._window < size else None

    def forward(self, vector: Floats) -> Floats:
        """The rotated vector, a new one of the same length to within float32's precision.

        Raises:
            ValueError: another size than d.
        """
        out, window = self._copy(vector), self._window
        out[:window] = hadamard(out[:window] * self._first)
        if self._last is not None:
            out[-window:] = hadamard(out[-window:] * self._last)
        return out

    def inverse(self, vector: Floats) -> Floats:
        """The vector whose rotation this is, a new one; raises as `forward`."""
        out, window = self._copy(vector), self._window
        if self._last is not None:
            out[-window:] = hadamard(out[-window:]) * self._last
        out[:window] = hadamard(out[:window]) * self._first
        return out

    def _copy(self, vector: Floats) -> Floats:
        if vector.shape != (self._size,):
            raise ValueError(f"a vector of shape {vector.shape}, where {self._size} are rotated")
        return vector.astype(np.float32)


def hadamard(vector: Floats) -> Floats:
    """The orthonormal Walsh-Hadamard transform of an (m,) vector, m = 2ᵏ, a new one; its own inverse."""
    bits, done, out = len(vector).bit_length() - 1, 0, vector
    while done < bits:
        take = min(_BITS, bits - done)
        # Of the index' bits from the lowest, `done` are transformed: these are the last axis.
        cube = out.reshape(-1, 1 << take, 1 << done)
        matrix = _matrix(take)
        # One large product where the last axis is empty, else one for each of the first.
        out = cube[:, :, 0] @ matrix if done == 0 else matrix @ cube
        done += take
    return out.reshape(-1)


@cache
def _matrix(bits: int) -> Floats:
    """The orthonormal Hadamard matrix of Sylvester's construction, (2ᵇ, 2ᵇ)."""
    matrix = np.ones((1, 1))
    for _ in range(bits):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / 2 ** (bits / 2)).astype(np.float32)


def _signs(stream: CipherContext, size: int) -> Floats:
    """(size,) of ±1, each of one bit."""
    octets = np.empty((size + 7) // 8, np.uint8)
    for begin in range(0, len(octets), len(ZEROS)):
        block = octets[begin : begin + len(ZEROS)]
        stream.update_into(ZEROS[: block.nbytes], block.data)
    signs = np.unpackbits(octets, count=size).astype(np.float32)
    signs *= -2
    signs += 1
    return signs
