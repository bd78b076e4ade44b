"""The geometric median (RFA; Pillutla, Kakade & Harchaoui 2022, "Robust Aggregation for Federated Learning").

Smoothed Weiszfeld (Algorithm 2): z ← Σ βᵢxᵢ / Σ βᵢ with βᵢ = 1 / max(ν, ‖xᵢ − z‖). Every z is a weighted mean of the
updates, so its distances follow from their Gram matrix: however many steps are taken, the updates are read twice.

The first z is not the mean of all, from which a huge lie keeps z for as many steps as its length has digits when nearly
half of the updates lie, but the mean of the majority that lies closest together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Gt

from strategies.combiners.distances import Matrix, most_central, squared_distances
from strategies.combiners.robust import Robust, Side
from strategies.combiners.rows import Rows
from strategies.update import Vector

_SETTLED = 1e-7
"""Steps of z shorter than this, of the radius of the closest majority, are below what float32 can tell."""


def weiszfeld(gram: Matrix, smoothing: float, iterations: int) -> Matrix:
    """The weights of the updates in their geometric median, (n,) float64 with sum 1.

    Args:
        gram: inner products of the updates about any point, (n, n).
        smoothing: ν, a distance below which an update pulls no harder.
        iterations: steps at most.
    """
    distances = squared_distances(gram)
    central, majority = most_central(distances), len(gram) // 2 + 1
    closest = np.argsort(distances[central], kind="stable")[:majority]
    weights = np.zeros(len(gram))
    weights[closest] = 1 / majority
    least = _SETTLED**2 * distances[central, closest[-1]]
    norms = gram.diagonal()
    for _ in range(iterations):
        squared = norms - 2 * (gram @ weights) + weights @ gram @ weights
        pulls = 1 / np.maximum(smoothing, np.sqrt(np.maximum(squared, 0)))
        step = pulls / pulls.sum() - weights
        weights = weights + step
        if step @ gram @ step <= least:
            break
    return weights


@dataclass
class GeometricMedian(Robust):
    """The point of least total distance to all updates. Needs n > 2f.

    Attributes:
        smoothing: ν, a distance below which an update pulls no harder.
        iterations: of Weiszfeld's algorithm at most; it ends when they have become too short to tell.
    """

    smoothing: Annotated[float, Gt(0)] = 1e-6
    iterations: Annotated[int, Ge(1)] = 1000

    label: ClassVar[str] = "the geometric median"

    def least(self, f: int) -> int:
        """2f + 1: its breakdown point is one half."""
        return 2 * f + 1

    def combine(self, rows: Rows, f: int, side: Side) -> Vector:
        """See `Robust.combine`."""
        return rows.combined(weiszfeld(rows.gram, self.smoothing, self.iterations))
