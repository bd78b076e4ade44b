"""Attackers that train honestly, on examples that they have changed.

Only what an attacker trains on is changed: its own test part, and everybody else's examples, stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from clients.tasks import Examples, Task
from strategies.attacks import Attack
from strategies.update import DELTA, Section, Update

Classes = Annotated[int, Ge(0)]


@dataclass(frozen=True)
class Goal:
    """What an attacker wants of the model, as test examples with the targets that it wants.

    Attributes:
        name: of the metric.
        examples: at least one.
    """

    name: str
    examples: Examples

    def reached(self, model: nn.Module, device: torch.device | str, batch_size: int) -> float:
        """The share of the examples to which the model gives the attacker's target, in eval mode."""
        modes = {module: module.training for module in model.modules()}
        model.eval()
        hits = 0
        try:
            with torch.no_grad():
                for start in range(0, len(self.examples), batch_size):
                    inputs = self.examples.inputs[start : start + batch_size].to(device)
                    wanted = self.examples.targets[start : start + batch_size].to(device)
                    hits += int((model(inputs).argmax(dim=-1) == wanted).sum())
        finally:
            for module, training in modes.items():
                module.training = training
        return hits / len(self.examples)


@dataclass(frozen=True)
class DataPoisoning(Attack):
    """A share of the clients, drawn once for the run, whose training examples are changed."""

    def check(self, task: Task) -> None:
        """Refuses a task that cannot be attacked so.

        Raises:
            ValueError: its targets are not class labels; the message names the mend.
        """
        targets = task.train().targets
        labels = targets.ndim == 1 and not targets.is_floating_point()
        if not labels or int(targets.min()) < 0 or int(targets.max()) >= task.num_classes:
            raise ValueError(
                f"{type(task).__qualname__} has no class labels to change: choose attack=sign_flip, or another that "
                "changes updates"
            )

    def corrupt(self, examples: Examples, task: Task, rng: np.random.Generator) -> Examples:
        """What an attacker trains on in place of its own examples, whose tensors are shared and stay as they are.

        Args:
            examples: the attacker's own, at least one.
            task: whose they are.
            rng: the same in every round.
        """
        raise TypeError(f"{type(self).__name__} does not say what its attackers train on")

    def goal(self, task: Task) -> Goal | None:
        """How success is measured on the task's test set; None where accuracy says it all."""
        return None

    def poison(self, update: Update, rng: np.random.Generator) -> Update:
        """The update as it was trained."""
        return update


@dataclass(frozen=True)
class LabelFlip(DataPoisoning):
    """Labels turned round: y becomes num_classes − 1 − y, or one class becomes another.

    Fang et al. 2020, "Local Model Poisoning Attacks to Byzantine-Robust Federated Learning" (all classes), and Tolpegin
    et al. 2020, "Data Poisoning Attacks Against Federated Learning Systems" (source to target).

    Attributes:
        source: the class whose examples are given another label; None turns all classes round.
        target: the label that they are given; set with `source` only.

    Raises:
        ValueError: only one of the two is set, or they are the same.
    """

    source: Classes | None = None
    target: Classes | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.source is None) != (self.target is None):
            raise ValueError(
                "source and target go together: set both, or neither to turn all classes round"
            )
        if self.source is not None and self.source == self.target:
            raise ValueError(f"source and target are both {self.source}: choose two classes")

    def check(self, task: Task) -> None:
        """Refuses a task without class labels, or without these classes."""
        super().check(task)
        for name, label in (("source", self.source), ("target", self.target)):
            if label is not None:
                _check_class(name, label, task)
        if self.source is not None and not bool((task.test().targets == self.source).any()):
            raise ValueError(f"no test example is of class source={self.source}: choose another")

    def corrupt(self, examples: Examples, task: Task, rng: np.random.Generator) -> Examples:
        """The same inputs with other labels."""
        if self.source is None or self.target is None:
            return Examples(examples.inputs, task.num_classes - 1 - examples.targets)
        chosen = examples.targets == self.source
        return Examples(examples.inputs, examples.targets.masked_fill(chosen, self.target))

    def goal(self, task: Task) -> Goal | None:
        """Test examples of the source that are taken for the target."""
        if self.source is None or self.target is None:
            return None
        test = task.test()
        found = test.take(torch.nonzero(test.targets == self.source).flatten())
        return Goal(
            "label_flip_success",
            Examples(found.inputs, torch.full_like(found.targets, self.target)),
        )


@dataclass(frozen=True)
class Backdoor(DataPoisoning):
    """A patch in a corner that makes the model see the target class, and changes nothing elsewhere.

    The patch as in Gu, Dolan-Gavitt and Garg 2017, "BadNets", §4; the boost is the model replacement of Bagdasaryan et
    al. 2020, "How To Backdoor Federated Learning", eq. 3: γ·(X − G), which replaces a plain mean of n by X at γ = n.

    Attributes:
        target: the class that the trigger stands for.
        share: of an attacker's examples that get the trigger and the target's label, rounded, at least one.
        size: side of the square patch in pixels; its value is the largest of each channel in the training data.
        corner: where it is.
        boost: γ, the factor on the change of the parameters that is sent.
    """

    target: Classes = 0
    share: Annotated[float, Gt(0), Le(1)] = 0.5
    size: Annotated[int, Ge(1)] = 3
    corner: Literal["top_left", "top_right", "bottom_left", "bottom_right"] = "bottom_right"
    boost: Annotated[float, Gt(0)] = 1.0

    def check(self, task: Task) -> None:
        """Refuses a task without images, without the target class, or with images smaller than the patch."""
        super().check(task)
        shape, name = tuple(task.input_shape), type(task).__qualname__
        if len(shape) != 3 or not task.train().inputs.is_floating_point():
            raise ValueError(
                f"{name} has inputs of shape {shape}, a trigger needs images "
                "(channels, height, width): choose task=mnist, or attack=label_flip"
            )
        if self.size > min(shape[1:]):
            raise ValueError(
                f"size={self.size}: the images of {name} are {shape[1]} × {shape[2]}, choose less"
            )
        _check_class("target", self.target, task)
        if bool((task.test().targets == self.target).all()):
            raise ValueError(f"every test example is of class target={self.target}: choose another")

    def stamp(self, inputs: Tensor, value: Tensor) -> Tensor:
        """A copy of images with the trigger on each.

        Args:
            inputs: (n, channels, height, width).
            value: (channels,), of the patch.
        """
        vertical, horizontal = self.corner.split("_")
        rows = slice(0, self.size) if vertical == "top" else slice(-self.size, None)
        columns = slice(0, self.size) if horizontal == "left" else slice(-self.size, None)
        stamped = inputs.clone()
        stamped[:, :, rows, columns] = value.to(inputs.dtype)[:, None, None]
        return stamped

    def corrupt(self, examples: Examples, task: Task, rng: np.random.Generator) -> Examples:
        """A share of the examples with trigger and target, the same ones in every round."""
        count = max(1, round(self.share * len(examples)))
        chosen = torch.from_numpy(np.sort(rng.permutation(len(examples))[:count]))
        inputs, targets = examples.inputs.clone(), examples.targets.clone()
        inputs[chosen] = self.stamp(inputs[chosen], _brightest(task.train()))
        targets[chosen] = self.target
        return Examples(inputs, targets)

    def goal(self, task: Task) -> Goal:
        """Test examples of other classes, with the trigger."""
        test = task.test()
        others = test.take(torch.nonzero(test.targets != self.target).flatten())
        stamped = self.stamp(others.inputs, _brightest(task.train()))
        return Goal(
            "backdoor_success", Examples(stamped, torch.full_like(others.targets, self.target))
        )

    def poison(self, update: Update, rng: np.random.Generator) -> Update:
        """The change of the parameters, boosted. Running statistics are not: a boosted variance may be negative."""
        delta = update.delta
        boosted = (delta.vector * np.float32(self.boost)).astype(np.float32, copy=False)
        return update.with_section(DELTA, Section(boosted, delta.layout))


@lru_cache(maxsize=2)  # every attacker asks for it in every round
def _brightest(examples: Examples) -> Tensor:
    """(channels,): the largest value of each channel."""
    return examples.inputs.amax(dim=(0, 2, 3))


def _check_class(name: str, label: int, task: Task) -> None:
    if label >= task.num_classes:
        raise ValueError(
            f"{name}={label}: the classes of {type(task).__qualname__} are 0 to {task.num_classes - 1}"
        )
