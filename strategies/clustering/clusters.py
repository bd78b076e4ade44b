"""Groups of fingerprints, how many there are, and whether there is more than one.

Average linkage on the cosine distance; the number of groups is that of the largest mean silhouette (Rousseeuw 1987,
"Silhouettes", section 2). A silhouette always names some number from 2 on, so whether there is more than one group is a
test of its own, a parametric bootstrap in the manner of Liu et al. 2008, "Statistical Significance of Clustering for
High-Dimension, Low-Sample Size Data" (SigClust).

Null: the clients' directions are independent draws from one Gaussian; clients may differ, also for good, as they do
when each has examples of its own. Two statistics, with Bonferroni's correction: the largest mean silhouette of the
fingerprints, whose lengths count for nothing, which finds groups within much noise; and that of squared distances, in
which they count, which finds a few tight groups, whose fingerprints have few directions. What they come to by chance
depends on how many directions the Gaussian has: d = (tr Σ)² / tr Σ², from estimators of both that are unbiased for any
spectrum (Srivastava 2005, "Some Tests Concerning the Covariance Matrix in High Dimensional Data"). The null is drawn
with d equal directions (for fingerprints one fewer, since few are estimated badly), and with one large direction beside
many small ones; the larger p-value counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from strategies.clustering.fingerprints import units

Matrix = NDArray[np.float64]
Labels = NDArray[np.int64]

LEAST_CLIENTS: Final = 6
"""Fewer than three pairs are no groups."""
_MOST_DIRECTIONS: Final = 400
"""With so many all silhouettes are nearly 0: more would change nothing but the time."""


def distances(rows: Matrix) -> Matrix:
    """Cosine distances, 1 − cos, between rows of length 1: (n, n), symmetric, 0 on the diagonal."""
    found: Matrix = np.clip(1.0 - rows @ rows.T, 0.0, 2.0)
    np.fill_diagonal(found, 0.0)
    return np.asarray((found + found.T) / 2)


def squares(rows: Matrix) -> Matrix:
    """Squared distances between rows, (n, n), symmetric, 0 on the diagonal."""
    lengths = (rows**2).sum(axis=1)
    found: Matrix = np.clip(lengths[:, None] + lengths - 2 * rows @ rows.T, 0.0, None)
    np.fill_diagonal(found, 0.0)
    return np.asarray((found + found.T) / 2)


def silhouette(apart: Matrix, labels: Labels) -> float:
    """The mean silhouette, in [−1, 1]; that of a client alone in its group is 0.

    Args:
        apart: (n, n) distances.
        labels: (n,) from 0, at least two different ones and none left out.
    """
    everyone = np.arange(len(labels))
    members = np.eye(labels.max() + 1)[labels]
    counts, sums = members.sum(axis=0), apart @ members
    own = sums[everyone, labels] / np.maximum(counts[labels] - 1, 1)
    others = sums / counts
    others[everyone, labels] = np.inf
    nearest = others.min(axis=1)
    largest = np.maximum(own, nearest)
    each = np.where(largest > 0, (nearest - own) / np.where(largest > 0, largest, 1.0), 0.0)
    return float(np.where(counts[labels] > 1, each, 0.0).mean())


def agglomerative(apart: Matrix, most: int) -> tuple[Labels, float]:
    """Average linkage, cut where the mean silhouette is largest.

    Args:
        apart: (n, n) distances, n ≥ 4.
        most: groups at most; never more than n // 2.

    Returns:
        (n,) labels from 0, and the silhouette.
    """
    from scipy.cluster.hierarchy import linkage

    n = len(apart)
    labels, cuts = np.arange(n), []
    for step, (one, other) in enumerate(linkage(apart[np.triu_indices(n, 1)], "average")[:-1, :2]):
        labels[(labels == one) | (labels == other)] = n + step
        if n - step - 1 <= min(most, n // 2):
            cuts.append(np.unique(labels, return_inverse=True)[1].astype(np.int64))
    return _best(apart, cuts)


def k_means(rows: Matrix, most: int, *, least: int = 2) -> tuple[Labels, float]:
    """k-means on rows of length 1, with the number from `least` to `most` that has the largest silhouette."""
    from sklearn.cluster import KMeans

    apart = distances(rows)
    numbers = range(least, max(least, min(most, len(rows) // 2)) + 1)
    found = [KMeans(k, n_init=10, random_state=0).fit_predict(rows) for k in numbers]
    return _best(apart, [labels.astype(np.int64) for labels in found])


def hdbscan(rows: Matrix) -> tuple[Labels, float]:
    """HDBSCAN (Campello et al. 2013) on cosine distances, groups of two at least; who is in none is a group alone."""
    from sklearn.cluster import HDBSCAN

    apart = distances(rows)
    labels = HDBSCAN(min_cluster_size=2, metric="precomputed", copy=True).fit_predict(apart)
    alone = np.flatnonzero(labels < 0)
    labels[alone] = labels.max() + 1 + np.arange(len(alone))
    labels = labels.astype(np.int64)
    return labels, silhouette(apart, labels) if labels.max() else 0.0


def directions_in(rows: Matrix) -> float:
    """How many equal directions would scatter as the rows do about their mean, (tr Σ)² / tr Σ²; ∞ where all differ.

    Args:
        rows: (n, k), n ≥ 3.
    """
    centred = rows - rows.mean(axis=0)
    gram = centred @ centred.T
    m = len(rows) - 1
    trace, square = float(np.trace(gram)), float((gram**2).sum())
    of_square = (square - trace**2 / m) / ((m - 1) * (m + 2))
    if of_square <= 1e-12 * trace**2:
        return math.inf
    return max(1.0, (trace**2 - 2 * m * of_square) / m**2 / of_square)


def one_group(directions: Matrix, most: int, *, draws: int = 199, seed: int = 0) -> float:
    """The p-value of the null that is described above: all clients are one group.

    Args:
        directions: (n, k), a row for each client, of any length; n ≥ `LEAST_CLIENTS`.
        most: groups at most.
        draws: from each spectrum.
        seed: of the draws.

    Returns:
        At least 2 / (draws + 1).
    """
    rows = units(directions)
    by_angle, by_distance = _by_angle(rows, most), _by_distance(rows, most)
    dimension = min(directions_in(rows), float(_MOST_DIRECTIONS))
    rng = np.random.default_rng(seed)

    def share(scales: Matrix, statistic: Callable[[Matrix, int], float], found: float) -> float:
        # A draw has no direction in common: its rows are scattered about 0 as the clients' are about their mean.
        drawn = (rng.standard_normal((len(rows), len(scales))) * scales for _ in range(draws))
        return (1 + sum(statistic(each, most) >= found for each in drawn)) / (draws + 1)

    large = _one_large(dimension)
    angle = max(
        share(_equal(max(1.0, dimension - 1.0)), _by_angle, by_angle),
        share(large, _by_angle, by_angle),
    )
    distance = max(
        share(_equal(dimension), _by_distance, by_distance),
        share(large, _by_distance, by_distance),
    )
    return min(1.0, 2 * min(angle, distance))


def _by_angle(rows: Matrix, most: int) -> float:
    return agglomerative(distances(units(rows - rows.mean(axis=0))), most)[1]


def _by_distance(rows: Matrix, most: int) -> float:
    return agglomerative(squares(rows), most)[1]


def _equal(dimension: float) -> Matrix:
    """Standard deviations whose squares v have (Σv)² / Σv² = `dimension` ≥ 1: ones, and one that is less."""
    whole = int(dimension)
    ones, rest = np.ones(whole), dimension - whole
    if rest < 1e-9:
        return ones
    # (whole + v)² = dimension · (whole + v²), the smaller root.
    a, b, c = dimension - 1.0, -2.0 * whole, whole * (dimension - whole)
    v = (-b - math.sqrt(max(0.0, b * b - 4 * a * c))) / (2 * a)
    return np.append(ones, math.sqrt(v))


def _one_large(dimension: float) -> Matrix:
    """The same with one square v ≥ 1 beside as many ones as there may be; ones alone where `dimension` is as large."""
    small = _MOST_DIRECTIONS - 1
    if dimension >= _MOST_DIRECTIONS - 1:
        return np.ones(small + 1)
    # (small + v)² = dimension · (small + v²), the larger root.
    a, b, c = max(dimension - 1.0, 1e-6), -2.0 * small, small * (dimension - small)
    v = (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)
    return np.append(np.ones(small), math.sqrt(v))


def _best(apart: Matrix, candidates: list[Labels]) -> tuple[Labels, float]:
    scored = [(silhouette(apart, labels), labels) for labels in candidates]
    score, labels = max(scored, key=lambda pair: pair[0])
    return labels, score
