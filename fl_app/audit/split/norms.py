"""How long gradients are with and without what protects, and how far they still point the same way.

A defence that leaves a gradient's length and direction as they were has changed nothing for training, and nothing for
attacks that read them. No paper's measure: a ratio and a cosine. Arrays only: this file knows no model and no run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Norms:
    """Gradients of some batches, each computed twice.

    Attributes:
        before: (k,) L2 norms without the defence.
        after: (k,) with it.
        cosine: (k,) between the two; 0 where either is zero.
    """

    before: NDArray[np.float64]
    after: NDArray[np.float64]
    cosine: NDArray[np.float64]

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types, by batch."""
        return {
            name: [float(f"{value:.6g}") for value in getattr(self, name)]
            for name in ("before", "after", "cosine")
        }


def compared(before: NDArray[np.float64], after: NDArray[np.float64]) -> Norms:
    """Rows, (k, d), of the same batches, without and with a defence.

    Raises:
        ValueError: the two have different shapes.
    """
    if before.shape != after.shape:
        raise ValueError(f"gradients {before.shape} and {after.shape}: of the same batches")
    lengths = [np.linalg.norm(rows, axis=1) for rows in (before, after)]
    product = lengths[0] * lengths[1]
    cosine = (before * after).sum(axis=1) / np.where(product > 0, product, 1.0)
    return Norms(lengths[0], lengths[1], cosine)
