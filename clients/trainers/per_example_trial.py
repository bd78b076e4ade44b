"""Whether a model's gradients can be clipped one example at a time: a trial on inputs that are nobody's.

A model that couples the examples of a batch has no per-example gradients, and a layer whose gradient is only half seen
is clipped wrongly: either would break the sensitivity that the noise is measured by (Abadi et al. 2016, "Deep Learning
with Differential Privacy", §3.1). Three random inputs of the task's shape are clipped together and, by autograd alone,
one by one. No example of a client's own is touched, so a refusal tells nothing of them.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from clients.resident import ResidentModel
from clients.tasks import Examples, Task
from clients.trainers.per_example import clipping, trained

_ROWS = 3
_passed: WeakKeyDictionary[nn.Module, set[bool]] = WeakKeyDictionary()


def require_per_example(
    model: ResidentModel, task: Task, examples: Examples, *, ghost: bool
) -> None:
    """Tries a module once for each way of clipping.

    Args:
        model: loaded; it is as it was afterwards.
        task: gives each example's loss.
        examples: whose shapes and kinds of numbers are taken, and nothing else.
        ghost: as in `clipping`.

    Raises:
        ValueError: the model can't be trained with client=dp_sgd; says why, and what can.
    """
    ways = _passed.setdefault(model.module, set())
    if ghost in ways:
        return
    _refuse_statistics(model.module)
    if type(task).loss is not Task.loss:
        raise ValueError(
            f"client=dp_sgd clips each example's gradient, and {type(task).__name__} has a `loss` of its own:"
            " give it `losses`, one an example"
        )
    inputs, targets = _nobodys(model, task, examples)
    modes = [(layer, layer.training) for layer in model.module.modules()]
    buffers = [buffer.clone() for buffer in model.module.buffers()]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            state = torch.get_rng_state()
            model.module(inputs)
            random = not torch.equal(state, torch.get_rng_state())
        if not all(map(torch.equal, buffers, model.module.buffers())):
            raise ValueError(
                "client=dp_sgd can't train this model: its buffers change as it trains, and would travel without"
                " noise. Use layers without running statistics, nn.GroupNorm say"
            )
        if random:
            _without_dropout(model.module)
        _compare(model, task, inputs, targets, ghost)
    finally:
        for layer, mode in modes:
            layer.training = mode
    ways.add(ghost)


def _refuse_statistics(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"client=dp_sgd can't train layer {name!r}, {type(layer).__name__}: it makes an example's gradient"
                " depend on the others of its batch. Use nn.GroupNorm in its place"
            )


def _nobodys(model: ResidentModel, task: Task, examples: Examples) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the shapes that this client's examples have."""
    generator = torch.Generator().manual_seed(1)
    shape = (_ROWS, *examples.inputs.shape[1:])
    if examples.inputs.is_floating_point():
        inputs = torch.randn(shape, generator=generator, dtype=examples.inputs.dtype)
    else:
        inputs = torch.randint(task.vocab_size or 2, shape, generator=generator)
        inputs[inputs == task.padding_id] = (task.padding_id + 1) % (task.vocab_size or 2)
    targets = examples.targets.new_zeros(_ROWS, *examples.targets.shape[1:])
    device = model.flat.device
    return inputs.to(device), targets.to(device)


def _without_dropout(module: nn.Module) -> None:
    """Random numbers differ between a batch and its examples alone. Layers with parameters stay in train mode."""
    for layer in module.modules():
        if next(layer.parameters(recurse=False), None) is None:
            layer.training = False


def _compare(
    model: ResidentModel, task: Task, inputs: Tensor, targets: Tensor, ghost: bool
) -> None:
    """Clips to half the least norm, so that each norm counts as much as each direction.

    Raises:
        ValueError: together and one by one differ, or Opacus fails.
    """
    alone = torch.stack(
        [_gradient(model, task, inputs[i : i + 1], targets[i : i + 1]) for i in range(_ROWS)]
    )
    norms = torch.linalg.vector_norm(alone, dim=1)
    norm = max(0.5 * float(norms.min()), 1e-6)
    expected = (norm / norms.clamp(min=norm)) @ alone
    try:
        with clipping(model, task, norm=norm, ghost=ghost, most=_ROWS) as clipped_sum:
            found = clipped_sum(inputs, targets)
    except Exception as error:  # Opacus raises what it likes for what it can't do
        reason = str(error).splitlines()[0] if str(error) else ""
        raise ValueError(
            f"client=dp_sgd can't train this model: {type(error).__name__}: {reason[:300]}"
        ) from error
    if not float((found - expected).norm()) <= 1e-3 * norm * _ROWS:
        raise ValueError(
            "client=dp_sgd can't train this model: an example's gradient in a batch is not what it is alone"
            " (normalisation over the batch, say: use nn.GroupNorm), or Opacus doesn't see all of a layer's use"
            f" (tied weights{', which client.ghost=false can do' if ghost else ''})"
        )


def _gradient(model: ResidentModel, task: Task, inputs: Tensor, targets: Tensor) -> Tensor:
    loss = task.losses(model.module(inputs), targets).sum()
    gradients = torch.autograd.grad(loss, trained(model), allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(parameter).reshape(-1) if gradient is None else gradient.reshape(-1)
            for parameter, gradient in zip(trained(model), gradients, strict=True)
        ]
    )
