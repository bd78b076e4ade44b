"""The interface of a task: its data, its loss and its metrics.

A task says what is learnt and on which examples; it knows nothing of clients, rounds or servers.
A project of its own adds one by subclassing `Task` anywhere on the import path and naming the class
in the configuration (``task._target_=their_module.Task``).
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNLABELLED: Final = -100
"""Stands where an example has no label for a goal, or its owner does not train that goal."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and their targets, row by row.

    Attributes:
        inputs: (n, *input_shape), float32 (or long for tokens).
        targets: (n,) long for class labels, (n, G) long where a task has G goals; a task with a loss of its own may
            use another shape.

    Raises:
        ValueError: the two have different numbers of rows.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(
                f"{len(self.inputs)} inputs but {len(self.targets)} targets: "
                "each input needs one target"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, indices: Sequence[int] | np.ndarray | Tensor) -> "Examples":
        """Copy the rows named by `indices`, in their order.

        Args:
            indices: (k,) row numbers from 0 to n - 1.

        Raises:
            IndexError: a row number is outside 0 … n - 1.
        """
        rows = torch.as_tensor(indices, dtype=torch.long)
        return Examples(self.inputs.index_select(0, rows), self.targets.index_select(0, rows))

    def only(self, goal: int) -> "Examples":
        """The same inputs with the labels of one goal: `UNLABELLED` in all columns of (n, G) but this one."""
        targets = torch.full_like(self.targets, UNLABELLED)
        targets[:, goal] = self.targets[:, goal]
        return Examples(self.inputs, targets)


class Task(ABC):
    """Data, loss and metrics of one learning problem, or of several on the same inputs.

    A task with goals asks several questions of each input. Its targets are (n, G), a class label for each goal in the
    order of `goals`, or `UNLABELLED`; the model's output is the logits of all goals side by side in that order.

    Attributes:
        input_shape: shape of one input, without the batch dimension.
        num_classes: length of the model's output for one input; with goals, the sum of their classes.
        goals: by name, how many classes each goal has; empty where there is one question only.
        vocab_size: where inputs are tokens, how many ids there are: 0 to vocab_size - 1.
        padding_id: the id that fills a row up behind its last token.
    """

    input_shape: tuple[int, ...]
    num_classes: int
    goals: Mapping[str, int] = MappingProxyType({})
    vocab_size: int | None = None
    padding_id: int = 0

    @abstractmethod
    def train(self) -> Examples:
        """The training examples: the same ones in the same order in every process.

        Called often; keep the result rather than reading it again.
        """

    @abstractmethod
    def test(self) -> Examples:
        """The central test examples; none of them is among the training examples."""

    def losses(self, output: Tensor, targets: Tensor) -> Tensor:
        """Loss of each example, (batch,) with a gradient; cross-entropy unless overridden.

        With goals, the mean of the cross-entropies of those that the example has a label for; 0 where it has none.

        Args:
            output: (batch, num_classes) float, the model's logits.
            targets: (batch,) long, or (batch, G).
        """
        if not self.goals:
            return F.cross_entropy(output, targets, reduction="none")
        total = torch.stack(
            [
                F.cross_entropy(
                    output[:, logits], targets[:, goal], ignore_index=UNLABELLED, reduction="none"
                )
                for goal, logits in enumerate(self.logits_of().values())
            ]
        ).sum(dim=0)
        return total / (targets != UNLABELLED).sum(dim=1).clamp(min=1)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Loss of a batch, a scalar with a gradient: the mean of `losses`.

        A task whose loss is no mean over examples overrides this one. Its clients are then trained one by one, never
        several at once.

        Args:
            output: (batch, num_classes) float, the model's logits.
            targets: (batch,) long.
        """
        return self.losses(output, targets).mean()

    def metrics(self, output: Tensor, targets: Tensor) -> dict[str, float]:
        """Means over a batch by name, not including the loss; accuracy unless overridden.

        With goals, ``accuracy_<goal>`` of each over the examples that have a label for it, and their mean as
        ``accuracy``; a goal that no example has a label for is left out.

        Args:
            output: (batch, num_classes) float, the model's logits.
            targets: (batch,) long, or (batch, G).
        """
        if not self.goals:
            return {"accuracy": (output.argmax(dim=-1) == targets).float().mean().item()}
        found: dict[str, float] = {}
        for goal, (name, logits) in enumerate(self.logits_of().items()):
            labelled = targets[:, goal] != UNLABELLED
            right = output[labelled, logits].argmax(dim=-1) == targets[labelled, goal]
            if len(right):
                found[f"accuracy_{name}"] = right.float().mean().item()
        return {"accuracy": sum(found.values()) / len(found), **found} if found else {}

    def logits_of(self) -> dict[str, slice]:
        """Where each goal's logits are in the model's output."""
        ends = np.cumsum([0, *self.goals.values()]).tolist()
        return {name: slice(*ends[goal : goal + 2]) for goal, name in enumerate(self.goals)}

    def goal_of(self, client: int) -> str | None:
        """The one goal that a client of a federation trains, in turn; None where the task has no goals."""
        names = tuple(self.goals)
        return names[client % len(names)] if names else None

    def natural_ids(self) -> Sequence[str] | None:
        """Whose each training example is, in the order of `train`; None where nobody's.

        With ids, ``partition=natural`` gives each owner's examples to one client.
        """
        return None


def check_task(task: Task) -> None:
    """Refuse a task whose own statements about its training data are untrue.

    Raises:
        TypeError: `input_shape` or `num_classes` is missing.
        ValueError: the inputs have another shape, there are none, a class label is out of range, or the goals are not
            those of the targets.
    """
    name = f"{type(task).__module__}.{type(task).__qualname__}"
    for attribute, meaning in (("input_shape", "the shape of one input"), ("num_classes", "int")):
        if not hasattr(task, attribute):
            raise TypeError(f"{name} has no attribute {attribute} ({meaning}): set it in the class")
    examples = task.train()
    if not len(examples):
        raise ValueError(f"{name}.train() holds no examples")
    shape = tuple(examples.inputs.shape[1:])
    if shape != tuple(task.input_shape):
        raise ValueError(
            f"{name}.train() holds inputs of shape {shape}, "
            f"but its input_shape is {tuple(task.input_shape)}"
        )
    if task.vocab_size is not None:
        _check_tokens(name, examples.inputs, task.vocab_size)
    if task.goals:
        _check_goals(name, task, examples.targets)
    elif type(task).loss is Task.loss and type(task).losses is Task.losses:
        low, high = int(examples.targets.min()), int(examples.targets.max())
        if low < 0 or high >= task.num_classes:
            raise ValueError(
                f"{name}.train() holds labels from {low} to {high}, "
                f"but its num_classes is {task.num_classes}: labels run from 0 to num_classes - 1"
            )


def _check_goals(name: str, task: Task, targets: Tensor) -> None:
    if odd := [goal for goal in task.goals if not goal.isidentifier()]:
        raise ValueError(f"{name}.goals has {odd[0]!r}: a goal's name is letters, digits and _")
    if odd := [goal for goal in task.goals if hasattr(nn.ModuleDict, goal)]:
        raise ValueError(
            f"{name}.goals has {odd[0]!r}, which a torch module has already: rename it"
        )
    if sum(task.goals.values()) != task.num_classes:
        raise ValueError(
            f"{name}.num_classes is {task.num_classes}, but its goals have "
            f"{sum(task.goals.values())} classes in all: both count the model's logits"
        )
    if targets.dtype != torch.long or targets.shape[1:] != (len(task.goals),):
        raise ValueError(
            f"{name}.train() holds targets of {targets.dtype} and shape {tuple(targets.shape)}: with "
            f"{len(task.goals)} goals they are long, of shape (n, {len(task.goals)})"
        )
    for column, (goal, classes) in zip(targets.unbind(dim=1), task.goals.items(), strict=True):
        labels = column[column != UNLABELLED]
        if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= classes:
            found = f"labels from {labels.min()} to {labels.max()}" if len(labels) else "no labels"
            raise ValueError(
                f"{name}.train() holds {found} for the goal {goal}, which has {classes} classes: labels run from 0 to "
                f"{classes - 1}, or are {UNLABELLED}"
            )


def class_labels(task: Task) -> np.ndarray:
    """What cuts by class look at: the training targets, (n,) for class labels; with goals, the first one's."""
    targets: np.ndarray = task.train().targets.numpy()
    return targets[:, 0] if task.goals else targets


def _check_tokens(name: str, inputs: Tensor, vocab_size: int) -> None:
    low, high = int(inputs.min()), int(inputs.max())
    if inputs.is_floating_point() or low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name}.train() holds {inputs.dtype} from {low} to {high}, but its vocab_size is "
            f"{vocab_size}: tokens are whole numbers from 0 to vocab_size - 1"
        )


def fingerprint(task: Task) -> str:
    """SHA-256, in hex, of a task's data: equal where both sets hold the same examples in the same order."""
    digest = hashlib.sha256()
    for examples in (task.train(), task.test()):
        for tensor in (examples.inputs, examples.targets):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().view(np.uint8).data)
    return digest.hexdigest()


def evaluate(
    model: nn.Module,
    task: Task,
    examples: Examples,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 512,
) -> dict[str, float]:
    """Loss and metrics of `model` on `examples`, without gradients and in eval mode.

    Args:
        model: already on `device`; each module's train or eval mode is as before afterwards.
        task: gives the loss and the metrics.
        examples: at least one.
        device: where the batches go.
        batch_size: examples per forward pass; the result does not depend on it but for rounding.

    Returns:
        ``loss`` and the task's metrics, as means over the examples, and ``num_examples``.

    Raises:
        ValueError: there are no examples, or a metric has a reserved name.
    """
    if not len(examples):
        raise ValueError("cannot evaluate on no examples: a mean of nothing has no value")
    totals: dict[str, float] = {}
    outputs: list[Tensor] = []
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(examples), batch_size):
                targets = examples.targets[start : start + batch_size].to(device)
                output = model(examples.inputs[start : start + batch_size].to(device))
                if (
                    task.goals
                ):  # a batch may lack labels of a goal, whose mean is over all that have one
                    outputs.append(output.cpu())
                means = {} if task.goals else _named(task, output, targets)
                means["loss"] = task.loss(output, targets).item()
                for name, mean in means.items():
                    totals[name] = totals.get(name, 0.0) + mean * len(targets)
    finally:
        for module, training in modes.items():
            module.training = training
    return {
        **(_named(task, torch.cat(outputs), examples.targets.cpu()) if outputs else {}),
        **{name: total / len(examples) for name, total in totals.items()},
        "num_examples": len(examples),
    }


def _named(task: Task, output: Tensor, targets: Tensor) -> dict[str, float]:
    means = task.metrics(output, targets)
    if reserved := means.keys() & {"loss", "num_examples"}:
        raise ValueError(
            f"{type(task).__qualname__}.metrics returns {sorted(reserved)}: "
            "these names are reserved, choose others"
        )
    return means
