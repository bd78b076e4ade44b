"""FedProx's local objective (Li et al. 2020, "Federated Optimization in Heterogeneous Networks", eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from clients.trainers.sgd import SGD, FitJob
from strategies.presets import PROXIMAL_MU
from strategies.update import Layout


@dataclass(frozen=True)
class Proximal(SGD):
    """SGD on the loss plus μ/2·‖w − w_t‖²; μ = 0 is FedAvg.

    Attributes:
        mu: μ, unless the request's configuration holds `proximal-mu`.
    """

    mu: Annotated[float, Ge(0)] = 0.01

    stackable: ClassVar[bool] = True

    def correction(self, job: FitJob, layout: Layout) -> Tensor:
        """Μ, (1,)."""
        sent = job.settings.get(PROXIMAL_MU, self.mu)
        return torch.tensor([float(sent) if isinstance(sent, int | float) else self.mu])

    def correct(
        self, gradient: Tensor, parameters: Tensor, start: Tensor, correction: Tensor | None
    ) -> None:
        """Adds μ(w − w_t), the proximal term's gradient."""
        assert correction is not None  # each job has one
        gradient.addcmul_(parameters - start, correction)
