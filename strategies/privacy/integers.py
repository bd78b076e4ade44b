"""Integer noise: the discrete Gaussian and Skellam laws, drawn from the operating system's entropy, many at a time.

* Discrete Gaussian (Canonne, Kamath & Steinke 2020, "The Discrete Gaussian for Differential Privacy", Definition 1):
  P(x) ∝ exp(−x²/(2σ²)) on the integers. `variance` is the parameter σ²; the variance itself is at most that, and less
  by 2·10⁻⁷ of it at σ = 1.
* Skellam (Skellam 1946): the difference of two Poisson variables of mean v/2 each, of variance v.

**Up to σ = 400** a value comes from an alias table (Walker 1977; Vose 1991, "A Linear Algorithm for Generating Random
Numbers with a Given Distribution") of 60-digit probabilities: a uniform column, and 64 uniform bits within it.
**Wider discrete Gaussians** are k·A + B with σ_A² = σ²/k² − 4 ≥ 8 and σ_B = 2k (after Peikert 2010, "An Efficient and
Parallel Gaussian Sampler for Lattices"): P(x) ∝ Σ_a ρ_A(a)·ρ_B(x − ka) is ρ_σ(x) times a sum over the integers of a
Gaussian of variance s² = 1/(1/σ_A² + 1/4) ≥ 8/3, which Poisson's formula holds to a factor of 1 ± 2.1·exp(−2π²s²), or
2⁻⁷⁴, whatever x. **Wider Skellam variables** are discrete Gaussians of variance v + 8, each rejected with the
probability that makes up for the difference, about 4/v (`_rejection`).

**Distance.** A value's law is off by less than 2⁻⁶⁰ in total variation: each of at most six tables by 2⁻⁶⁴ (half is
what is cut off of the tails, half the 64-bit thresholds), each of five compositions by 2⁻⁷³, a rejection by 2⁻⁶⁴. So
d values in each of r rounds add at most d·r·2⁻⁶⁰ to a δ: 10⁻⁹ for a million elements and a thousand rounds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import CipherContext
from numpy.typing import NDArray

from strategies.secagg.keys import KEY_BYTES
from strategies.secagg.masks import BLOCK, ZEROS, keystream

Integers = NDArray[np.int64]
Entropy = Callable[[int], bytes]
Word = TypeVar("Word", np.uint16, np.uint64)

TABLE_DEVIATION = 400
"""The widest table, in standard deviations: with tails to 9.2σ its columns are 8,192."""
LARGEST_VARIANCE = 2.0**80
"""Nine standard deviations of 2⁴⁰ are far from the limits of int64, and exact in float64."""

_ELEMENTS = BLOCK // 2
"""At a time: as many 64-bit words as a block of the keystream holds."""
_UNIT = 1 << 64
_TAIL = Decimal(2) ** -66
"""Probability that is cut off of one tail."""
_PRECISE = Context(prec=60, Emin=-(10**9), Emax=10**9)
_SURPLUS = 8
"""What the proposal of a wide Skellam variable has in variance beyond it: enough for |x| ≤ 9.8·√v."""


def discrete_gaussian(variance: float, size: int, entropy: Entropy = os.urandom) -> Integers:
    """A (size,) int64 vector of independent discrete Gaussians.

    Args:
        variance: σ², above 0 and at most 2⁸⁰.
        size: how many.
        entropy: gives that many uniform bytes: the key of the keystream that all is drawn from.

    Raises:
        ValueError: a variance outside its range, or a negative size.
    """
    return _drawn(_gaussian, variance, size, entropy)


def skellam(variance: float, size: int, entropy: Entropy = os.urandom) -> Integers:
    """A (size,) int64 vector of independent Skellam variables of mean 0; as `discrete_gaussian`."""
    return _drawn(_skellam, variance, size, entropy)


def _drawn(
    law: Callable[[Fraction, int, CipherContext], Integers],
    variance: float,
    size: int,
    entropy: Entropy,
) -> Integers:
    """Fills a vector block by block, so that what lies between stays in a core's cache."""
    if not 0 < variance <= LARGEST_VARIANCE:
        raise ValueError(f"variance = {variance!r}: must be greater than 0 and at most 2⁸⁰")
    if size < 0:
        raise ValueError(f"size = {size}: must be at least 0")
    stream, out, exact = keystream(entropy(KEY_BYTES)), np.empty(size, np.int64), Fraction(variance)
    for begin in range(0, size, _ELEMENTS):
        block = out[begin : begin + _ELEMENTS]
        block[...] = law(exact, len(block), stream)
    return out


def _gaussian(variance: Fraction, size: int, stream: CipherContext) -> Integers:
    if variance <= TABLE_DEVIATION**2:
        return _table(_gaussian_weights, variance).draw(size, stream)
    factor, rest = split(variance)
    values = _gaussian(rest, size, stream)
    values *= factor
    values += _table(_gaussian_weights, Fraction(4 * factor**2)).draw(size, stream)
    return values


def split(variance: Fraction) -> tuple[int, Fraction]:
    """Factor k and σ_A² of a σ² that has no table: σ² = k²·σ_A² + (2k)², with σ_A² ≥ 8."""
    factor = min(TABLE_DEVIATION // 2, math.isqrt(int(variance / 12)))
    return factor, variance / factor**2 - 4


def _skellam(variance: Fraction, size: int, stream: CipherContext) -> Integers:
    if variance <= TABLE_DEVIATION**2:
        return _table(_skellam_weights, variance).draw(size, stream)
    values = _gaussian(variance + _SURPLUS, size, stream)
    uniform = _words(stream, np.dtype(np.uint64), size)
    # Nothing within 15·√v is rejected with a probability of 1,000/v or more: few need a closer look.
    near = np.flatnonzero(uniform < np.uint64(1_000 * _UNIT // variance))
    again = near[uniform[near] * 2.0**-64 < rejection(values[near], float(variance))]
    if len(again):
        values[again] = _skellam(variance, len(again), stream)
    return values


def rejection(values: Integers, variance: float) -> NDArray[np.float64]:
    """The probability of rejecting each discrete Gaussian x of variance v + 8, so that those kept are Skellam of v.

    Skellam's P(x) = exp(−v)·I_x(v), and with t = x/v, w = √(x² + v²), p = x/w (Olver, NIST Handbook, 10.41.3)

        log P(x) = v·(√(1 + t²) − 1 − t·asinh t) − log(2πw)/2 + (3 − 5p²)/(24w) + (1 − 6p² + 5p⁴)/(16w²) + O(w⁻³),

    of which only the difference to x = 0 counts. Each term is a power series in t², so that nothing large cancels:
    float64 puts 1 − exp(−T), which is 4/v on average, off by 2⁻⁵⁰ of itself, and what is left out is below v⁻⁴, so that
    the law is off by less than 2⁻⁶⁴ for v of 400² and more.

    Args:
        values: (n,) int64.
        variance: v, of the Skellam law, at least 400².
    """
    y = np.square(values / variance)
    # v·(…) without its first term −x²/(2v), the series of whose derivative, −asinh t, is known.
    series = y * y * (1 / 24 + y * (-1 / 80 + y * (5 / 896 + y * (-7 / 2304))))
    surplus = y * (_SURPLUS / 2 / (variance + _SURPLUS))
    p = y / (1 + y)  # p²
    root = np.expm1(-0.5 * np.log1p(y))  # v/w − 1
    fine = (5 * p * (1 + root) - 3 * root) / (24 * variance)
    # (1 − p)(1 − 5p)/w² = (1 − p)²·(1 − 5p)/v²
    fine += (1 - (1 - p) ** 2 * (1 - 5 * p)) / (16 * variance**2)
    too_likely = variance * (surplus - series) + 0.25 * np.log1p(y) + fine
    refused: NDArray[np.float64] = -np.expm1(-np.maximum(too_likely, 0))
    return refused


@dataclass(frozen=True)
class Table:
    """An alias table: a column is its own value below its threshold, and its alias' from there.

    Attributes:
        reach: the largest value; columns stand for −reach … reach, and some for nothing.
        thresholds: (columns,) uint64, in parts of 2⁶⁴.
        aliases: (columns,) int64, the values of the upper parts.
    """

    reach: int
    thresholds: NDArray[np.uint64]
    aliases: Integers

    def draw(self, size: int, stream: CipherContext) -> Integers:
        """(size,) values, size ≤ BLOCK / 2."""
        columns = _words(stream, np.dtype(np.uint16), size)
        columns &= np.uint16(len(self.thresholds) - 1)
        within = _words(stream, np.dtype(np.uint64), size)
        own = columns.astype(np.int64)
        upper = within >= self.thresholds[own]
        own -= self.reach
        np.copyto(own, self.aliases[columns], where=upper)
        return own


def _words(stream: CipherContext, kind: np.dtype[Word], size: int) -> NDArray[Word]:
    words = np.empty(size, kind)
    stream.update_into(ZEROS[: words.nbytes], words.view(np.uint8).data)
    return words


@lru_cache(maxsize=32)
def _table(law: Callable[[Fraction], list[Decimal]], variance: Fraction) -> Table:
    with localcontext(_PRECISE):
        return table(_counts(law(variance)))


def _gaussian_weights(variance: Fraction) -> list[Decimal]:
    """exp(−x²/(2σ²)) for x = 0, 1, …, until 10⁻⁴⁰."""
    step = (-Decimal(variance.denominator) / Decimal(2 * variance.numerator)).exp()
    weights, factor = [Decimal(1)], step
    while weights[-1] > Decimal("1e-40"):
        weights.append(weights[-1] * factor)
        factor *= step * step
    return weights


def _skellam_weights(variance: Fraction) -> list[Decimal]:
    """I_x(v) up to a factor for x = 0, 1, …, by Miller's backward recurrence from where it is below 10⁻⁶⁰ of I_0."""
    last = 60 + 17 * math.isqrt(math.ceil(variance))
    twice = Decimal(2 * variance.denominator) / Decimal(variance.numerator)
    weights = [Decimal(0), Decimal(1)]
    for order in range(last, 0, -1):
        weights.append(weights[-2] + order * twice * weights[-1])
    return weights[:0:-1]


def _counts(weights: list[Decimal]) -> list[int]:
    """Weights of 0, 1, … as parts of (columns · 2⁶⁴) for −reach … reach, and 0 for columns beyond."""
    total, cut = 2 * sum(weights) - weights[0], Decimal(0)
    while len(weights) > 1 and cut + weights[-1] <= _TAIL * total:
        cut += weights.pop()
    columns = 1 << (2 * len(weights) - 2).bit_length()
    unit = columns * _UNIT / (total - 2 * cut)
    half = [int((weight * unit).to_integral_value()) for weight in weights]
    counts = [*half[:0:-1], *half]
    counts[len(half) - 1] += columns * _UNIT - sum(counts)
    return counts + [0] * (columns - len(counts))


def table(counts: list[int]) -> Table:
    """Vose's algorithm on whole numbers: counts that add up to 2⁶⁴ a column, of a power of two of columns."""
    columns = len(counts)
    reach = (sum(count > 0 for count in counts) - 1) // 2
    thresholds, aliases, left = [0] * columns, list(range(columns)), list(counts)
    short = [column for column in range(columns) if left[column] < _UNIT]
    long = [column for column in range(columns) if left[column] > _UNIT]
    while short:
        column, giver = short.pop(), long[-1]
        thresholds[column], aliases[column] = left[column], giver
        left[giver] -= _UNIT - left[column]
        if left[giver] <= _UNIT:
            long.pop()
        if left[giver] < _UNIT:
            short.append(giver)
    return Table(reach, np.array(thresholds, np.uint64), np.array(aliases, np.int64) - reach)
