"""Copies of one model, each with weights of its own, that run forward and backward as one.

A small client's local step is a handful of operations on tiny tensors, and torch spends its time between them. With
the weights of many clients stacked, `torch.func.vmap` makes each operation one for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, vmap

from clients.resident import ResidentModel
from strategies.update import Layout


class StackedModel:
    """C copies of a model's travelling parameters, (C, d) float32, and their gradients.

    Within a row, weights of linear layers lie transposed: then their gradients come out of the backward pass in the
    order in which they are needed, where a copy between the two orders took a fifth of a step. `rows` and `vectors`
    translate from and to the order of the layout.

    Args:
        model: whose module runs; what of it doesn't travel is shared by all copies, and its weights are not touched.
        copies: C.

    Attributes:
        parameters: (C, d) on the model's device.
        gradient: (C, d), of the first copies as far as `backward` was told of.
    """

    def __init__(self, model: ResidentModel, copies: int) -> None:
        self._layout = model.layout
        self._transposed = _linear_weights(model.module) & set(self._layout.names)
        device = model.flat.device
        self.parameters = torch.empty(copies, self._layout.size, device=device)
        self.gradient = torch.empty_like(self.parameters)
        self._trained = [parameter.requires_grad for parameter in model.travelling]
        self._forward = vmap(_call(model.module, self._layout.names))

    def rows(self, vectors: Tensor) -> Tensor:
        """(…, d) in the layout's order as new rows in the order of `parameters`."""
        return self._reordered(vectors, self._transposed)

    def vectors(self, rows: Tensor) -> NDArray[np.float32]:
        """Rows (C, d) as a new array (C, d) in the layout's order."""
        found: NDArray[np.float32] = (
            self._reordered(rows, self._transposed, back=True).cpu().numpy()
        )
        return found

    def forward(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Outputs of the first k copies on inputs (k, batch, …), and their weights, for `backward`."""
        views = self._views(self.parameters[: len(inputs)])
        weights = [v.requires_grad_(trains) for v, trains in zip(views, self._trained, strict=True)]
        return self._forward(weights, inputs), weights

    def backward(self, loss: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Gradient (k, d) of a scalar with regard to the copies that `forward` used, in the order of `parameters`.

        Zero for what the scalar does not depend on, and for what the module has frozen.
        """
        leaves = [weight for weight in weights if weight.requires_grad]
        gradients = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
        found = self.gradient[: len(weights[0])]
        for view, trains in zip(self._views(found), self._trained, strict=True):
            gradient = next(gradients) if trains else None
            if gradient is None:
                view.zero_()
            else:
                view.copy_(gradient)
        return found

    def _views(self, rows: Tensor) -> Iterable[Tensor]:
        """The parameters within rows (k, d), each (k, *shape)."""
        for name, shape, part in _parts(self._layout):
            flat = rows[:, part]
            if name in self._transposed:
                yield flat.view(len(rows), shape[1], shape[0]).transpose(1, 2)
            else:
                yield flat.view(len(rows), *shape)

    def _reordered(self, source: Tensor, transposed: set[str], *, back: bool = False) -> Tensor:
        target = torch.empty_like(source)
        for name, shape, part in _parts(self._layout):
            if name in transposed:
                stored = shape[::-1] if back else shape
                ahead = source.shape[:-1]
                matrices = source[..., part].reshape(*ahead, *stored).transpose(-1, -2)
                target[..., part] = matrices.reshape(*ahead, -1)
            else:
                target[..., part] = source[..., part]
        return target


def _call(module: nn.Module, names: Sequence[str]) -> Callable[[Sequence[Tensor], Tensor], Tensor]:
    def call(weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
        output: Tensor = functional_call(module, dict(zip(names, weights, strict=True)), (inputs,))
        return output

    return call


def _linear_weights(module: nn.Module) -> set[str]:
    """Names of the weights of linear layers."""
    return {
        f"{name}.weight" if name else "weight"
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }


def _parts(layout: Layout) -> Iterable[tuple[str, tuple[int, ...], slice]]:
    begins = layout.offsets
    for name, shape, begin in zip(layout.names, layout.shapes, begins, strict=False):
        yield name, shape, slice(begin, begin + prod(shape))
