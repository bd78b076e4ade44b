"""How one job is gone through, and where it stands between two batches.

A trainer's loop walks a course: so many examples at a time, at a learning rate that may have been lowered from some
epoch on, until somebody asks it to pause. Between two batches all that its further steps depend on can be written down
as a point (weights, moments, running statistics, the random generators, the epoch's order, the losses), and a walk that
goes on from one takes the very steps that it would have taken.

This file does not know why a job is tried again (`clients.retrying`), nor where points lie (`clients.half_done`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from clients.resident import ResidentModel
from strategies.wire import PAUSED, Refused

Pause = Callable[[], str | None]
"""Asked between batches: why training should stop for now, None to go on. It is called often, and decides itself how
often it looks."""
Rates = tuple[tuple[int, float], ...]
"""From which local epoch on (from 0) the learning rate is how much of what it was set to; later entries win."""
_BUFFER = "buffer/"


class TrainingDivergedError(RuntimeError):
    """A loss that is not finite.

    Attributes:
        epoch: the local epoch, from 0, before which all was well; None where that is not known.
    """

    def __init__(self, message: str, epoch: int | None = None) -> None:
        super().__init__(message)
        self.epoch = epoch


@dataclass(frozen=True)
class Point:
    """A walk between two batches.

    Attributes:
        tensors: by name, on the CPU.
        figures: plain numbers beside them, as JSON holds them.
    """

    tensors: Mapping[str, Tensor]
    figures: Mapping[str, Any]


class Keeper(Protocol):
    """Where one job's points are kept."""

    def load(self) -> Point | None:
        """The last one; None where there is none of this very job."""
        ...

    def due(self) -> bool:
        """Whether it is time to write the next."""
        ...

    def save(self, point: Point) -> None:
        """Writes it in the place of the last."""
        ...

    def drop(self) -> None:
        """Forgets it."""
        ...


@dataclass(frozen=True)
class Course:
    """What a job's trainer is told beside its settings.

    Attributes:
        micro_batch: examples at a time; a batch of more is gone through in pieces, and its gradient is their mean. None
            for all of a batch at once.
        rates: how the learning rate has been lowered.
        pause: asked between batches; None where nobody wants a pause.
        keeper: of half-done work, None where none is kept.
        careful: losses are looked at after each local epoch, so that one that has diverged ends there.
    """

    micro_batch: int | None = None
    rates: Rates = ()
    pause: Pause | None = None
    keeper: Keeper | None = None
    careful: bool = False

    def rate(self, epoch: int) -> float:
        """What the learning rate is multiplied with in a local epoch, from 0."""
        return next((factor for begin, factor in reversed(self.rates) if begin <= epoch), 1.0)

    @property
    def watched(self) -> bool:
        """Whether anybody wants to know of each batch."""
        return self.careful or self.pause is not None or self.keeper is not None


STRAIGHT = Course()
"""From the first batch to the last."""


class Batches:
    """Places of each batch's examples, epoch after epoch; it can be put back where another one was.

    An epoch's order is drawn from torch's generator when its first batch is asked for.

    Args:
        count: examples there are.
        size: of a batch; an epoch's last may be smaller.
        epochs: how many.
        steps: how many batches in all; None for all of the epochs'.
    """

    def __init__(self, count: int, size: int, *, epochs: int, steps: int | None = None) -> None:
        self._count, self._size, self._epochs = count, size, epochs
        self._steps = steps
        self.order = torch.empty(0, dtype=torch.long)
        self._parts: Sequence[Tensor] = ()
        self.begun = self.within = self.taken = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tensor:
        if self.taken == self._steps:
            raise StopIteration
        if self.within == len(self._parts):
            if self.begun == self._epochs:
                raise StopIteration
            self._take_order(torch.randperm(self._count))
            self.begun, self.within = self.begun + 1, 0
        batch = self._parts[self.within]
        self.within += 1
        self.taken += 1
        return batch

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch, once one has begun."""
        return len(self._parts)

    @property
    def epoch_over(self) -> bool:
        """Whether the last batch was its epoch's last."""
        return self.within == len(self._parts)

    @property
    def over(self) -> bool:
        """Whether there is no further batch."""
        return self.taken == self._steps or (self.epoch_over and self.begun == self._epochs)

    def put(self, order: Tensor, *, begun: int, within: int, taken: int) -> bool:
        """Goes where another one stood; False, and nothing is changed, where this one can't have been there."""
        whole = order.shape == (self._count,) and order.dtype == torch.long
        if not whole or not torch.equal(order.sort().values, torch.arange(self._count)):
            return False
        parts = torch.split(order, self._size)
        each = len(parts)
        if not (1 <= begun <= self._epochs and 1 <= within <= each):
            return False
        if taken != (begun - 1) * each + within or (
            self._steps is not None and taken > self._steps
        ):
            return False
        self._take_order(order)
        self.begun, self.within, self.taken = begun, within, taken
        return True

    def _take_order(self, order: Tensor) -> None:
        self.order, self._parts = order, torch.split(order, self._size)


class Walk:
    """One job under way; made within the random generators' own scope, when these have been seeded.

    Args:
        course: how it is gone through.
        client: whose job it is, for messages.
        lr: the learning rate that is set.
        model: at the weights from which it began.
        batches: none of which was taken.
        moments: of the optimiser, (…) float32, changed in place; None where it has none.

    Attributes:
        losses: one a batch.
        micro_batch: examples at a time, None for all of a batch.
        distance: sum over the batches of how much of the learning rate each went; their number, where all went by all
            of it.
    """

    def __init__(
        self,
        course: Course,
        client: int,
        lr: float,
        model: ResidentModel,
        batches: Batches,
        moments: Tensor | None,
    ) -> None:
        self._course, self._client, self._lr = course, client, lr
        self._model, self._batches, self._moments = model, batches, moments
        self.losses: list[Tensor] = []
        self.micro_batch, self._rates = course.micro_batch, course.rates
        self.distance = 0.0
        self._looked = 0
        point = None if course.keeper is None else course.keeper.load()
        if course.keeper is not None and point is not None and not self._go_to(point):
            course.keeper.drop()

    @property
    def rate(self) -> float:
        """What the learning rate is multiplied with, for the batch that was last asked for."""
        if not self._rates:
            return 1.0
        return Course(rates=self._rates).rate(self._batches.begun - 1)

    def passed(self, loss: Tensor) -> None:
        """Takes note of a batch whose step was made.

        Raises:
            Refused: `paused`; what was done lies in the keeper.
            TrainingDivergedError: a loss of this epoch, or a weight after it, is not finite.
        """
        self.losses.append(loss)
        self.distance += self.rate
        course = self._course
        if not course.watched or self._batches.over:
            return
        if course.careful and self._batches.epoch_over:
            self._look()
        reason = None if course.pause is None else course.pause()
        keeper = course.keeper
        if keeper is not None and (reason is not None or keeper.due()):
            self._look()
            keeper.save(self._point())
        if reason is not None:
            raise Refused(PAUSED, reason)

    def _look(self) -> None:
        """Raises where what was done is not finite."""
        fresh, self._looked = self.losses[self._looked :], len(self.losses)
        finite = bool(torch.stack(fresh).isfinite().all()) if fresh else True
        if not finite or not bool(self._model.flat.isfinite().all()):
            values = torch.stack(self.losses).tolist()
            raise diverged(
                self._client, values, self._lr, self._batches.per_epoch
            ) or TrainingDivergedError(
                f"the weights of client {self._client} are not finite after local step {len(values)}: "
                f"{_mend(self._lr)}",
                self._batches.begun - 1,
            )

    def _point(self) -> Point:
        model, batches = self._model, self._batches
        tensors = {
            "parameters": model.flat,
            "order": batches.order,
            "losses": torch.stack(self.losses),
            "random": torch.get_rng_state(),
            **{_BUFFER + name: buffer for name, buffer in model.module.named_buffers()},
        }
        if self._moments is not None:
            tensors["moments"] = self._moments
        if model.flat.device.type == "cuda":
            tensors["random on the device"] = torch.cuda.get_rng_state(model.flat.device)
        figures = {
            "begun": batches.begun,
            "within": batches.within,
            "taken": batches.taken,
            "distance": self.distance,
            "rates": [list(entry) for entry in self._rates],
            "micro_batch": self.micro_batch,
        }
        return Point({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, figures)

    def _go_to(self, point: Point) -> bool:
        """Goes on from a point; False, and nothing is changed, where it is no point of this walk."""
        buffers = {_BUFFER + name: buffer for name, buffer in self._model.module.named_buffers()}
        mine = {"parameters": self._model.flat, **buffers}
        if self._moments is not None:
            mine["moments"] = self._moments
        theirs, device = point.tensors, self._model.flat.device
        beside = {"order", "losses", "random"}
        if device.type == "cuda":
            beside.add("random on the device")
        if theirs.keys() != mine.keys() | beside:
            return False
        if any(theirs[n].shape != t.shape or theirs[n].dtype != t.dtype for n, t in mine.items()):
            return False
        figures, losses, random = point.figures, theirs["losses"], theirs["random"]
        if random.shape != (now := torch.get_rng_state()).shape or random.dtype != now.dtype:
            return False
        if losses.shape != (figures["taken"],) or not self._batches.put(
            theirs["order"], **{key: figures[key] for key in ("begun", "within", "taken")}
        ):
            return False
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.data.copy_(theirs[name])
        torch.set_rng_state(random)
        if device.type == "cuda":
            torch.cuda.set_rng_state(theirs["random on the device"], device)
        self.losses = list(losses.to(device).unbind())
        self._looked = len(self.losses)
        self.distance = float(figures["distance"])
        self._rates = tuple((int(epoch), float(factor)) for epoch, factor in figures["rates"])
        micro = figures["micro_batch"]
        self.micro_batch = _less(self._course.micro_batch, None if micro is None else int(micro))
        return True


def diverged(
    client: int, losses: Sequence[float], lr: float, per_epoch: int
) -> TrainingDivergedError | None:
    """The error of a job whose losses are not all finite; None where they are.

    Args:
        client: whose.
        losses: of each batch.
        lr: the learning rate that is set.
        per_epoch: batches of an epoch.
    """
    step = next((step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    if step is None:
        return None
    # A first loss that is not finite tells of the weights, and those are of the epoch before.
    epoch = max(0, step - 2) // max(1, per_epoch)
    text = f"the loss of client {client} is {losses[step - 1]} at local step {step}: {_mend(lr)}"
    return TrainingDivergedError(text, epoch)


def _mend(lr: float) -> str:
    return f"lower client.lr (now {lr:g}) or set client.max_grad_norm"


def _less(first: int | None, second: int | None) -> int | None:
    given = [value for value in (first, second) if value is not None]
    return min(given, default=None)
