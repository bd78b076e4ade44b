"""Krum and Multi-Krum.

Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", §4 and §5.

An update's score is the sum of the squared distances to its n − f − 2 nearest others; Krum takes the update with the
smallest score, Multi-Krum the mean of the m best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from strategies.combiners.distances import Matrix, squared_distances
from strategies.combiners.robust import Robust, Side
from strategies.combiners.rows import Rows
from strategies.update import Vector


def scores(distances: Matrix, f: int) -> Matrix:
    """Σ of each row's n − f − 2 smallest squared distances to others, (n,) float64 (Blanchard et al., eq. in §4)."""
    n = len(distances)
    others = distances[~np.eye(n, dtype=bool)].reshape(n, n - 1)
    return np.asarray(np.sort(others, axis=1)[:, : n - f - 2].sum(axis=1))


def best(distances: Matrix, f: int, keep: int) -> NDArray[np.intp]:
    """The `keep` rows of smallest score, ties by row."""
    return np.sort(np.argsort(scores(distances, f), kind="stable")[:keep])


@dataclass
class Krum(Robust):
    """The one update that lies closest to its neighbours. Needs n ≥ 2f + 3."""

    label: ClassVar[str] = "Krum"
    discounts: ClassVar[bool] = True

    def least(self, f: int) -> int:
        """2f + 3 (Blanchard et al., Proposition 1)."""
        return 2 * f + 3

    def combine(self, rows: Rows, f: int, side: Side) -> Vector:
        """See `Robust.combine`."""
        return _mean_of_best(rows, f, 1, side)


@dataclass
class MultiKrum(Robust):
    """The mean of the `keep` updates of smallest score. Needs n ≥ 2f + 3.

    Attributes:
        keep: m; None for n − f.
    """

    keep: Annotated[int, Ge(1)] | None = None

    label: ClassVar[str] = "Multi-Krum"
    discounts: ClassVar[bool] = True

    def least(self, f: int) -> int:
        """2f + 3, and no fewer than f + `keep`: more than n − f can't all be honest."""
        return max(2 * f + 3, 0 if self.keep is None else f + self.keep)

    def combine(self, rows: Rows, f: int, side: Side) -> Vector:
        """See `Robust.combine`."""
        return _mean_of_best(rows, f, rows.n - f if self.keep is None else self.keep, side)


def _mean_of_best(rows: Rows, f: int, keep: int, side: Side) -> Vector:
    """The best by distances between updates as they are; staleness weighs among those that are chosen."""
    weights = np.zeros(rows.n)
    weights[best(squared_distances(rows.gram), f, keep)] = 1 / keep
    if side.discounts is not None:
        weights *= side.discounts
    return rows.combined(weights)
