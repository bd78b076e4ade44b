"""Training steps of a run, tried before it begins: do they work, what do they take, and can the model learn at all.

All of it is made of the run's own task, model and trainer, called as a client calls them. Where a training can't be had
without a server or a key, a twin of the same arithmetic stands in and says so: DP-SGD without its noise, a model that
is cut as a whole, ciphertexts in plain. Meant for a process of its own (`fl_app.checks.trial`): results are plain JSON.

That a network must be able to learn a few examples by heart is Karpathy 2019, "A Recipe for Training Neural Networks":
"overfit a single batch". Nothing here knows rounds, servers or what is shown.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Final

import numpy as np
from torch import nn

from clients.encrypted.trainer import EncryptedTrainer
from clients.resident import Arrays, ResidentModel, arrays_of
from clients.split.trainer import SplitTrainer
from clients.tasks import Examples, Task, evaluate
from clients.trainers import SGD, DpSgd, FitJob, TrainingDivergedError
from clients.trainers.adamw import AdamW
from clients.trainers.fedsgd import FedSgd
from clients.trainers.together import fit_together
from fl_app.checks.trial import Peak
from strategies.seeds import generator
from strategies.update import DELTA
from strategies.wire import LOCAL_STEPS

OVERFIT: Final = 32
"""Examples."""
_CHUNKS: Final = (10, 20, 40, 80, 150)
"""Steps between two looks at the loss: 300 in all."""
STEPS: Final = sum(_CHUNKS)
ENOUGH_LOSS: Final = 0.1
"""Of the first loss, at which the examples are learnt."""
ENOUGH_ACCURACY: Final = 0.95
_TIMED: Final = 8
"""Steps that are timed at most, and for how many seconds."""
_SECONDS: Final = 2.0
_HARMLESS: Final = 1e-6
_OTHERS: Final = (0.1, 0.01, 0.5, 0.001, 2.0, 1e-4)


@dataclass(frozen=True)
class Workload:
    """What a client does in a round.

    Attributes:
        task: gives examples and the loss.
        module: the whole model; it is used up.
        trainer: of the steps.
        travel: patterns of the parameters that are sent and trained.
        stand_in: what the trainer is of the run's own; empty where it is that.
    """

    task: Task
    module: nn.Module
    trainer: SGD
    travel: Sequence[str]
    stand_in: str = ""

    @classmethod
    def of(cls, task: Task, module: nn.Module, trainer: SGD, travel: Sequence[str]) -> Workload:
        """With the run's own trainer, or a twin of it that needs nobody else."""
        if isinstance(trainer, DpSgd):
            charged_to_nobody = replace(
                trainer,
                noise_multiplier=trainer.noise_multiplier or 1.0,
                target_epsilon=None,
                reproducible_noise=True,
            )
            return cls(task, module, charged_to_nobody, travel)
        if isinstance(trainer, SplitTrainer):
            kind = AdamW if trainer.optimizer == "adamw" else SGD
            return cls(task, module, _as(kind, trainer), travel, "both halves in one process")
        if isinstance(trainer, EncryptedTrainer):
            twin = FedSgd(batch_size=trainer.batch_size, seed=trainer.seed)
            return cls(task, module, twin, travel, "in plain, not on ciphertexts")
        return cls(task, module, trainer, travel)

    @property
    def arrays(self) -> Arrays:
        """The model as a client is sent it."""
        return {
            name: array
            for name, array in arrays_of(self.module).items()
            if any(fnmatchcase(name, pattern) for pattern in self.travel)
        }

    def resident(self) -> ResidentModel:
        """The model in memory."""
        return ResidentModel(self.module, self.arrays, self.trainer.torch_device)


def step(workload: Workload, parts: Sequence[Examples]) -> dict[str, Any]:
    """One mini-batch of each of some clients, then a few more of them: whether they work, what they take.

    Args:
        workload: of the run.
        parts: the training examples of clients that are trained at once; one, or a stack.

    Returns:
        `bytes` (the peak beyond what was resident before), `seconds` (of a step of one client), `loss`, `steps` that
        were timed, `still` (whether no parameter moved).

    Raises:
        TrainingDivergedError: the loss is not finite.
        RuntimeError: as torch raises, for want of memory among others.
    """
    trainer = workload.trainer
    if "local_epochs" in _settings(trainer):
        trainer = replace(trainer, local_epochs=1)
    batch = trainer.batch_size
    arrays = workload.arrays
    peak = Peak()
    peak.begin()
    model = workload.resident()
    first = _fitted(trainer, arrays, [_head(part, batch) for part in parts], model, workload.task)
    if "lr" in _settings(trainer):
        trainer = replace(trainer, lr=_HARMLESS)  # a rate that diverges is not the clock's affair
    began = time.perf_counter()
    _fitted(trainer, arrays, [_head(part, batch) for part in parts], model, workload.task)
    once = max(time.perf_counter() - began, 1e-6)
    count = max(1, min(_TIMED, int(_SECONDS / once), min(map(len, parts)) // batch))
    began = time.perf_counter()
    _fitted(trainer, arrays, [_head(part, count * batch) for part in parts], model, workload.task)
    seconds = (time.perf_counter() - began) / count / len(parts)
    moved = any(np.any(fit.sections[DELTA].vector) for fit in first)
    return {
        "bytes": peak.bytes(),
        "seconds": seconds,
        "loss": first[0].metrics.get("train_loss"),
        "steps": count,
        "still": not moved,
    }


def evaluation(workload: Workload, batch_size: int) -> dict[str, Any]:
    """Seconds that one example of the central test set takes, of a batch of it."""
    some = _head(workload.task.test(), batch_size)
    model = workload.resident()
    began = time.perf_counter()
    found = evaluate(model.module, workload.task, some, device=workload.trainer.torch_device)
    return {"seconds": (time.perf_counter() - began) / len(some), "loss": found["loss"]}


def overfit(workload: Workload, seed: int, seconds: float) -> dict[str, Any]:
    """Whether the model learns a few examples by heart: at the trainer's own learning rate, else at which other.

    Args:
        workload: of the run.
        seed: of the examples' draw and of each training.
        seconds: for all learning rates together; those past it are not tried.

    Returns:
        `examples` used, `own` and `others`: of each rate `lr`, `first` and `last` loss, `accuracy` or null, `steps`,
        `learnt`, and `diverged`, which is a text where it did.
    """
    trainer = _overfitting(workload.trainer)
    task = workload.task
    some = _drawn(task.train(), seed)
    start = workload.arrays
    model = workload.resident()
    deadline = time.monotonic() + seconds
    own = _learnt(trainer, start, some, model, task, seed, deadline)
    others = []
    for lr in () if own["learnt"] else _rates(trainer.lr):
        if time.monotonic() > deadline:
            break
        other = replace(trainer, lr=lr)
        others.append(_learnt(other, start, some, model, task, seed, deadline))
        if others[-1]["learnt"]:
            break
    return {"examples": len(some), "own": own, "others": others}


def no_overfitting(trainer: object) -> str | None:
    """Why a trainer has no local steps of its own that could be tried; None where it has."""
    if isinstance(trainer, EncryptedTrainer):
        return "owners train on ciphertexts, a step of which takes seconds: not tried"
    if isinstance(trainer, FedSgd):
        return "clients take no steps of their own, the server's optimiser does: not tried"
    if not isinstance(trainer, SGD):
        return f"{type(trainer).__name__} is not built on clients.trainers.SGD: not tried"
    return None


def _overfitting(trainer: SGD) -> SGD:
    """The trainer for a few examples in one mini-batch: without noise, with steps for as long as it is asked."""
    if isinstance(trainer, DpSgd):
        trainer = _as(SGD, trainer)
    return replace(trainer, batch_size=OVERFIT, local_epochs=1, worker_momentum=0.0)


def _as(kind: type[SGD], trainer: SGD) -> SGD:
    """A trainer of a class with all settings that another shares with it."""
    known = {item.name for item in fields(trainer)}
    shared = {
        item.name: getattr(trainer, item.name)
        for item in fields(kind)
        if item.init and item.name in known
    }
    return kind(**shared)


def _settings(trainer: SGD) -> set[str]:
    """What may be set of a trainer."""
    return {item.name for item in fields(trainer) if item.init}


def _fitted(
    trainer: SGD, arrays: Arrays, parts: Sequence[Examples], model: ResidentModel, task: Task
) -> list[Any]:
    jobs = [_job(arrays, part, {"server-round": 1}) for part in parts]
    together = fit_together(trainer, jobs, model, task) if len(jobs) > 1 else None
    fits = trainer.fit(jobs, model, task) if together is None else together
    for fit in fits:
        if isinstance(fit, Exception):
            raise fit
    return list(fits)


def _job(arrays: Arrays, examples: Examples, settings: Mapping[str, object]) -> FitJob:
    return FitJob(0, arrays, {}, examples, 0, {}, settings)


def _head(examples: Examples, count: int) -> Examples:
    return examples.take(np.arange(min(count, len(examples))))


def _drawn(examples: Examples, seed: int) -> Examples:
    rng = generator(seed, "overfit")
    return examples.take(rng.permutation(len(examples))[:OVERFIT])


def _rates(own: float) -> Iterator[float]:
    """Learning rates to try in place of one: near ones first, then those that are common."""
    tried = {own}
    for lr in (own * 10, own / 10, *_OTHERS):
        if not any(abs(lr / other - 1) < 0.05 for other in tried):
            tried.add(lr)
            yield lr


def _learnt(
    trainer: SGD,
    start: Arrays,
    some: Examples,
    model: ResidentModel,
    task: Task,
    seed: int,
    deadline: float,
) -> dict[str, Any]:
    model.load(start)
    before = evaluate(model.module, task, some, device=trainer.torch_device)
    told: dict[str, Any] = {"lr": trainer.lr, "first": before["loss"], "last": before["loss"]}
    told["steps"] = 0
    told |= {"accuracy": before.get("accuracy"), "learnt": False, "diverged": ""}
    arrays = start
    for chunk in _CHUNKS:
        job = replace(_job(arrays, some, {LOCAL_STEPS: chunk}), seed=seed)
        try:
            trainer.fit_one(job, model, task)
        except TrainingDivergedError as error:
            return told | {"diverged": str(error)}
        held = arrays_of(model.module)
        arrays = {name: held[name] for name in start}
        after = evaluate(model.module, task, some, device=trainer.torch_device)
        told |= {"last": after["loss"], "accuracy": after.get("accuracy")}
        told["steps"] += chunk
        right = after.get("accuracy", 0.0) >= ENOUGH_ACCURACY and after["loss"] < before["loss"]
        told["learnt"] = right or after["loss"] <= ENOUGH_LOSS * before["loss"]
        if told["learnt"] or time.monotonic() > deadline:
            break
    return told
