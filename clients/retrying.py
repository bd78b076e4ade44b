"""A training that failed is tried again: what may be, how, and how often.

A fault that passes (an OSError of a disk, a RuntimeError of torch's) is met by the same job again after a wait: the
same seed, and so the same bits as without the fault. Where memory ran out, as many examples at a time are halved, down
to one, and gradients are those of the whole batch up to rounding, but for what batch normalisation and dropout make of
pieces (`Course.micro_batch`, docs/retries.md). Where a loss is not finite,
the job goes on at a lower learning rate from the last local epoch that went well: it is trained anew up to there, in
the same steps, so that nothing is held in memory for a fault that may not come.

What is refused is never tried again, nor are errors of the configuration or of a contract: they would fail alike. An
attempt that is charged to a client's privacy budget is charged each time, by the trainer, before it looks at an
example; where the budget leaves no room, the first failure stands. Nothing here knows of messages or of servers.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Final, Literal, Protocol, TypeVar

import torch
from annotated_types import Ge, Gt, Le, Lt

from clients.resident import ResidentModel
from clients.tasks import Task
from clients.trainers.course import Rates, TrainingDivergedError
from clients.trainers.dp_account import BudgetSpent
from clients.trainers.sgd import Fit, FitJob
from strategies.ranges import Ranged
from strategies.wire import Refused

log = logging.getLogger(__name__)

T = TypeVar("T")
Kind = Literal["passing", "memory", "diverged"]

MOST_WAIT: Final = 60.0
"""Seconds that all waits of one job may take together."""
RETRIES: Final = "retries"
"""The metric that says how many further attempts a training took, where it took any."""
_MEMORY: Final = ("can't allocate memory", "out of memory", "not enough memory")


class Fitting(Protocol):
    """What trains."""

    def fit(
        self, jobs: Sequence[FitJob], model: ResidentModel, task: Task
    ) -> Sequence[Fit | Exception]:
        """One result a job."""
        ...


@dataclass(frozen=True)
class Retry(Ranged):
    """How often a client tries, and what it changes.

    Attributes:
        attempts: at a training or an evaluation, the first one included; 1 tries nothing again. Halving what is held in
            memory counts only where an attempt is charged to a privacy budget.
        backoff_seconds: the first wait before another attempt; each further one is twice as long, and all together
            are at most a minute. 0 waits not at all.
        lr_factor: what the learning rate is multiplied with after a loss that is not finite.
    """

    attempts: Annotated[int, Ge(1), Le(10)] = 3
    backoff_seconds: Annotated[float, Ge(0), Le(60)] = 1.0
    lr_factor: Annotated[float, Gt(0), Lt(1)] = 0.5

    def waits(self) -> list[float]:
        """Seconds before the second attempt, the third and so on."""
        found: list[float] = []
        for number in range(self.attempts - 1):
            found.append(min(self.backoff_seconds * 2.0**number, MOST_WAIT - sum(found)))
        return found


ONCE: Final = Retry(attempts=1, backoff_seconds=0.0)
"""Nothing is tried again."""


class Retrying:
    """Tries again.

    Args:
        retry: how often.
        tells: whether a training's metrics say how many further attempts it took.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        retry: Retry = ONCE,
        *,
        tells: bool = True,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.retry, self._tells, self._sleep = retry, tells, sleep

    @property
    def tries_again(self) -> bool:
        """Whether there is a second attempt at anything."""
        return self.retry.attempts > 1

    def call(self, work: Callable[[], T]) -> T:
        """What `work` gives, after as many attempts as a fault that passes deserves.

        Raises:
            Exception: the last attempt's.
        """
        for wait in self.retry.waits():
            try:
                return work()
            except Exception as error:
                if kind_of(error) not in ("passing", "memory"):
                    raise
                self._before_another(error, wait)
        return work()

    def measured(self, measure: Callable[[int], T], size: int) -> T:
        """What a measurement of so many examples at a time gives, or of half as many for each time memory ran out.

        Raises:
            Exception: the last attempt's.
        """
        waits = iter(self.retry.waits())
        while True:
            try:
                return measure(size)
            except Exception as error:
                kind = kind_of(error)
                if kind == "memory" and size > 1 and self.tries_again:
                    size = -(-size // 2)
                    self._before_another(error, 0.0)
                elif kind in ("passing", "memory") and (wait := next(waits, None)) is not None:
                    self._before_another(error, wait)
                else:
                    raise

    def again(
        self, trainer: Fitting, job: FitJob, model: ResidentModel, task: Task, error: Exception
    ) -> Fit | Exception:
        """What becomes of a job whose first attempt failed: a result, or the error that stands.

        Args:
            trainer: which failed.
            job: as it was tried.
            model: resident.
            task: loss and metrics.
            error: of the first attempt.
        """
        waits, further = iter(self.retry.waits()), 0
        while self.tries_again:
            kind = kind_of(error)
            mended = job if kind is None else self._mended(kind, trainer, job, task, error)
            if kind is None or mended is None:
                break
            wait = 0.0
            if kind != "memory" or mended is job or getattr(trainer, "charged", False):
                left = next(waits, None)
                if left is None:
                    break
                wait = left if kind == "passing" else 0.0
            job, further = mended, further + 1
            self._before_another(error, wait)
            (result,) = trainer.fit([job], model, task)
            if not isinstance(result, Exception):
                return self._told(result, further)
            if isinstance(result, BudgetSpent):
                log.warning("client %d is not trained again: %s", job.client, result)
                break
            error = result
        return error

    def _mended(
        self, kind: Kind, trainer: Fitting, job: FitJob, task: Task, error: Exception
    ) -> FitJob | None:
        """The job as it is tried next; None where another attempt would fail alike."""
        mends = getattr(trainer, "mends", frozenset[str]())
        if kind == "passing":
            return job
        if kind == "memory":
            if "micro_batch" not in mends or not is_mean(task):
                return job
            size: int = trainer.at_once(job)  # type: ignore[attr-defined]  # trainers with mends are SGDs
            if size <= 1:
                return None
            half = -(-size // 2)
            log.warning("client %d goes on with %d examples at a time", job.client, half)
            return replace(job, course=replace(job.course, micro_batch=half))
        if "rates" not in mends:
            return None
        found = error if isinstance(error, TrainingDivergedError) else error.__cause__
        epoch = getattr(found, "epoch", None) or 0
        rates = self._lowered(job.course.rates, epoch)
        log.warning(
            "client %d goes on at %g of its learning rate from local epoch %d on",
            job.client, rates[-1][1], rates[-1][0] + 1,
        )  # fmt: skip
        if job.course.keeper is not None:
            job.course.keeper.drop()
        return replace(job, course=replace(job.course, rates=rates))

    def _lowered(self, rates: Rates, epoch: int) -> Rates:
        """Lower from an epoch on; from the first one on where it was lowered there already, and to no avail."""
        factor = (rates[-1][1] if rates else 1.0) * self.retry.lr_factor
        if rates and epoch <= rates[-1][0]:
            return ((0, factor),)
        return (*rates, (epoch, factor))

    def _told(self, fit: Fit, further: int) -> Fit:
        if not self._tells:
            return fit
        return replace(fit, metrics={**fit.metrics, RETRIES: float(further)})

    def _before_another(self, error: Exception, wait: float) -> None:
        log.warning("tried again in %g s: %s: %s", wait, type(error).__name__, error)
        # Frames hold the failed attempt's tensors for as long as their error is held.
        held: BaseException | None = error
        while held is not None:
            traceback.clear_frames(held.__traceback__)
            held = held.__cause__
        if kind_of(error) == "memory":
            free_memory()
        if wait:
            self._sleep(wait)


def kind_of(error: BaseException | None) -> Kind | None:
    """What kind of fault it is; None for one that is not tried again."""
    if isinstance(error, Refused):
        # A trainer that says nothing of its examples refuses with what went wrong as the cause.
        return kind_of(error.__cause__) if error.reason == "training" else None
    if isinstance(error, TrainingDivergedError):
        return "diverged"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "memory"
    if isinstance(error, OSError):
        return "memory" if error.errno == errno.ENOMEM else "passing"
    if isinstance(error, RuntimeError) and not isinstance(
        error, NotImplementedError | RecursionError
    ):
        return "memory" if any(text in str(error) for text in _MEMORY) else "passing"
    return None


def is_mean(task: Task) -> bool:
    """Whether the loss of a batch is the mean of its examples' losses, so that pieces of a batch make up the whole."""
    return type(task).loss is Task.loss and "loss" not in vars(task)


def free_memory() -> None:
    """Gives back what is held for later: by Python, by the C library, by torch on a GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library than glibc
        return
