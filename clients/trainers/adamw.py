"""AdamW on the client: what adapters of pretrained models are usually trained with.

I. Loshchilov and F. Hutter 2019, "Decoupled Weight Decay Regularization", arXiv:1711.05101, Algorithm 2. Its moments
are forgotten between rounds, as FedAvg's clients are stateless.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from clients.trainers.sgd import SGD


@dataclass(frozen=True)
class AdamW(SGD):
    """Minibatch AdamW over a client's own data.

    Attributes:
        lr: learning rate η.
        weight_decay: λ; each step takes η·λ of the weights away, past the moments.
        betas: β₁ and β₂, the decay of the two moments.
        eps: added to the root of the second moment.
    """

    lr: Annotated[float, Gt(0)] = 1e-3
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.999)
    eps: Annotated[float, Gt(0)] = 1e-8

    stackable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum:
            raise ValueError(f"momentum = {self.momentum:g}: AdamW has betas in its place")

    @property
    def _is_plain(self) -> bool:
        return False

    def moments(self, start: Tensor) -> Tensor:
        """Both moments and the number of steps, (2, d + 1): the last column of the first row counts."""
        return start.new_zeros(2, start.numel() + 1)

    def step(
        self,
        parameters: Tensor,
        gradient: Tensor,
        start: Tensor,
        correction: Tensor | None,
        velocity: Tensor | None,
    ) -> None:
        """One step in place, as `torch.optim.AdamW` defines it; arguments as `SGD.step`'s, of one client (d,)."""
        assert velocity is not None
        self.correct(gradient, parameters, start, correction)
        if self.max_grad_norm is not None:
            norm = torch.linalg.vector_norm(gradient)
            gradient.mul_(torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0))
        (first, second), (beta1, beta2) = velocity[:, :-1], self.betas
        velocity[0, -1] += 1
        count = float(velocity[0, -1])
        parameters.mul_(1 - self.lr * self.weight_decay)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = second.sqrt().div_((1 - beta2**count) ** 0.5).add_(self.eps)
        parameters.addcdiv_(first, scale, value=-self.lr / (1 - beta1**count))
