"""Training the clients' half on a small head of its own, which learns to give the gradients that the server would give.

S. Nair et al. 2025, "FSL-SAGE: Accelerating Federated Split Learning via Smashed Activation Gradient Estimation", ICML:
clients step on the gradient of an auxiliary model's loss, without waiting for the server; now and then they send
activations, and align the auxiliary model so that its gradient of these is the one that comes back. Between two
alignments nothing travels.

The head here is linear on the mean of the activation over a text's tokens. It knows batches and gradients, nothing of
turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clients.split.coding import mask_of
from clients.tasks import Task


@dataclass(frozen=True)
class Seen:
    """A batch whose true gradient is known.

    Attributes:
        activation: (b, l, h) float32.
        lengths: tokens of each text, (b,) long.
        targets: (b, …) long.
        gradient: of the mean loss by the activation, as the server gave it, (b, l, h) float32.
    """

    activation: Tensor
    lengths: Tensor
    targets: Tensor
    gradient: Tensor


def auxiliary_loss(
    heads: nn.ModuleDict, task: Task, activation: Tensor, lengths: Tensor, targets: Tensor
) -> Tensor:
    """The task's loss, a scalar, of heads on the mean of an activation, (b, l, h), over real tokens."""
    weights = mask_of(lengths, activation.shape[1]).unsqueeze(2).to(activation.dtype)
    mean = (activation * weights).sum(dim=1) / weights.sum(dim=1)
    return task.loss(torch.cat([head(mean) for head in heads.values()], dim=1), targets)


def misalignment(heads: nn.ModuleDict, task: Task, batches: Sequence[Seen]) -> Tensor:
    """Mean over batches of ‖∇ₐ − ∇ₛ‖² / ‖∇ₛ‖², a scalar with a gradient to the heads.

    ∇ₐ and ∇ₛ are the auxiliary loss's and the server's gradients of the activation (Nair et al. 2025, the alignment
    objective, here relative to what is aligned to, so that one learning rate serves all scales).
    """
    terms = []
    for seen in batches:
        given = seen.activation.detach().requires_grad_()
        loss = auxiliary_loss(heads, task, given, seen.lengths, seen.targets)
        (found,) = torch.autograd.grad(loss, given, create_graph=True)
        size = seen.gradient.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        terms.append((found - seen.gradient).square().sum() / size)
    return torch.stack(terms).mean()
