"""Means, spreads, and the paired interval of a difference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A sample's mean and spread.

    Attributes:
        n: size of the sample.
        mean: None of none.
        deviation: sample standard deviation (n − 1 in the denominator), None below two.
    """

    n: int
    mean: float | None
    deviation: float | None


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and where its expectation lies.

    Attributes:
        pairs: how many there are.
        mean: None of none.
        low: of the two-sided interval of Student's t; None below two pairs, of which there is none.
        high: likewise.
    """

    pairs: int
    mean: float | None
    low: float | None
    high: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """The estimate from finite values."""
    return Estimate(
        len(values),
        statistics.fmean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def paired(pairs: Sequence[tuple[float, float]], level: float = LEVEL) -> Difference:
    """The mean of `value − baseline` with its interval, mean ± t(n − 1)·s/√n.

    Args:
        pairs: (value, baseline) of replicates that are matched.
        level: probability with which such intervals hold the expectation, where differences are independent and normal.
    """
    differences = estimate([value - baseline for value, baseline in pairs])
    mean, deviation, n = differences.mean, differences.deviation, differences.n
    if mean is None or deviation is None:
        return Difference(n, mean, None, None)
    half = float(stdtrit(n - 1, 0.5 + level / 2)) * deviation / math.sqrt(n)
    return Difference(n, mean, mean - half, mean + half)
