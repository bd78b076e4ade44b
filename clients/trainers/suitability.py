"""Whether clients should be trained together: what forbids it, and what makes it pointless.

The answer depends on the trainer, the model and the task alone, never on a clock: the same run gives the same model.
Nothing here starts a thread, takes a gradient or touches a GPU, after which no worker process could be forked.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clients.resident import ResidentModel, arrays_of
from clients.stacked import StackedModel
from clients.tasks import Task
from clients.threads import one_thread
from clients.trainers.sgd import SGD

MOST_PARAMETERS: Final = 1 << 16
MOST_OPERATIONS: Final = 32_000_000
"""Of one step, forward and backward. Past either, a step is bound by arithmetic and memory rather than by calls, and
stacking clients gains nothing: multilayer perceptrons break even at about 80,000 parameters, convolutional networks at
about 70 million operations (`python benchmarks/batching.py`)."""

_LOOP: Final = ("fit", "fit_one", "_descend")


def obstacle(trainer: object, module: nn.Module, task: Task) -> str | None:
    """Why these clients can't be trained together; None where a stack of two just ran forward.

    Args:
        trainer: how a client fits.
        module: the network, on the CPU; it is used up.
        task: gives the loss, and an example.
    """
    if not isinstance(trainer, SGD):
        return f"{type(trainer).__name__} is not built on clients.trainers.SGD"
    own = [name for name in _LOOP if getattr(type(trainer), name) is not getattr(SGD, name)]
    if own:
        return f"{type(trainer).__name__} has a training loop of its own ({own[0]})"
    if not vars(type(trainer)).get("stackable", False):
        return f"{type(trainer).__name__} does not say that it is stackable"
    if type(task).loss is not Task.loss or {"loss", "losses"} & vars(task).keys():
        return f"{type(task).__name__} has a `loss` of its own: only `losses`, one for each example, can be stacked"
    if next(module.buffers(), None) is not None:
        return f"{type(module).__name__} has buffers, which training may change"
    if trainer.amp and trainer.torch_device.startswith("cuda"):
        return "client.amp is on"
    return _tried(module, task)


def drawback(trainer: SGD, module: nn.Module, task: Task) -> str | None:
    """Why training together would not be faster; None where it is."""
    size = sum(parameter.numel() for parameter in module.parameters())
    if size > MOST_PARAMETERS:
        return f"{size:,} parameters are more than the {MOST_PARAMETERS:,} up to which it is faster"
    with one_thread(), FlopCounterMode(display=False) as counter, torch.no_grad():
        module(task.train().inputs[:1])
    operations = 3 * counter.get_total_flops() * trainer.batch_size
    if operations > MOST_OPERATIONS:
        return (
            f"{operations / 1e6:.0f} million operations a step are more than the"
            f" {MOST_OPERATIONS / 1e6:.0f} million up to which it is faster"
        )
    return None


def _tried(module: nn.Module, task: Task) -> str | None:
    """Runs a stack of two copies on a few examples, and compares it with the module on each example by itself."""
    examples = task.train().take(range(min(3, len(task.train()))))
    module.train()
    before = [dict(vars(layer)) for layer in module.modules()]
    state = torch.get_rng_state()
    try:
        with one_thread(), torch.no_grad():
            model = ResidentModel(module, arrays_of(module))
            stack = StackedModel(model, copies=2)
            stack.parameters.copy_(stack.rows(model.flat))
            outputs, _ = stack.forward(torch.stack([examples.inputs] * 2))
            found = task.losses(outputs.flatten(0, 1), torch.cat([examples.targets] * 2))
            alone = [
                task.losses(module(examples.inputs[i : i + 1]), examples.targets[i : i + 1])
                for i in range(len(examples))
            ]
            same = torch.allclose(found.view(2, -1), torch.cat(alone), rtol=1e-3, atol=1e-5)
    except Exception as error:  # torch raises what it likes for what it can't stack
        if "random" in str(error):
            return "the model draws random numbers as it trains (dropout)"
        if "vmap" in str(error):
            return "torch.func.vmap can't stack this model (control flow that depends on data, as in recurrent models)"
        reason = str(error).splitlines()[0] if str(error) else ""
        return f"torch can't stack this model: {type(error).__name__}: {reason[:160]}"
    if not torch.equal(state, torch.get_rng_state()):
        return "the model or its loss draws random numbers as it trains"
    if any(_changed(layer, kept) for layer, kept in zip(module.modules(), before, strict=True)):
        return "the model changes itself as it runs"
    if not same:
        return "an example's loss depends on the others of its batch"
    return None


def _changed(layer: nn.Module, kept: dict[str, object]) -> bool:
    now = vars(layer)
    return now.keys() != kept.keys() or any(now[name] is not kept[name] for name in kept)
