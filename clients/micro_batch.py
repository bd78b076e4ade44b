"""How many of a batch's examples a device goes through at a time: as many as its free memory holds.

A training step is run on two small batches, and the bytes that autograd saves for the backward pass are counted
(`torch.autograd.graph.saved_tensors_hooks`). They grow in proportion to the batch, so two points tell the line, and no
large batch has to be tried on a device that may not hold it; of texts the longest are taken. What is alive for a moment
beside them is taken to be half as much again, which tests hold against all that torch makes; kernels' own workspace is
what the fifth that is left free is for. To count each tensor instead would have torch import its compiler: 70 MB, on
the very devices that have none to spare.

Gradients of the pieces add up to the batch's (`clients.trainers.course`), so that a device of little memory learns the
same up to rounding, only more slowly; batch normalisation and dropout see the pieces (docs/retries.md). Since what is
free is asked before each job, the same seed may give other bits on a machine that is busier.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.free_memory import free_bytes
from clients.resident import ResidentModel
from clients.retrying import free_memory
from clients.tasks import Examples, Task
from clients.trainers import SGD, DpSgd, FitJob

log = logging.getLogger(__name__)

SHARE: Final = 0.8
"""Of what is free that a batch may take."""
_BESIDE: Final = 1.5
"""Bytes alive at once for each that is saved: gradients of activations, and results on their way."""
_TRIED: Final = (2, 4)
"""Examples of the two batches that are measured; of a single one batch normalisation knows no variance."""


@dataclass(frozen=True)
class Need:
    """Bytes that a training step keeps alive beside the model, by the number of examples.

    Attributes:
        fixed: whatever the batch.
        each: for each example.
    """

    fixed: float
    each: float

    def most(self, budget: float) -> int:
        """The most examples whose step stays within a budget of bytes; at least 1, since less can't be tried."""
        if self.each <= 0:
            return 2**31
        return max(1, int((budget - self.fixed) // self.each))


def measure(model: ResidentModel, task: Task, job: FitJob) -> Need:
    """What a step of this model takes on examples such as these; the model is left at the job's weights.

    Args:
        model: resident, on the CPU.
        task: whose loss is taken.
        job: with two examples at least.
    """
    model.load(job.arrays)
    model.module.train()
    examples = job.examples.take(_longest(job.examples.inputs, task.padding_id, max(_TRIED)))
    small, large = (min(tried, len(examples)) for tried in _TRIED)
    with torch.random.fork_rng(devices=[]):
        least, most = (_saved(model, task, examples, count) for count in (small, large))
    model.load(job.arrays)  # running statistics have gone on
    each = (most - least) / (large - small) if large > small else least / small
    gradients = 2 * model.flat.nbytes  # by array, and as a vector or a sum of pieces
    return Need(gradients + max(0.0, least - each * small), _BESIDE * each)


def _longest(inputs: Tensor, padding: int | None, count: int) -> NDArray[np.int64]:
    """Rows of the examples that may take the most: texts may be cut to the longest of their batch."""
    if padding is None:
        return np.arange(min(count, len(inputs)))
    lengths = (inputs != padding).flatten(1).sum(1)
    return lengths.topk(min(count, len(inputs))).indices.numpy()


def _saved(model: ResidentModel, task: Task, examples: Examples, count: int) -> int:
    """Bytes of a batch, and of all that is saved for its backward pass beside the weights."""
    inputs, targets = examples.inputs[:count].clone(), examples.targets[:count].clone()
    weights = [*model.module.parameters(), *model.module.buffers(), inputs, targets]
    known = {tensor.untyped_storage().data_ptr() for tensor in weights}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = task.loss(model.module(inputs), targets)
    del loss  # until here all that was saved is alive, so no two of them have one address
    return sum(saved.values()) + inputs.nbytes + targets.nbytes


class FreeMemory:
    """Says how many examples fit, before each job; measures once for each model and shape of examples.

    Args:
        trainer: whose batches are asked for.
        cap: bytes that may be free at most, by the word of the device's operator; None for what is free.
        free: bytes that are free.
    """

    def __init__(
        self, trainer: SGD, cap: int | None = None, *, free: Callable[[], int] = free_bytes
    ) -> None:
        self._trainer, self._cap, self._free = trainer, cap, free
        self._needs: WeakKeyDictionary[ResidentModel, dict[tuple[int, ...], Need]] = (
            WeakKeyDictionary()
        )

    def __call__(self, job: FitJob, model: ResidentModel, task: Task) -> int | None:
        """Examples at a time; None where the whole batch fits, or on a GPU, which tells when it is full."""
        batch = self._trainer.at_once(job)
        if model.flat.device.type != "cpu" or batch < 2:
            return None
        need = self._need(job, model, task)
        fits = need.most(SHARE * self._room())
        if fits < batch:
            free_memory()  # of what earlier jobs left with the C library, the next may have all
            fits = need.most(SHARE * self._room())
        if fits >= batch:
            return None
        log.info("of a batch of %d examples, %d are trained at a time: more don't fit", batch, fits)
        return fits

    def _room(self) -> int:
        free = self._free()
        return free if self._cap is None else min(free, self._cap)

    def _need(self, job: FitJob, model: ResidentModel, task: Task) -> Need:
        known: Mapping[tuple[int, ...], Need] = self._needs.setdefault(model, {})
        shape = tuple(job.examples.inputs.shape[1:])
        if shape not in known:
            need = measure(model, task, job)
            trainer = self._trainer
            if isinstance(trainer, DpSgd) and not trainer.ghost:
                # Each example's own gradient, and its clipped copy.
                need = Need(need.fixed, need.each + 2 * model.flat.nbytes)
            self._needs[model][shape] = need
        return known[shape]
