"""Bulyan (El Mhamdi, Guerraoui & Rouault 2018, "The Hidden Vulnerability of Distributed Learning in Byzantium", §4).

θ = n − 2f updates are taken one after the other, each Krum's choice among those that are left; then, in each
coordinate, the mean of the β = θ − 2f values nearest to the median of the θ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from strategies.combiners.distances import Matrix, squared_distances
from strategies.combiners.order import mean_around_median
from strategies.combiners.robust import Robust, Side
from strategies.combiners.rows import Rows
from strategies.update import Vector


def selected(distances: Matrix, f: int) -> NDArray[np.intp]:
    """Bulyan's first step: the θ = n − 2f rows that Krum chooses one after the other, in ascending order.

    With m rows left, a score sums the distances to m − f − 2 others; to one, where that number is smaller, which the
    paper leaves open for the last choices. Ties by row.
    """
    n = len(distances)
    order = np.argsort(distances + np.diag(np.full(n, np.inf)), axis=1, kind="stable")[:, :-1]
    ascending = np.take_along_axis(distances, order, axis=1)
    left = np.ones(n, bool)
    for remaining in range(n, 2 * f, -1):
        there = left[order]
        near = there & (np.cumsum(there, axis=1) <= max(1, remaining - f - 2))
        scores = np.where(left, (ascending * near).sum(axis=1), np.inf)
        left[np.argmin(scores)] = False
    return np.flatnonzero(~left)


@dataclass
class Bulyan(Robust):
    """Krum's choices, trimmed coordinate by coordinate. Needs n ≥ 4f + 3."""

    label: ClassVar[str] = "Bulyan"
    by_coordinate: ClassVar[bool] = True
    by_distance: ClassVar[bool] = True

    def least(self, f: int) -> int:
        """4f + 3 (El Mhamdi et al., §4)."""
        return 4 * f + 3

    def combine(self, rows: Rows, f: int, side: Side) -> Vector:
        """See `Robust.combine`."""
        chosen = selected(squared_distances(rows.gram), f)
        return mean_around_median(rows.chosen(chosen), rows.n - 4 * f, threads=side.threads)
