"""Tails of the hypergeometric distribution, as base-2 logarithms: 2⁻⁶⁰ is as exact as 1/2."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

Logs = NDArray[np.float64]


def log2_binomial(n: int, k: NDArray[np.int64]) -> Logs:
    """log₂ of n choose k, −∞ where k is outside 0 … n."""
    inside = (k >= 0) & (k <= n)
    k = np.where(inside, k, 0)
    logs = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    result: Logs = np.where(inside, logs / np.log(2), -np.inf)
    return result


def log2_tails(population: int, marked: int, draws: int) -> Logs:
    """log₂ P[at least x of the drawn are marked], x = 0 … draws + 1, drawing without replacement.

    Returns:
        (draws + 2,), from 0 down; −∞ where it cannot be.
    """
    x = np.arange(draws + 2)
    each = log2_binomial(marked, x) + log2_binomial(population - marked, draws - x)
    each -= log2_binomial(population, np.array([draws]))
    tails: Logs = np.logaddexp2.accumulate(each[::-1])[::-1]
    return np.minimum(tails, 0.0)
