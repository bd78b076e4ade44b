"""Local stochastic gradient descent, the client's half of FedAvg (McMahan et al. 2017, Algorithm 1, ClientUpdate)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt
from flwr.app import ArrayRecord
from numpy.typing import NDArray
from torch import Tensor

from clients.resident import Arrays, ResidentModel
from clients.tasks import Examples, Task
from strategies.ranges import Ranged
from strategies.update import DELTA, Layout, Section
from strategies.wire import LOCAL_STEPS, Refused

Settings = Mapping[str, object]
_MOMENTUM = "momentum"
"""What a client's state calls its mean over rounds."""
_MOST_STEPS = 1_000_000
"""More local steps than this no server is given."""


class TrainingDivergedError(RuntimeError):
    """A loss that is not finite."""


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
    """

    client: int
    arrays: Arrays
    broadcast: Mapping[str, NDArray[np.float32]]
    examples: Examples
    seed: int
    state: Mapping[str, NDArray[np.float32]]
    settings: Settings
    records: Mapping[str, ArrayRecord] = field(default_factory=dict)


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
            losses = self._descend(job, model, task, start)
        return self.concluded(job, model.sections(), losses)

    def concluded(
        self, job: FitJob, sections: Mapping[str, Section], losses: Sequence[float]
    ) -> Fit:
        """The result of a job, given its model's change and the loss at each step.

        Raises:
            TrainingDivergedError: a loss is not finite.
        """
        if not all(map(math.isfinite, losses)):
            step = next(index for index, value in enumerate(losses, 1) if not math.isfinite(value))
            raise TrainingDivergedError(
                f"the loss of client {job.client} is {losses[step - 1]} at local step {step}: lower client.lr"
                f" (now {self.lr:g}) or set client.max_grad_norm"
            )
        extra, state = self.conclude(job, sections[DELTA], len(losses))
        if self.worker_momentum:
            mean = _moving_mean(job.state.get(_MOMENTUM), sections[DELTA], self.worker_momentum)
            extra, state = {**extra, DELTA: mean}, {**state, _MOMENTUM: mean.vector}
        metrics = {"train_loss": math.fsum(losses) / len(losses)}
        return Fit({**sections, **extra}, len(job.examples), metrics, state)

    def _descend(self, job: FitJob, model: ResidentModel, task: Task, start: Tensor) -> list[float]:
        """The local steps; returns each batch's loss."""
        device = model.flat.device
        amp = self.amp and device.type == "cuda"
        inputs, targets = job.examples.inputs.to(device), job.examples.targets.to(device)
        correction = self.correction(job, model.layout)
        if correction is not None:
            correction = correction.to(device)
        velocity = self.moments(start)
        plain = self._is_plain
        losses: list[Tensor] = []
        for batch in self._batches(len(targets), job.settings):
            batch = batch.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                loss = task.loss(model.module(inputs[batch]), targets[batch])
            gradients = model.gradients(loss)
            if plain:
                with torch.no_grad():
                    torch._foreach_add_(model.travelling, gradients, alpha=-self.lr)
            else:
                gradient = model.flattened(gradients)
                self.step(model.flat, gradient, start, correction, velocity)
            losses.append(loss.detach())
        # One transfer at the end: reading each batch's loss would wait for a GPU at every step.
        values: list[float] = torch.stack(losses).tolist()
        return values

    def batches(self, count: int) -> Iterator[Tensor]:
        """Places of each batch's examples, of all local epochs; drawn from torch's generator."""
        return self._batches(count, {})

    def _batches(self, count: int, settings: Settings) -> Iterator[Tensor]:
        """Places of each batch's examples: all epochs', or as many batches as the server asks for.

        Raises:
            Refused: `terms`, for a number that is none.
        """
        steps = settings.get(LOCAL_STEPS)
        if steps is not None and not (type(steps) is int and 1 <= steps <= _MOST_STEPS):
            raise Refused("terms", f"{steps!r} local steps")
        shuffled = (
            batch
            for _ in range(self.local_epochs if steps is None else _MOST_STEPS)
            for batch in torch.split(torch.randperm(count), self.batch_size)
        )
        yield from shuffled if steps is None else islice(shuffled, steps)

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
        self, job: FitJob, delta: Section, steps: int
    ) -> tuple[dict[str, Section], dict[str, NDArray[np.float32]]]:
        """Further sections of the update, and the state to remember."""
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
