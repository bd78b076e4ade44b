"""Whether a task's data are fit to be trained on: labels, inputs, what both sets have in common, clients' parts.

Pure functions of a task and its cut. What a task checks of itself (`clients.tasks.task.check_task`) is not said twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from torch import Tensor

from clients.tasks import Examples, FederatedData, Task
from clients.tasks.task import UNLABELLED, check_task
from fl_app.checks.check import Finding, together

_MOST_LEAKED: Final = 0.5
"""Of the test examples: where more are among the training examples, the test tells nothing."""
_FEW: Final = 10
"""Examples of a client below which its gradient is hardly more than noise."""
_LISTED: Final = 5


def labels(task: Task) -> Finding:
    """Whether labels are in range, in both sets, and each class is there.

    Raises:
        ValueError, TypeError: what the task says of its training data is untrue.
    """
    check_task(task)
    train, test = task.train(), task.test()
    if not len(test):
        return Finding(
            "failed", "there are no test examples", "give the task a test set, or a fold"
        )
    if train.targets.is_floating_point() or (train.targets.ndim > 1 and not task.goals):
        return Finding(
            "ok", f"{len(train):,} to train on, {len(test):,} to test on; no class labels"
        )
    found = [Finding("ok", f"{len(train):,} to train on, {len(test):,} to test on")]
    for column, (name, classes) in enumerate(_goals(task)):
        found += _of_goal(name, classes, _column(train, column), _column(test, column))
    return together(found)


def _goals(task: Task) -> list[tuple[str, int]]:
    return list(task.goals.items()) if task.goals else [("", task.num_classes)]


def _column(examples: Examples, goal: int) -> np.ndarray:
    targets = examples.targets
    chosen = targets if targets.ndim == 1 else targets[:, goal]
    labelled: np.ndarray = chosen[chosen != UNLABELLED].numpy()
    return labelled


def _of_goal(goal: str, classes: int, train: np.ndarray, test: np.ndarray) -> Iterator[Finding]:
    of = f" of {goal}" if goal else ""
    for name, column in (("train", train), ("test", test)):
        wrong = column[(column < 0) | (column >= classes)]
        if len(wrong):
            yield Finding(
                "failed",
                f"{name}() holds label {int(wrong[0])}{of}, and classes are 0 to {classes - 1}"
                f" ({len(wrong):,} such)",
                "mend the labels, or num_classes",
            )
            return
    counts = np.bincount(train, minlength=classes)
    yield Finding("ok", f"{classes} classes{of} of {counts.min():,} to {counts.max():,} examples")
    if len(absent := np.flatnonzero(counts == 0)):
        yield Finding(
            "failed" if len(absent) == classes else "warning",
            f"{_listed(absent, 'class', 'classes')}{of}: no training example",
            "leave the class out, or give examples of it",
        )
    unseen = np.setdiff1d(np.unique(train), np.unique(test))
    if len(unseen):
        yield Finding(
            "warning",
            f"{_listed(unseen, 'class', 'classes')}{of}: no test example, nothing says how it is learnt",
            "take another task.fold, or a larger test set",
        )


def inputs(task: Task) -> Finding:
    """Whether inputs are finite, of the same shape in both sets, and not all the same."""
    found = []
    for name, examples in (("train", task.train()), ("test", task.test())):
        values = examples.inputs
        shape = tuple(values.shape[1:])
        if shape != tuple(task.input_shape):
            said = f"{name}() holds inputs of shape {shape}, and input_shape is {tuple(task.input_shape)}"
            return Finding("failed", said, "bring them to one shape")
        if values.is_floating_point():
            bad = _rows_not_finite(values)
            if len(bad):
                return Finding(
                    "failed",
                    f"{name}() holds NaN or infinity in {len(bad):,} inputs, the first is row {bad[0]}",
                    "fill the values in, or drop the rows",
                )
        if name == "test" and task.vocab_size is not None and len(values):
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= task.vocab_size:
                said = (
                    f"test() holds tokens from {low} to {high}, and vocab_size is {task.vocab_size}"
                )
                return Finding("failed", said, "make both sets' tokens by one tokenizer")
        found.append(f"{name} {_span(values)}")
    first = task.train().inputs
    if len(first) > 1 and bool((first[:1] == first).all()):
        return Finding("failed", "all training inputs are the same", "look at how they are read")
    kind = "tokens" if task.vocab_size is not None else "inputs"
    return Finding("ok", f"{kind} of shape {tuple(task.input_shape)}, finite: {', '.join(found)}")


def _rows_not_finite(values: Tensor) -> np.ndarray:
    finite = torch.isfinite(values.flatten(1)).all(dim=1)
    rows: np.ndarray = torch.nonzero(~finite).flatten().numpy()
    return rows


def _span(values: Tensor) -> str:
    return f"{float(values.min()):.4g} to {float(values.max()):.4g}" if len(values) else "none"


def leaks(task: Task) -> Finding:
    """Test examples whose very input is among the training examples, by its hash."""
    train, test = task.train(), task.test()
    seen = set(_digests(train.inputs))
    shared = sum(digest in seen for digest in _digests(test.inputs))
    if not shared:
        return Finding("ok", f"none of {len(test):,} test inputs is among the training inputs")
    part = shared / len(test)
    return Finding(
        "failed" if part > _MOST_LEAKED else "warning",
        f"{shared:,} of {len(test):,} test inputs ({part:.1%}) are training inputs, too:"
        " the test accuracy is too good by them",
        "leave the duplicates out of one of the two",
    )


def _digests(values: Tensor) -> Iterator[bytes]:
    rows = values.flatten(1).contiguous().numpy()
    for row in rows:
        yield hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def clients(data: FederatedData, batch_size: int) -> Finding:
    """What each client has: none without examples, how few the smallest has, whether its classes are many.

    Args:
        data: the cut.
        batch_size: of a client's mini-batches.
    """
    sizes, counts = data.sizes, data.label_counts()
    smallest = int(sizes.argmin())
    empty = np.flatnonzero(sizes == 0)
    if len(empty):
        said = f"{_listed(empty, 'client', 'clients')}: no example to train on"
        return Finding("failed", said, "lower num_clients, or raise task.min_partition_size")
    said = (
        f"{data.num_clients} clients of {sizes.min():,} to {sizes.max():,} examples (median"
        f" {np.median(sizes):,.0f}); the smallest is client {smallest}"
    )
    found = [Finding("ok", said)]
    few = np.flatnonzero(sizes < min(_FEW, batch_size))
    if len(few):
        found.append(
            Finding(
                "warning",
                f"{_listed(few, 'client', 'clients')}: fewer than {min(_FEW, batch_size)}",
                "lower num_clients, or raise task.min_partition_size or task.alpha",
            )
        )
    if counts.shape[1] > 1:
        held = (counts > 0).sum(axis=1)
        found.append(Finding("ok", f"{held.min()} to {held.max()} classes a client"))
    if data.unassigned:
        found.append(
            Finding(
                "warning",
                f"{data.unassigned:,} training examples are nobody's",
                "take another task.partition, or more clients",
            )
        )
    return together(found)


def _listed(numbers: np.ndarray, one: str, many: str) -> str:
    """`class 3`, `classes 3, 4`, or the first few and how many more there are."""
    shown = ", ".join(str(number) for number in numbers[:_LISTED])
    more = f" and {len(numbers) - _LISTED} more" if len(numbers) > _LISTED else ""
    return f"{one if len(numbers) == 1 else many} {shown}{more}"
