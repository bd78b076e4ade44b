"""Gaussian noise that a privacy claim may rest on: from the operating system's entropy, in float64.

A keystream (`strategies.secagg.masks`) of a fresh key gives uniform 64-bit words; Box and Muller's transform makes
normal numbers of them. A single float64 normal number tells of its own making: which values can come out depends on
the last bits, and so on what it is added to (Mironov 2012, "On Significance of the Least Significant Bits for
Differential Privacy"). Each number here is therefore half the sum of four, whose lattice nobody can search (Holohan &
Braghin 2021, "Secure Random Sampling in Differential Privacy", §4).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from strategies.secagg.masks import BLOCK, ZEROS, keystream
from strategies.seeds import generator

Entropy = Callable[[int], bytes]
"""Gives that many uniform bytes."""

_SUMMED = 4
"""Normal numbers in each that is given."""


def gaussian(size: int, entropy: Entropy = os.urandom) -> NDArray[np.float64]:
    """Independent standard normal numbers, (size,) float64.

    A uniform number is a word of 64 bits plus a half, so the tails reach √(2·65·ln 2) = 9.4 standard deviations of
    each of the four, and what is beyond has a probability of 2⁻⁶⁵.

    Args:
        size: how many.
        entropy: of the keystream's key, 32 bytes.
    """
    stream = keystream(entropy(32))
    noise = np.zeros(size)
    words = np.empty(BLOCK // 2, "<u8")
    pairs = len(words) // 2
    for begin in range(0, size, 2 * pairs):
        block = noise[begin : begin + 2 * pairs]
        half = (len(block) + 1) // 2
        for _ in range(_SUMMED):
            stream.update_into(ZEROS, words.view(np.uint8).data)
            radius = (words[:half] + 0.5) * 2.0**-64
            np.log(radius, out=radius)
            radius *= -2
            np.sqrt(radius, out=radius)
            angle = words[pairs : pairs + half] * (2 * np.pi * 2.0**-64)
            block[:half] += radius * np.cos(angle)
            block[half:] += (radius * np.sin(angle))[: len(block) - half]
    noise /= np.sqrt(_SUMMED)
    return noise


class Seeded:
    """Entropy that repeats, for tests and studies: no ε may be claimed of what is made of it.

    Args:
        seed: the run's.
        purpose: tells one part's bytes from another's.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        self._generator = generator(seed, purpose)

    def __call__(self, count: int) -> bytes:
        """The next `count` bytes."""
        return self._generator.bytes(count)
