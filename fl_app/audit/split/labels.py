"""Labels from gradients at a cut.

Li et al. 2022, "Label Leakage and Protection in Two-party Split Learning" (arXiv 2102.08504): where one class is rare,
its examples' gradients are longer (norm attack), and gradients of one class point the same way (cosine attack, for an
attacker who knows a few examples of the class). A third attack knows no example: it clusters the directions, as many
clusters as classes, and is scored by the naming of clusters that suits it best, which is how far labels are told apart.

An example's gradient is its tokens' together. Arrays only: this file knows no model and no run.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fl_app.audit.split.score import Interval, area, share

Rows = NDArray[np.float64]
Labels = NDArray[np.int64]

_PERMUTATIONS = 20


@dataclass(frozen=True)
class Leakage:
    """One attack's figure.

    Attributes:
        value: AUC or accuracy.
        interval: of it.
        baseline: of a guess: 0.5 for an AUC.
        n: examples it was tried on.
    """

    value: float
    interval: Interval
    baseline: float
    n: int


def rarest(labels: Labels) -> int:
    """The class with the fewest examples; the smallest of several.

    Raises:
        ValueError: there are not two classes.
    """
    values, counts = np.unique(labels, return_counts=True)
    if len(values) < 2:
        raise ValueError(f"labels of {len(values)} classes: two or more can be told apart")
    return int(values[counts.argmin()])


def by_norm(gradients: Rows, labels: Labels, confidence: float) -> Leakage:
    """AUC of "a longer gradient is of the rarest class".

    Args:
        gradients: (n, d), one an example.
        labels: (n,), of two classes or more.
        confidence: of the interval.

    Raises:
        ValueError: a class has too few examples, or a gradient is not finite.
    """
    return _ranked(np.linalg.norm(gradients, axis=1), labels == rarest(labels), confidence)


def by_direction(
    gradients: Rows, labels: Labels, confidence: float, *, known: int = 5, seed: int = 0
) -> Leakage:
    """AUC of "a gradient that points as known ones of the rarest class do is of that class".

    The known examples are drawn, and the attack is not tried on them.

    Args:
        gradients: (n, d), one an example.
        labels: (n,), of two classes or more.
        confidence: of the interval.
        known: examples of the class that the attacker knows; at most half of them.
        seed: of the draw.

    Raises:
        ValueError: as `by_norm`.
    """
    positive = labels == rarest(labels)
    of_class = np.flatnonzero(positive)
    drawn = np.random.default_rng(seed).permutation(of_class)[: min(known, len(of_class) // 2)]
    if not len(drawn):
        raise ValueError("one example of the rarest class: none is left to be found")
    units = directions(gradients)
    rest = np.ones(len(labels), bool)
    rest[drawn] = False
    scores = units[rest] @ units[drawn].mean(axis=0)
    return _ranked(scores, positive[rest], confidence)


def by_clusters(gradients: Rows, labels: Labels, confidence: float, *, seed: int = 0) -> Leakage:
    """Accuracy of k-means on the directions, clusters named as suits best.

    Its baseline is what the same naming makes of labels in a random order, the mean of 20.

    Args:
        gradients: (n, d), one an example.
        labels: (n,), of two classes or more.
        confidence: of the interval.
        seed: of k-means' starts and of the orders.

    Raises:
        ValueError: as `by_norm`.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    rarest(labels)
    rows = directions(gradients)
    classes, places = np.unique(labels, return_inverse=True)
    with warnings.catch_warnings():
        # Gradients that are all alike make fewer clusters, and that is the finding.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(len(classes), n_init=5, random_state=seed).fit_predict(rows)
    hits = _named(found, places)
    rng = np.random.default_rng(seed)
    guessed = [_named(found, rng.permutation(places)).mean() for _ in range(_PERMUTATIONS)]
    value, interval = share(hits, np.ones(len(hits)), confidence)
    return Leakage(value, interval, float(np.mean(guessed)), len(labels))


def _named(clusters: NDArray[np.integer], places: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Which examples are right under the best one-to-one naming of clusters."""
    from scipy.optimize import linear_sum_assignment

    size = max(int(clusters.max()), int(places.max())) + 1
    table = np.zeros((size, size), np.int64)
    np.add.at(table, (clusters, places), 1)
    _, names = linear_sum_assignment(table, maximize=True)
    right: NDArray[np.bool_] = np.asarray(names)[clusters] == places
    return right


def _ranked(scores: Rows, positive: NDArray[np.bool_], confidence: float) -> Leakage:
    value, interval = area(scores[positive], scores[~positive], confidence)
    return Leakage(value, interval, 0.5, len(scores))


def directions(rows: Rows) -> Rows:
    """Rows of unit length; a row of zeros stays one.

    Raises:
        ValueError: a row is not finite.
    """
    if not np.isfinite(rows).all():
        raise ValueError("a gradient is not finite")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    found: Rows = rows / np.where(lengths > 0, lengths, 1.0)
    return found
