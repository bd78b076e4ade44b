"""One torch model that stays in memory and takes the place of many clients in turn.

Its travelling parameters lie in one flat tensor, so that loading a model, forming an update, a proximal term or a
control variate is one operation each, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from strategies.parts import returned
from strategies.update import BUFFERS, COUNTERS, DELTA, Layout, Section

Arrays = Mapping[str, NDArray[np.generic]]
Shapes = Mapping[str, tuple[int, ...]]
"""Names of arrays in their order, and the shape of each."""


@runtime_checkable
class ModuleMaker(Protocol):
    """Makes the module that holds arrays of given names and shapes, where clients have parts of a model."""

    def key(self, shapes: Shapes, settings: Mapping[str, object]) -> Hashable:
        """What tells one of its modules from another."""
        ...

    def __call__(self, shapes: Shapes, settings: Mapping[str, object]) -> nn.Module:
        """A module with those arrays, given the settings of the request that they came with."""
        ...


@dataclass(frozen=True)
class OneModule:
    """The same module for all requests."""

    module: nn.Module

    def key(self, shapes: Shapes, settings: Mapping[str, object]) -> Hashable:
        """There is one."""
        return None

    def __call__(self, shapes: Shapes, settings: Mapping[str, object]) -> nn.Module:
        """It."""
        return self.module


def arrays_of(module: nn.Module) -> dict[str, NDArray[np.generic]]:
    """The state of a module by name, on the CPU; a tensor that two names share (tied weights) stands once."""
    seen: set[int] = set()
    arrays: dict[str, NDArray[np.generic]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            arrays[name] = tensor.detach().cpu().numpy().copy()
    return arrays


def buffers_of(module: nn.Module) -> list[str]:
    """Names of the module's float buffers: running statistics and the like."""
    return [name for name, buffer in module.named_buffers() if buffer.is_floating_point()]


class ResidentModel:
    """A module whose travelling state can be swapped in one copy.

    Args:
        module: the architecture; its float parameters that travel must be float32. It is changed in place.
        arrays: what the server sends, by name: decides what travels. Every other parameter is frozen.
        device: where the module lives.

    Attributes:
        module: the torch module.
        flat: the travelling parameters, (d,) float32 on the device.
        travelling: the same as the module has them, views of `flat` in the order of the layout; the module may have
            frozen some of them (`requires_grad=False`).

    Raises:
        ValueError: the server sends an array that the module does not have, or that has another shape or dtype.
    """

    def __init__(self, module: nn.Module, arrays: Arrays, device: str = "cpu") -> None:
        self.module = module.to(device)
        parameters = dict(self.module.named_parameters())
        buffers = dict(self.module.named_buffers())
        for name, array in arrays.items():
            tensor = parameters.get(name, buffers.get(name))
            if tensor is None or tuple(tensor.shape) != array.shape:
                found = "no such array" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise ValueError(
                    f"the server sends {name!r} of shape {array.shape}, this model has {found}: "
                    f"are both ends configured with the same model?"
                )
        self._layout = Layout.of({n: a for n, a in arrays.items() if n in parameters})
        self._buffers = {n: buffers[n] for n in arrays if n in buffers}
        # What does not travel must not go from one client to the next either.
        self._home = {n: b.detach().clone() for n, b in buffers.items() if n not in arrays}
        self._buffers_at_home = {n: buffers[n] for n in self._home}
        self._float_layout = Layout.of(
            {n: arrays[n] for n, b in self._buffers.items() if b.is_floating_point()}
        )
        self._count_layout = Layout.of(
            {n: arrays[n] for n, b in self._buffers.items() if not b.is_floating_point()}
        )
        self.flat = torch.empty(self._layout.size, device=device)
        self._gradient: Tensor | None = None
        self._adopt(parameters)
        self.travelling: list[Tensor] = [parameters[name] for name in self._layout.names]
        self._sent = np.empty(self._layout.size, np.float32)
        self._sent_buffers: dict[str, NDArray[np.generic]] = {}

    def _adopt(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Makes every travelling parameter a view of the flat tensor, and freezes the others."""
        bounds = zip(
            self._layout.names, self._layout.offsets[:-1], self._layout.offsets[1:], strict=True
        )
        ranges = {name: slice(begin, end) for name, begin, end in bounds}
        for name, parameter in parameters.items():
            part = ranges.get(name)
            if part is None:
                parameter.requires_grad_(False)
                continue
            if parameter.dtype != torch.float32:
                raise ValueError(
                    f"parameter {name!r} travels and is {parameter.dtype}: only float32 can be trained"
                )
            self.flat[part] = parameter.data.reshape(-1)
            parameter.data = self.flat[part].view_as(parameter)

    @property
    def layout(self) -> Layout:
        """Names and shapes within the flat parameters."""
        return self._layout

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Gradients of a scalar, in the shapes of `travelling`; zero where it does not depend on one, or it is frozen.

        Fresh tensors: adding to ones that are kept would be two passes more over the model at each step.
        """
        trained = [parameter for parameter in self.travelling if parameter.requires_grad]
        found = iter(torch.autograd.grad(loss, trained, allow_unused=True))
        each = (next(found) if p.requires_grad else None for p in self.travelling)
        return [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(self.travelling, each, strict=True)
        ]

    def pulled(
        self,
        outputs: Sequence[Tensor],
        weights: Sequence[Tensor | None],
        *,
        beside: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor | None], Tensor]:
        """Gradients of weighted outputs: of tensors beside the parameters, and of these as one new (d,) tensor.

        Args:
            outputs: scalars, or tensors that have a weight of their own shape.
            weights: one an output, None for 1.
            beside: tensors that are no parameters; None comes for one that nothing depends on.
        """
        trained = [parameter for parameter in self.travelling if parameter.requires_grad]
        found = torch.autograd.grad(outputs, [*beside, *trained], weights, allow_unused=True)
        rest = iter(found[len(beside) :])
        each = [next(rest) if p.requires_grad else None for p in self.travelling]
        flat = [
            torch.zeros_like(parameter).view(-1) if gradient is None else gradient.reshape(-1)
            for parameter, gradient in zip(self.travelling, each, strict=True)
        ]
        return list(found[: len(beside)]), torch.cat(flat) if flat else torch.empty(0)

    @property
    def trains(self) -> bool:
        """Whether anything that travels is trained."""
        return any(parameter.requires_grad for parameter in self.travelling)

    def flattened(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients as one (d,) tensor in the layout's order, which the next call overwrites."""
        if self._gradient is None:
            self._gradient = torch.empty_like(self.flat)
        torch.cat([gradient.reshape(-1) for gradient in gradients], out=self._gradient)
        return self._gradient

    def load(self, arrays: Arrays) -> None:
        """Takes up the state that the server sent.

        Raises:
            ValueError: arrays are missing or have other shapes than the first ones had.
        """
        for name, view in self._layout.views(self._sent).items():
            array = arrays.get(name)
            if array is None or array.shape != view.shape:
                raise ValueError(f"array {name!r} is missing or has changed its shape")
            view[...] = array
        self.flat.copy_(torch.from_numpy(self._sent))
        self._sent_buffers = {name: np.array(arrays[name]) for name in self._buffers}
        for name, buffer in self._buffers.items():
            buffer.data.copy_(torch.from_numpy(self._sent_buffers[name]))
        for name, buffer in self._buffers_at_home.items():
            buffer.data.copy_(self._home[name])

    def sections(self) -> dict[str, Section]:
        """What has changed since `load`: the parameters' section, and those of the buffers where there are any."""
        delta = self.flat.cpu().numpy() - self._sent
        back = returned(self._layout)
        if back != self._layout:
            delta = back.flatten(self._layout.views(delta))
        sections = {DELTA: Section(delta, back)}
        for name, layout in ((BUFFERS, self._float_layout), (COUNTERS, self._count_layout)):
            if layout.names:
                sections[name] = Section(layout.flatten(self._changes(layout.names)), layout)
        return sections

    def _changes(self, names: Sequence[str]) -> dict[str, NDArray[np.generic]]:
        return {n: self._buffers[n].detach().cpu().numpy() - self._sent_buffers[n] for n in names}
