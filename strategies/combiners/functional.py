"""Aggregation rules as pure functions over a matrix of updates: (n, d) float32 in, (d,) float32 out.

They do not change their input and know nothing of clients, messages or models.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.combiners.summation import CompensatedSum
from strategies.update import Vector


def mean(updates: NDArray[np.float32], *, weights: ArrayLike | None = None) -> Vector:
    """The (weighted) arithmetic mean (McMahan et al. 2017, Algorithm 1).

    Args:
        updates: (n, d) float32, n ≥ 1.
        weights: (n,) non-negative numbers with a positive sum; equal ones when None.

    Returns:
        (d,) float32. The sum is compensated: its error relative to Σ|w·x| is that of one rounding, for any order.

    Raises:
        ValueError: there is no update, or the weights are not n numbers as described.
    """
    matrix = np.asarray(updates, np.float32)
    if matrix.ndim != 2 or not len(matrix):
        raise ValueError(
            f"updates should be a matrix (n, d) with n >= 1, not of shape {matrix.shape}"
        )
    scale = np.ones(len(matrix)) if weights is None else np.asarray(weights, np.float64)
    if (
        scale.shape != (len(matrix),)
        or not np.isfinite(scale).all()
        or (scale < 0).any()
        or not scale.sum() > 0
    ):
        raise ValueError(f"weights should be {len(matrix)} finite numbers >= 0, not all 0")
    total = CompensatedSum(matrix.shape[1])
    for weight, row in zip(scale, matrix, strict=True):
        total.add(row, float(weight))
    return total.mean(float(scale.sum())).astype(np.float32)
