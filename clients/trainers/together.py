"""Local SGD of several clients at once: their steps as one call on stacked weights, equal to one client after another.

Clients differ in their number of examples, so in the number of their steps and in the size of their last batch. They
are sorted by steps, so that those who still train are always the first k copies; a batch that is not full repeats a
row with weight 0. Each client's examples come in the order in which its own seed shuffles them, as they do alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clients.resident import ResidentModel
from clients.stacked import StackedModel
from clients.tasks import Task
from clients.trainers.sgd import SGD, Fit, FitJob
from strategies.update import DELTA, Section

_MOST_ROWS = 1 << 21
"""Of a plan, padding included: about 100 MB."""


def fit_together(
    trainer: SGD, jobs: Sequence[FitJob], model: ResidentModel, task: Task
) -> list[Fit | Exception]:
    """Trains all jobs at once; the result of each, or its exception, in their order.

    Equal to `trainer.fit` up to rounding, and to itself bit for bit for the same jobs.

    Raises:
        Exception: whatever torch can't do for several copies of this model (data-dependent control flow, say).
    """
    model.module.train()
    plan = _Plan.of(jobs, trainer.local_epochs, trainer.batch_size)
    jobs = [jobs[index] for index in plan.order]
    device = model.flat.device
    stack = StackedModel(model, len(jobs))
    start = stack.rows(_starts(jobs, model).to(device)).expand_as(stack.parameters)
    stack.parameters.copy_(start)
    correction = _corrections(trainer, jobs, stack, model)
    losses = _descend(trainer, jobs, stack, task, plan, start, correction)
    deltas = stack.vectors(stack.parameters.sub_(start))
    results: list[Fit | Exception] = []
    for index, job in enumerate(jobs):
        try:
            section = Section(deltas[index], model.layout)
            spent = losses[: plan.steps[index], index].tolist()
            results.append(trainer.concluded(job, {DELTA: section}, spent))
        except Exception as error:  # as one by one: this job's alone
            results.append(error)
    return [results[place] for place in np.argsort(plan.order)]


@dataclass(frozen=True)
class _Plan:
    """Who takes which examples at which step, for C clients in descending order of their steps.

    Attributes:
        order: (C,) places among the jobs.
        steps: (C,) of each client.
        active: (T,) clients who still train at each step.
        rows: (T, C, B) rows of all clients' examples, one client's after another's.
        weights: (T, C, B) float32, one over the batch's size, or 0 where there is no example.
    """

    order: np.ndarray
    steps: np.ndarray
    active: list[int]
    rows: Tensor
    weights: Tensor

    @classmethod
    def of(cls, jobs: Sequence[FitJob], epochs: int, batch_size: int) -> _Plan:
        counts = np.array([len(job.examples) for job in jobs])
        order = np.argsort(-counts, kind="stable")
        counts = counts[order]
        width = min(batch_size, int(counts[0]))
        batches = -(-counts // width)  # of an epoch
        steps = epochs * batches
        longest = int(steps[0])
        if len(jobs) * longest * width > _MOST_ROWS:
            raise ValueError(f"a client has {counts[0]:,} examples, too many to pad the others to")
        rows = torch.zeros(len(jobs), longest * width, dtype=torch.long)
        flat, shuffle = rows.view(-1), torch.Generator()
        for place, (index, count, each) in enumerate(zip(order, counts, batches, strict=True)):
            shuffle.manual_seed(jobs[index].seed)
            for begin in range(0, epochs * int(each) * width, int(each) * width):
                part = flat.narrow(0, place * longest * width + begin, int(count))
                torch.randperm(int(count), generator=shuffle, out=part)
        rows += torch.from_numpy(np.cumsum(counts) - counts)[:, None]
        within = np.arange(longest * width) % (batches[:, None] * width)
        left = counts[:, None] - within // width * width
        there = (within < counts[:, None]) & (np.arange(longest * width) < steps[:, None] * width)
        weights = torch.from_numpy(np.where(there, 1 / np.minimum(left.clip(1), width), 0.0))
        shape = (len(jobs), longest, width)
        return cls(
            order,
            steps,
            [int((steps > step).sum()) for step in range(longest)],
            rows.view(shape).transpose(0, 1).contiguous(),
            weights.float().view(shape).transpose(0, 1).contiguous(),
        )


def _descend(
    trainer: SGD,
    jobs: Sequence[FitJob],
    stack: StackedModel,
    task: Task,
    plan: _Plan,
    start: Tensor,
    correction: Tensor | None,
) -> Tensor:
    """All steps of all clients; their losses, (T, C) float32, 0 past a client's last step."""
    device = stack.parameters.device
    inputs = torch.cat([job.examples.inputs for job in jobs]).to(device)
    targets = torch.cat([job.examples.targets for job in jobs]).to(device)
    velocity = trainer.moments(stack.parameters)
    losses = torch.zeros(plan.rows.shape[:2], device=device)
    for step, k in enumerate(plan.active):
        rows, weights = plan.rows[step, :k].to(device), plan.weights[step, :k].to(device)
        flat = rows.flatten()
        batch = inputs.index_select(0, flat).view(*rows.shape, *inputs.shape[1:])
        outputs, leaves = stack.forward(batch)
        each = task.losses(outputs.flatten(0, 1), targets.index_select(0, flat))
        loss = (each.view(rows.shape) * weights).sum(1)
        gradient = stack.backward(loss.sum(), leaves)
        trainer.step(
            stack.parameters[:k],
            gradient,
            start[:k],
            None if correction is None else correction[:k],
            None if velocity is None else velocity[:k],
        )
        losses[step, :k] = loss.detach()
    return losses.cpu()


def _starts(jobs: Sequence[FitJob], model: ResidentModel) -> Tensor:
    """What the clients were sent: (C, d) float32, or (1, d) where that is the same for all, as in a round it is."""
    distinct = {id(job.arrays): job.arrays for job in jobs}
    flat = {key: torch.from_numpy(model.layout.flatten(value)) for key, value in distinct.items()}
    return torch.stack(
        list(flat.values()) if len(flat) == 1 else [flat[id(j.arrays)] for j in jobs]
    )


def _corrections(
    trainer: SGD, jobs: Sequence[FitJob], stack: StackedModel, model: ResidentModel
) -> Tensor | None:
    """What each job changes its gradients by, (C, d) in the stack's order or (C, 1); None where none does.

    Raises:
        ValueError: some do.
    """
    each = [trainer.correction(job, model.layout) for job in jobs]
    given = [correction for correction in each if correction is not None]
    if not given:
        return None
    if len(given) < len(each):
        raise ValueError("only some of the jobs correct their gradients")
    stacked = torch.stack(given).to(stack.parameters.device)
    return stack.rows(stacked) if stacked.shape[1] == model.layout.size else stacked
