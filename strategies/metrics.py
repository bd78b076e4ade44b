"""Weighted means of what clients report in clear.

A number that is not finite, or that would carry the sum past a float, is left out, as is its weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

Sums = dict[str, tuple[float, float]]
"""For each metric Σ wᵢ·mᵢ and Σ wᵢ."""


def add_metrics(sums: Sums, metrics: Mapping[str, float], weight: float) -> None:
    """Adds one client's metrics to the running sums."""
    for name, value in metrics.items():
        total, weights = sums.get(name, (0.0, 0.0))
        total += weight * value
        if math.isfinite(total):
            sums[name] = (total, weights + weight)


def mean_metrics(sums: Sums) -> dict[str, float]:
    """The means."""
    return {name: total / weights for name, (total, weights) in sums.items()}
