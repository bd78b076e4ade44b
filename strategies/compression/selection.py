"""Which coordinates of a vector travel: those of the largest magnitude, or a random set that all clients share.

Stich, Cordonnier & Jaggi 2018, "Sparsified SGD with Memory", Definition 2.1: top_k and rand_k.

Magnitudes are compared as the bits of their floats, whose order as integers is the order of the magnitudes, with NaN
above all: a diverged client sends its NaN, and the server refuses it for what it is. Whole numbers are also twice as
fast to partition.

The random set is that of the k smallest of d random keys. It rests on nothing but the generator's raw bits, which numpy
keeps the same over its versions, as it does not keep its draws without replacement.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil

import numpy as np
from numpy.typing import NDArray

from strategies.seeds import generator
from strategies.update import Vector

Indices = NDArray[np.int64]
"""Coordinates, ascending, all different."""

_MAGNITUDE = np.uint32(0x7FFFFFFF)


def kept(ratio: float, size: int) -> int:
    """k, how many of so many coordinates travel: ⌈ratio · size⌉, so at least 1 of any."""
    return min(size, ceil(ratio * size))


def largest(vector: Vector, k: int) -> Indices:
    """The k coordinates of the largest magnitude; of equal ones the first. Those that are 0 are left out.

    Args:
        vector: (d,) float32, anything in it.
        k: from 0 to d.
    """
    if k == 0:
        return np.empty(0, np.int64)
    bits, place = vector.view(np.uint32), len(vector) - k
    magnitudes = bits & _MAGNITUDE
    magnitudes.partition(place)
    least = max(magnitudes[place], np.uint32(1))
    # Made anew where it was shuffled: another array of this size would be fresh pages, which cost more.
    found = np.flatnonzero(np.bitwise_and(bits, _MAGNITUDE, out=magnitudes) >= least)
    surplus = len(found) - k
    if surplus > 0:
        tied = np.flatnonzero(magnitudes[found] == least)
        found = np.delete(found, tied[len(tied) - surplus :])
    return found


@lru_cache(maxsize=4)  # one a version, for all clients that a process plays
def support(seed: int, version: int, size: int, k: int) -> Indices:
    """K of `size` coordinates, all sets alike: the same wherever the four arguments are; read-only."""
    words = generator(seed, "random-k", version).bit_generator.random_raw((size + 1) // 2)
    keys = words.astype("<u8").view("<u4")[:size].astype(np.uint32, copy=False)
    place = max(k - 1, 0)
    most = np.partition(keys, place)[place] if size else np.uint32(0)
    found = np.flatnonzero(keys <= most)[:k]  # of equal keys, which are rare, the first
    found.flags.writeable = False
    return found
