"""Local stochastic gradient descent, the client's half of FedAvg (McMahan et al. 2017, Algorithm 1, ClientUpdate)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Self

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt
from flwr.app import ArrayRecord
from numpy.typing import NDArray
from torch import Tensor

from clients.resident import Arrays, ResidentModel
from clients.tasks import Examples, Task
from clients.trainers.course import STRAIGHT, Batches, Course, Walk, diverged
from clients.trainers.course import TrainingDivergedError as TrainingDivergedError
from strategies.ranges import Ranged
from strategies.update import DELTA, Layout, Section
from strategies.wire import LOCAL_STEPS, Refused

Settings = Mapping[str, object]
_MOMENTUM = "momentum"
"""What a client's state calls its mean over rounds."""
_MOST_STEPS = 1_000_000
"""More local steps than this no server is given."""


@dataclass(frozen=True)
class FitJob:
    """What one client trains on.

    Attributes:
        client: logical id.
        arrays: the model as it was sent.
        broadcast: vectors that came with it, by section, each (d,) float32.
        examples: the client's own training data.
        seed: of shuffling and dropout.
        state: what the client remembers of earlier rounds.
        settings: the request's configuration.
        records: what else came with the request, for the trainer that asks for it by name (`own_records`).
        course: how it is gone through, which is this end's own affair.
    """

    client: int
    arrays: Arrays
    broadcast: Mapping[str, NDArray[np.float32]]
    examples: Examples
    seed: int
    state: Mapping[str, NDArray[np.float32]]
    settings: Settings
    records: Mapping[str, ArrayRecord] = field(default_factory=dict)
    course: Course = STRAIGHT


@dataclass(frozen=True)
class Fit:
    """What came of it.

    Attributes:
        sections: the update's sections.
        num_examples: examples in the client's training data.
        metrics: `train_loss`, the mean over all batches.
        state: what the client remembers if the server takes the update.
    """

    sections: Mapping[str, Section]
    num_examples: int
    metrics: Mapping[str, float]
    state: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True)
class SGD(Ranged):
    """Minibatch SGD over a client's own data.

    Attributes:
        local_epochs: passes over the data, E.
        batch_size: examples a batch, B (the last batch of an epoch may be smaller).
        lr: learning rate η.
        momentum: of the local optimiser, forgotten between rounds.
        weight_decay: L2 penalty added to the gradient.
        max_grad_norm: gradients are clipped to this L2 norm; None clips nothing.
        worker_momentum: β of a mean over rounds, sent in place of the round's own change Δ: m ← β·m + (1 − β)·Δ, at
            first m = Δ. It lets robust rules tell noise from lies (Karimireddy et al. 2021, "Learning from History
            for Byzantine Robust Optimization", Algorithm 2); the client remembers it.
        device: `auto` is CUDA where there is one; otherwise a torch device.
        amp: forward passes in bfloat16, on CUDA only. No loss is scaled, so gradients are true and may be clipped.
    """

    local_epochs: Annotated[int, Ge(1)] = 1
    batch_size: Annotated[int, Ge(1)] = 20
    lr: Annotated[float, Gt(0)] = 0.05
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    weight_decay: Annotated[float, Ge(0)] = 0.0
    max_grad_norm: Annotated[float, Gt(0)] | None = None
    worker_momentum: Annotated[float, Ge(0), Lt(1)] = 0.0
    device: str = "auto"
    amp: bool = False

    sections: ClassVar[frozenset[str]] = frozenset({DELTA})
    paces: ClassVar[bool] = True
    """Whether it takes as many local steps as a server asks for, where one does."""
    own_records: ClassVar[frozenset[str]] = frozenset()
    """Records of a request that it reads itself: no vectors that were broadcast."""
    mends: ClassVar[frozenset[str]] = frozenset({"micro_batch", "rates"})
    """What of a job's course it keeps to, so that a training which failed may go otherwise when it is tried again."""
    charged: ClassVar[bool] = False
    """Whether each attempt at a job costs the client's examples something."""
    stackable: ClassVar[bool] = True
    """Whether `step` and `correct` may be called with rows of several clients. A subclass says so for itself: its own
    must work on the last dimension, whatever the order of the coordinates in it, and draw no random numbers."""

    @property
    def remembers(self) -> bool:
        """Whether clients keep a state from round to round."""
        return self.worker_momentum > 0 or len(self.sections) > 1

    @property
    def torch_device(self) -> str:
        """The device that `auto` stands for here."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def fit(
        self, jobs: Sequence[FitJob], model: ResidentModel, task: Task
    ) -> list[Fit | Exception]:
        """Trains each job in turn on the resident model; one that fails gives its exception, and the next goes on.

        A trainer that can also train all of them at once has `fit_together` (`clients.trainers.together`).
        """
        results: list[Fit | Exception] = []
        for job in jobs:
            try:
                results.append(self.fit_one(job, model, task))
            except Exception as error:  # whatever a task's own code raises is this job's alone
                results.append(error)
        return results

    def fit_one(self, job: FitJob, model: ResidentModel, task: Task) -> Fit:
        """Trains one client.

        Raises:
            TrainingDivergedError: the loss is not finite.
        """
        model.load(job.arrays)
        model.module.train()
        start = model.flat.clone()
        with torch.random.fork_rng(devices=[]):
            seed_generators(model.flat.device, job.seed)
            losses, distance = self._descend(job, model, task, start)
        return self.concluded(job, model.sections(), losses, distance)

    def concluded(
        self,
        job: FitJob,
        sections: Mapping[str, Section],
        losses: Sequence[float],
        distance: float | None = None,
    ) -> Fit:
        """The result of a job, given its model's change and the loss at each step.

        Args:
            job: what was asked.
            sections: what has changed.
            losses: at each step.
            distance: sum of the steps' learning rates over `lr`; None where all were `lr`.

        Raises:
            TrainingDivergedError: a loss is not finite.
        """
        if not all(map(math.isfinite, losses)):
            per_epoch = -(-len(job.examples) // self.batch_size)
            raise diverged(job.client, losses, self.lr, per_epoch) or AssertionError
        steps = len(losses) if distance is None else distance
        extra, state = self.conclude(job, sections[DELTA], steps)
        if self.worker_momentum:
            mean = _moving_mean(job.state.get(_MOMENTUM), sections[DELTA], self.worker_momentum)
            extra, state = {**extra, DELTA: mean}, {**state, _MOMENTUM: mean.vector}
        metrics = {"train_loss": math.fsum(losses) / len(losses)}
        return Fit({**sections, **extra}, len(job.examples), metrics, state)

    def _descend(
        self, job: FitJob, model: ResidentModel, task: Task, start: Tensor
    ) -> tuple[list[float], float]:
        """The local steps; returns each batch's loss, and the sum of the steps' learning rates over `lr`."""
        device = model.flat.device
        inputs, targets = job.examples.inputs.to(device), job.examples.targets.to(device)
        correction = self.correction(job, model.layout)
        if correction is not None:
            correction = correction.to(device)
        velocity = self.moments(start)
        batches = self._batches(len(targets), job.settings)
        walk = Walk(job.course, job.client, self.lr, model, batches, velocity)
        rule, plain = self, self._is_plain
        for batch in batches:
            batch = batch.to(device)
            loss, gradients = self._pulled(
                model, task, inputs[batch], targets[batch], walk.micro_batch
            )
            if rule.lr != (lr := self.lr * walk.rate):
                rule = self.at(lr)
            if plain:
                with torch.no_grad():
                    torch._foreach_add_(model.travelling, gradients, alpha=-rule.lr)
            else:
                gradient = model.flattened(gradients)
                rule.step(model.flat, gradient, start, correction, velocity)
            walk.passed(loss)
        # One transfer at the end: reading each batch's loss would wait for a GPU at every step.
        values: list[float] = torch.stack(walk.losses).tolist()
        return values, walk.distance

    def _pulled(
        self,
        model: ResidentModel,
        task: Task,
        inputs: Tensor,
        targets: Tensor,
        micro_batch: int | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """A batch's loss and its gradients in the shapes of `model.travelling`, of so many examples at a time.

        In pieces, the loss is the mean of the pieces' losses by their sizes, and so are its gradients. Pieces are of
        nearly equal size: with a last one of a single example batch normalisation can't work.
        """
        device, count = model.flat.device, len(targets)
        amp = self.amp and device.type == "cuda"
        if micro_batch is None or count <= micro_batch:
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                loss = task.loss(model.module(inputs), targets)
            return loss.detach(), model.gradients(loss)
        total, gradients = torch.zeros((), device=device), list[Tensor]()
        pieces = math.ceil(count / micro_batch)
        for some, their in zip(
            inputs.tensor_split(pieces), targets.tensor_split(pieces), strict=True
        ):
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                loss = task.loss(model.module(some), their) * (len(their) / count)
            found = model.gradients(loss)
            with torch.no_grad():
                total += loss.detach()
                if gradients:
                    torch._foreach_add_(gradients, found)
                else:
                    gradients = found
        return total, gradients

    def at(self, lr: float) -> Self:
        """The same trainer at another learning rate."""
        other = copy.copy(self)
        object.__setattr__(other, "lr", lr)
        return other

    def at_once(self, job: FitJob) -> int:
        """Examples that it goes through at a time."""
        most = self.batch_size if job.course.micro_batch is None else job.course.micro_batch
        return min(most, len(job.examples))

    def batches(self, count: int) -> Batches:
        """Places of each batch's examples, of all local epochs; drawn from torch's generator."""
        return self._batches(count, {})

    def _batches(self, count: int, settings: Settings) -> Batches:
        """Places of each batch's examples: all epochs', or as many batches as the server asks for.

        Raises:
            Refused: `terms`, for a number that is none.
        """
        steps = settings.get(LOCAL_STEPS)
        if steps is not None and not (type(steps) is int and 1 <= steps <= _MOST_STEPS):
            raise Refused("terms", f"{steps!r} local steps")
        epochs = self.local_epochs if steps is None else _MOST_STEPS
        return Batches(count, self.batch_size, epochs=epochs, steps=steps)

    @property
    def _is_plain(self) -> bool:
        """Whether a step is w ← w − lr·g and nothing else, which needs no flat gradient."""
        extras = self.momentum or self.weight_decay or self.max_grad_norm is not None
        own = type(self).step is not SGD.step or type(self).correct is not SGD.correct
        return not (extras or own)

    def moments(self, start: Tensor) -> Tensor | None:
        """What `step` keeps between steps, at first: (…, d) like `start`, None without momentum."""
        return torch.zeros_like(start) if self.momentum else None

    def step(
        self,
        parameters: Tensor,
        gradient: Tensor,
        start: Tensor,
        correction: Tensor | None,
        velocity: Tensor | None,
    ) -> None:
        """One step in place, as `torch.optim.SGD` defines it, of one client (d,) or of several at once (k, d).

        torch's own optimisers import its compiler when the first is made: seconds, in every new process.

        Args:
            parameters: (…, d), changed.
            gradient: (…, d), used up.
            start: the model as it was sent, (…, d) or (1, d).
            correction: what `correction` gave, (…, d) or (…, 1), or None.
            velocity: (…, d), changed; None without momentum.
        """
        self.correct(gradient, parameters, start, correction)
        if self.max_grad_norm is not None:
            norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
            gradient.mul_(torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0))
        if self.weight_decay:
            gradient.add_(parameters, alpha=self.weight_decay)
        if velocity is not None:
            gradient = velocity.mul_(self.momentum).add_(gradient)
        parameters.add_(gradient, alpha=-self.lr)

    def correction(self, job: FitJob, layout: Layout) -> Tensor | None:
        """What of a job changes its gradients: a (d,) or (1,) float32 tensor for `correct`, or None."""
        return None

    def correct(
        self, gradient: Tensor, parameters: Tensor, start: Tensor, correction: Tensor | None
    ) -> None:
        """Changes the gradient in place before a step; shapes as in `step`."""

    def conclude(
        self, job: FitJob, delta: Section, steps: float
    ) -> tuple[dict[str, Section], dict[str, NDArray[np.float32]]]:
        """Further sections of the update, and the state to remember.

        Args:
            job: what was asked.
            delta: the change of the parameters.
            steps: local steps; those at a part of the learning rate count as that part.
        """
        return {}, {}


def _moving_mean(earlier: NDArray[np.float32] | None, delta: Section, beta: float) -> Section:
    """β·m + (1 − β)·Δ, or Δ where there is no m of that length yet."""
    if earlier is None or earlier.shape != delta.vector.shape:
        return delta
    mean = earlier * np.float32(beta) + delta.vector * np.float32(1 - beta)
    return Section(mean, delta.layout)


def seed_generators(device: torch.device, seed: int) -> None:
    """Seeds the generators that training draws from.

    Not by `torch.manual_seed`: without a GPU that records a stack trace for every accelerator, at each call, for good.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
