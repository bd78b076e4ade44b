"""SCAFFOLD's client half (Karimireddy et al. 2020, "SCAFFOLD", Algorithm 1, option II)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.trainers.sgd import SGD, FitJob
from strategies.update import CONTROL, DELTA, Layout, Section


@dataclass(frozen=True)
class Scaffold(SGD):
    """SGD on g − cᵢ + c; afterwards cᵢ⁺ = cᵢ − c + (x − yᵢ)/(K·η), and Δcᵢ travels beside the update.

    Raises:
        ValueError: momentum or gradient clipping is set; with either, (x − yᵢ)/(K·η) is no mean gradient.
    """

    sections: ClassVar[frozenset[str]] = frozenset({DELTA, CONTROL})
    stackable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum or self.max_grad_norm is not None:
            raise ValueError(
                "client=scaffold needs momentum=0 and max_grad_norm=null: its control variate is a mean gradient"
            )

    def correction(self, job: FitJob, layout: Layout) -> Tensor:
        """C − cᵢ, (d,)."""
        size = layout.size
        return torch.from_numpy(_control(job.broadcast, size) - _control(job.state, size))

    def correct(
        self, gradient: Tensor, parameters: Tensor, start: Tensor, correction: Tensor | None
    ) -> None:
        """Adds c − cᵢ."""
        assert correction is not None  # each job has one
        gradient.add_(correction)

    def conclude(
        self, job: FitJob, delta: Section, steps: float
    ) -> tuple[dict[str, Section], dict[str, NDArray[np.float32]]]:
        """Δcᵢ = −c − Δ/(K·η), and cᵢ⁺ to remember."""
        size = delta.layout.size
        change = -_control(job.broadcast, size) - delta.vector / np.float32(steps * self.lr)
        return {CONTROL: Section(change, delta.layout)}, {
            CONTROL: _control(job.state, size) + change
        }


def _control(vectors: object, size: int) -> NDArray[np.float32]:
    """A control variate of this size; zero where there is none yet."""
    vector = vectors.get(CONTROL) if hasattr(vectors, "get") else None
    return np.zeros(size, np.float32) if vector is None else vector
