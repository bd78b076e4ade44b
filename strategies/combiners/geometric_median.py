"""The geometric median (RFA; Pillutla, Kakade & Harchaoui 2022, "Robust Aggregation for Federated Learning").

Smoothed Weiszfeld (Algorithm 2): z ← Σ βᵢxᵢ / Σ βᵢ with βᵢ = 1 / max(ν, ‖xᵢ − z‖). Every z is a weighted mean of the
updates, so its distances follow from their Gram matrix: however many steps are taken, the updates are read twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Gt

from strategies.combiners.distances import Matrix
from strategies.combiners.robust import Robust, Side
from strategies.combiners.rows import Rows
from strategies.update import Vector

_SETTLED = 1e-10
"""Weights that move no more than this, of a sum of 1, have converged: far below what float32 can tell."""


def weiszfeld(gram: Matrix, smoothing: float, iterations: int) -> Matrix:
    """The weights of the updates in their geometric median, (n,) float64 with sum 1."""
    weights = np.full(len(gram), 1 / len(gram))
    norms = gram.diagonal()
    for _ in range(iterations):
        squared = norms - 2 * (gram @ weights) + weights @ gram @ weights
        pulls = 1 / np.maximum(smoothing, np.sqrt(np.maximum(squared, 0)))
        before, weights = weights, pulls / pulls.sum()
        if np.abs(weights - before).max() < _SETTLED:
            break
    return weights


@dataclass
class GeometricMedian(Robust):
    """The point of least total distance to all updates. Needs n > 2f.

    Attributes:
        smoothing: ν, a distance below which an update pulls no harder.
        iterations: of Weiszfeld's algorithm at most; it ends when the weights have settled.
    """

    smoothing: Annotated[float, Gt(0)] = 1e-6
    iterations: Annotated[int, Ge(1)] = 100

    label: ClassVar[str] = "the geometric median"

    def least(self, f: int) -> int:
        """2f + 1: its breakdown point is one half."""
        return 2 * f + 1

    def combine(self, rows: Rows, f: int, side: Side) -> Vector:
        """See `Robust.combine`."""
        return rows.combined(weiszfeld(rows.gram, self.smoothing, self.iterations))
