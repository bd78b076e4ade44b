"""How the clients' half of a split model is trained: the settings, and one step by the optimiser that they choose.

What a step's gradient comes from is not known here (`clients.split.local`), nor what a request is (`trainer`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt
from torch import Tensor

from clients.trainers.adamw import AdamW
from clients.trainers.sgd import SGD


@dataclass(frozen=True)
class SplitSteps(AdamW):
    """Settings and steps of the clients' half.

    Attributes:
        optimizer: `adamw`, or `sgd` with `momentum`; of both halves, each with its own moments.
        noise: standard deviation of Gaussian noise on activations, in units of the median token's root mean square; 0
            for none. It hinders who looks at activations, and promises no ε.
        nopeek: weight of the distance correlation between tokens and activations in the clients' loss (Vepakomma et
            al. 2020, "NoPeek"); 0 for none.
        auxiliary_steps: q, mini-batches between two exchanges that clients train on alone, by a head of their own that
            learns to give the server's gradients (`clients.split.auxiliary`); 0 waits for the server at every step.
        auxiliary_lr: learning rate of that head's alignment.
        alignments: its steps at each exchange.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    noise: Annotated[float, Ge(0)] = 0.0
    nopeek: Annotated[float, Ge(0)] = 0.0
    auxiliary_steps: Annotated[int, Ge(0)] = 0
    auxiliary_lr: Annotated[float, Gt(0)] = 0.1
    alignments: Annotated[int, Ge(1)] = 5

    def __post_init__(self) -> None:
        if self.optimizer == "adamw":
            super().__post_init__()
        if self.worker_momentum:
            raise ValueError("worker_momentum: the clients' half knows no whole update")

    def with_lr(self, lr: float | None) -> Self:
        """The same trainer with another learning rate; None for the same one."""
        return self if lr is None else replace(self, lr=lr)

    def moments(self, start: Tensor) -> Tensor | None:  # type: ignore[override]  # none, where it is SGD
        """As the optimiser's."""
        return super().moments(start) if self.optimizer == "adamw" else SGD.moments(self, start)

    def step(
        self,
        parameters: Tensor,
        gradient: Tensor,
        start: Tensor,
        correction: Tensor | None,
        velocity: Tensor | None,
    ) -> None:
        """As the optimiser's."""
        rule = AdamW.step if self.optimizer == "adamw" else SGD.step
        rule(self, parameters, gradient, start, correction, velocity)
