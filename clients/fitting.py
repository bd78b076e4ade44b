"""Jobs to results: on models that stay in memory, several clients at once where that is faster, what failed again.

Whatever is done for a job looks at a client's own examples, and what it raises may tell of one. So an error is that
job's result, for the client to say or to keep to itself, and never leaves `Fitting.fit`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from traceback import clear_frames

import numpy as np
from torch import nn

from clients.resident import Arrays, ModuleMaker, OneModule, ResidentModel, Shapes, arrays_of
from clients.retrying import Retrying, free_memory, is_mean, kind_of
from clients.split.trainer import Turns
from clients.tasks import Task
from clients.trainers import SGD, Fit, FitJob
from clients.trainers.together import fit_together
from strategies.wire import LOCAL_STEPS

log = logging.getLogger(__name__)

_MOST_MODELS = 16
"""Resident models of different parts that a process keeps; their frozen weights are in memory once."""

MicroBatch = Callable[[FitJob, ResidentModel, Task], int | None]
"""How many of a batch's examples fit in memory at a time, before a job is trained; None for all."""


class Fitting:
    """Trains the clients of one process.

    Args:
        task: loss and metrics.
        module: the architecture, or what makes it for arrays of given names and shapes.
        trainer: how a client fits.
        retrying: what becomes of a training that failed.
        together: whether the clients of one call are trained at once.
        micro_batch: asked before each job that may be gone through in pieces; None for whole batches.
    """

    def __init__(
        self,
        task: Task,
        module: nn.Module | ModuleMaker,
        trainer: SGD,
        retrying: Retrying,
        *,
        together: bool = False,
        micro_batch: MicroBatch | None = None,
    ) -> None:
        self._task, self._trainer, self._retrying = task, trainer, retrying
        self._make = module if isinstance(module, ModuleMaker) else OneModule(module)
        self._together, self._micro_batch = together, micro_batch
        self._models: dict[object, ResidentModel] = {}

    def fit(self, jobs: Sequence[FitJob]) -> Sequence[Fit | Exception]:
        """The result of each job in their order, or the error that stands after all attempts."""
        if not jobs:
            return []
        if isinstance(self._make, OneModule):
            return self._guarded(jobs)
        return [self._guarded([job])[0] for job in jobs]

    def resident(self, shapes: Shapes, settings: Mapping[str, object]) -> ResidentModel:
        """The model that holds arrays of these names and shapes; those of the last few parts are kept.

        A request without any is one for which no model travels: then what travels otherwise is the module's own state.
        """
        key = self._make.key(shapes, settings)
        model = self._models.pop(key, None)
        if model is None:
            made = self._make(shapes, settings)
            while len(self._models) >= _MOST_MODELS:
                self._models.pop(next(iter(self._models)))
            # Shapes alone are looked at: an array without memory has them.
            held = shapes or shapes_of(arrays_of(made))
            empty = {n: np.broadcast_to(np.float32(0), shape) for n, shape in held.items()}
            model = ResidentModel(made, empty, self._trainer.torch_device)
        self._models[key] = model
        return model

    def _guarded(self, jobs: Sequence[FitJob]) -> Sequence[Fit | Exception]:
        """As `_fit_alike`, with an error of whatever guards no job of its own as each job's result."""
        try:
            return self._fit_alike(jobs)
        except Exception as error:  # of a user's own trainer, say
            return [error] * len(jobs)

    def _fit_alike(self, jobs: Sequence[FitJob]) -> Sequence[Fit | Exception]:
        """Fits jobs that have one model in common."""
        try:
            model = self._retrying.call(
                lambda: self.resident(shapes_of(jobs[0].arrays), jobs[0].settings)
            )
        except Exception as error:  # of whatever makes a model
            return [error] * len(jobs)
        jobs = [self._in_pieces(job, model) for job in jobs]
        results = self._at_once(jobs, model)
        if results is None:
            results = self._trainer.fit(jobs, model, self._task)
        if isinstance(self._trainer, Turns):
            return results  # the session asks for a turn again, and what was told of an owner's key is counted
        return [
            self._again(job, model, result) if isinstance(result, Exception) else result
            for job, result in zip(jobs, results, strict=True)
        ]

    def _again(self, job: FitJob, model: ResidentModel, error: Exception) -> Fit | Exception:
        """What becomes of one failed job, whatever happens meanwhile: the others have their results."""
        try:
            return self._retrying.again(self._trainer, job, model, self._task, error)
        except Exception as other:
            return other

    def _in_pieces(self, job: FitJob, model: ResidentModel) -> FitJob:
        """The job with as many examples at a time as fit; one, where memory ran out before that was known.

        Where it can't be told for another reason the job is as it was: training meets the same fault, is charged to a
        privacy budget first, and tells of it no more than it may.
        """
        ask, mends = self._micro_batch, getattr(self._trainer, "mends", frozenset[str]())
        if ask is None or "micro_batch" not in mends or not is_mean(self._task):
            return job
        fits: int | None = 1
        try:
            fits = ask(job, model, self._task)
        except Exception as error:  # of the task's own code, on this client's own examples
            log.warning("client %d: what a batch takes is not known: %r", job.client, error)
            if kind_of(error) != "memory":
                return job
            clear_frames(error.__traceback__)  # which hold what was measured
            free_memory()
        return replace(job, course=replace(job.course, micro_batch=fits))

    def _at_once(
        self, jobs: Sequence[FitJob], model: ResidentModel
    ) -> Sequence[Fit | Exception] | None:
        """All of them in one; None where they are to be trained one by one."""
        alike = not any(LOCAL_STEPS in job.settings for job in jobs)
        if not (self._together and alike and len(jobs) > 1):
            return None
        for attempt in range(self._retrying.retry.attempts):
            try:
                return fit_together(self._trainer, jobs, model, self._task)
            except Exception as error:  # torch raises what it likes for what it can't stack
                log.warning("clients could not be trained at once (%d): %s", attempt + 1, error)
                if kind_of(error) != "passing":
                    break
        log.warning("clients are trained one by one after all")
        return None


def shapes_of(arrays: Arrays) -> Shapes:
    """Names and shapes, in their order."""
    return {name: array.shape for name, array in arrays.items()}
