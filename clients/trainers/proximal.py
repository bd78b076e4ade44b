"""FedProx's local objective (Li et al. 2020, "Federated Optimization in Heterogeneous Networks", eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from torch import Tensor

from clients.resident import ResidentModel
from clients.trainers.sgd import SGD, FitJob
from strategies.presets import PROXIMAL_MU


@dataclass(frozen=True)
class Proximal(SGD):
    """SGD on the loss plus μ/2·‖w − w_t‖²; μ = 0 is FedAvg.

    Attributes:
        mu: μ, unless the request's configuration holds `proximal-mu`.
    """

    mu: Annotated[float, Ge(0)] = 0.01

    def correct(
        self, model: ResidentModel, start: Tensor, correction: Tensor | None, job: FitJob
    ) -> None:
        """Adds μ(w − w_t), the proximal term's gradient."""
        sent = job.settings.get(PROXIMAL_MU, self.mu)
        mu = float(sent) if isinstance(sent, int | float) else self.mu
        model.gradient.add_(model.flat.detach() - start, alpha=mu)
