"""Sums of clipped per-example gradients of a resident model, by Opacus' hooks.

Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1: Σᵢ gᵢ·min(1, C/‖gᵢ‖₂). Two ways to the same
sum. With every gᵢ in memory: batch × d numbers. Or by ghost clipping (Li et al. 2022, "Large Language Models Can Be
Strong Differentially Private Learners", §4): norms from each layer's inputs and output gradients alone, then a
second backward pass on the losses times their factors, with no more memory than plain training.

Hooks are on the module only while its examples are summed, and leave no trace. Opacus can't look into nn.RNN, nn.LSTM
and nn.GRU: its own layers of the same mathematics stand in for them meanwhile, on the very same parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clients.resident import ResidentModel
from clients.tasks import Task

_HAIR = 1 - 2.0**-17
"""How much shorter than C a clipped gradient is made, so that rounding of float32 norms can't lift it above."""


Finish = Callable[[Tensor], Tensor]
"""From each example's factor, (batch,), to the sum."""


class ClippedSum(Protocol):
    """Σᵢ gᵢ·min(1, C/‖gᵢ‖₂) over the examples of a batch."""

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The sum, (p,) float32 over the trained parameters in the order of `trained`; zero for no examples."""


def trained(model: ResidentModel) -> list[Tensor]:
    """The travelling parameters that are not frozen."""
    return [parameter for parameter in model.travelling if parameter.requires_grad]


@contextmanager
def clipping(
    model: ResidentModel, task: Task, *, norm: float, ghost: bool, most: int
) -> Iterator[ClippedSum]:
    """Hooks a model in train mode; afterwards it is as it was.

    Args:
        model: on its device.
        task: gives each example's loss.
        norm: C.
        ghost: norms first, by ghost clipping; otherwise all gradients of up to `most` examples are in memory.
        most: examples at a time.

    Raises:
        NotImplementedError: Opacus can't hook this model.
    """
    with _recurrent(model.module), _as_it_was(model.module), warnings.catch_warnings():
        # The first layer's inputs want no gradient; Opacus takes the one with regard to its output.
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        hooks = _hooks(model.module, ghost)
        try:
            yield _Sums(model, task, hooks, norm=norm, ghost=ghost, most=most)
        finally:
            hooks.cleanup()
            for parameter in trained(model):
                parameter.grad = None


def _hooks(module: nn.Module, ghost: bool) -> Any:
    from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
    from opacus.grad_sample.gsm_base import OPACUS_PARAM_MONKEYPATCH_ATTRS

    kind: Any = GradSampleHooksFastGradientClipping if ghost else GradSampleHooks

    class Hooks(kind):  # type: ignore[misc]
        def rearrange_grad_samples(self, *, module: nn.Module, **given: Any) -> tuple[Any, Any]:
            inputs, gradients = super().rearrange_grad_samples(module=module, **given)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                # Autograd gives the padding's row no gradient, Opacus does.
                padding = (inputs[0] == module.padding_idx).unsqueeze(-1)
                gradients = gradients.masked_fill(padding, 0)
            return inputs, gradients

    try:
        return Hooks(module, loss_reduction="sum")
    except BaseException:
        # Half a set of hooks: those that were added are listed on the module.
        for handle in getattr(module, "autograd_grad_sample_hooks", []):
            handle.remove()
        for parameter in module.parameters():
            for name in OPACUS_PARAM_MONKEYPATCH_ATTRS:
                vars(parameter).pop(name, None)
        raise


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Whatever is set on a layer meanwhile is gone afterwards: Opacus leaves lists of activations, and flags."""
    kept = [(layer, dict(vars(layer))) for layer in module.modules()]
    try:
        yield
    finally:
        for layer, before in kept:
            vars(layer).clear()
            vars(layer).update(before)


class _Sums:
    """Sums over a hooked model."""

    def __init__(
        self, model: ResidentModel, task: Task, hooks: Any, *, norm: float, ghost: bool, most: int
    ) -> None:
        self._module, self._task, self._hooks = model.module, task, hooks
        self._trained = trained(model)
        self._norm, self._most = norm, most
        self._sum = self._by_ghost if ghost else self._by_samples
        self._nothing = torch.zeros_like(torch.cat([p.detach().reshape(-1) for p in self._trained]))

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        total = self._nothing.clone()
        for begin in range(0, len(targets), self._most):
            part = slice(begin, begin + self._most)
            total += self._of(inputs[part], targets[part])
        return total

    def _of(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self._forget()
        losses = self._task.losses(self._module(inputs), targets)
        if losses.shape != targets.shape[:1]:
            raise ValueError(
                f"{type(self._task).__name__}.losses gives {tuple(losses.shape)}: one loss an example is needed"
            )
        norms, finish = self._sum(losses)
        finite = norms.isfinite()
        if not finite.all():
            # An example without a gradient adds none; nor may it spoil the others'.
            self._forget()
            if not finite.any():
                return self._nothing
            return self._of(inputs[finite], targets[finite])
        total = finish((self._norm * _HAIR / norms).clamp(max=1.0))
        self._forget()
        return total

    def _by_samples(self, losses: Tensor) -> tuple[Tensor, Finish]:
        losses.sum().backward()  # type: ignore[no-untyped-call]
        samples = [self._sample(parameter, len(losses)) for parameter in self._trained]
        norms = _norm([torch.linalg.vector_norm(sample, dim=1) for sample in samples])
        return norms, lambda factors: torch.cat([factors @ sample for sample in samples])

    def _sample(self, parameter: Tensor, count: int) -> Tensor:
        """One parameter's gradient of each example, (count, its size)."""
        sample: object = getattr(parameter, "grad_sample", None)
        if sample is None and parameter.grad is None:
            return parameter.new_zeros(count, parameter.numel())  # no loss depends on it
        if not isinstance(sample, Tensor) or len(sample) != count:
            raise NotImplementedError("a parameter is used outside the layer that holds it")
        return sample.reshape(count, -1)

    def _by_ghost(self, losses: Tensor) -> tuple[Tensor, Finish]:
        losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        norms = _norm([self._norms(parameter, len(losses)) for parameter in self._trained])

        def finish(factors: Tensor) -> Tensor:
            for parameter in self._trained:
                parameter.grad = None
            self._hooks.disable_hooks()
            try:
                (factors * losses).sum().backward()  # type: ignore[no-untyped-call]
            finally:
                self._hooks.enable_hooks()
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trained]
            return torch.cat([gradient.reshape(-1) for gradient in found])

        return norms, finish

    def _norms(self, parameter: Tensor, count: int) -> Tensor:
        """Norm of one parameter's gradient of each example, (count,)."""
        norms: object = getattr(parameter, "_norm_sample", None)
        if norms is None and parameter.grad is None:
            return parameter.new_zeros(count)
        if not isinstance(norms, Tensor) or norms.shape != (count,):
            raise NotImplementedError(
                "a layer that ghost clipping knows no norm for: set client.ghost=false"
            )
        return norms

    def _forget(self) -> None:
        """What the batch before has left must not stand in for what this one lacks."""
        for parameter in self._trained:
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter._norm_sample = None  # type: ignore[attr-defined]


def _norm(parts: Sequence[Tensor]) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(torch.stack(list(parts)), dim=0)
    return norms


@contextmanager
def _recurrent(module: nn.Module) -> Iterator[None]:
    """Opacus' recurrent layers in the place of torch's, on the same parameters."""
    found = [
        (parent, name, layer)
        for parent in module.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.RNNBase) and any(p.requires_grad for p in layer.parameters())
    ]
    try:
        for parent, name, layer in found:
            parent._modules[name] = _counterpart(layer)
        yield
    finally:
        for parent, name, layer in found:
            parent._modules[name] = layer


def _counterpart(layer: nn.RNNBase) -> nn.Module:
    from opacus.layers import DPGRU, DPLSTM, DPRNN

    kinds: dict[type[nn.Module], Any] = {nn.RNN: DPRNN, nn.LSTM: DPLSTM, nn.GRU: DPGRU}
    further = {"nonlinearity": layer.nonlinearity} if isinstance(layer, nn.RNN) else {}
    with torch.device("meta"):
        other: Any = kinds[type(layer)](
            layer.input_size,
            layer.hidden_size,
            num_layers=layer.num_layers,
            bias=layer.bias,
            batch_first=layer.batch_first,
            dropout=layer.dropout,
            bidirectional=layer.bidirectional,
            proj_size=layer.proj_size,
            **further,
        )
    for inner, outer in other.old_to_new.items():
        cell, _, name = inner.rpartition(".")
        other.get_submodule(cell)._parameters[name] = getattr(layer, outer)
        other._parameters[outer] = getattr(layer, outer)
    return other.train(layer.training)  # type: ignore[no-any-return]
