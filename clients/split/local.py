"""One client's half of split training: forward, the gradient that comes back, a step.

With m batches in a turn all their activations and gradients are of the parameters before it, and the m steps are taken
one after the other. U-shaped, a turn is two: activations go up and states come back; the client's own heads turn these
into gradients, and a batch's gradient of the heads waits for that of the bottom, so that both make one step.

Half-done work is written before a turn is answered; a turn that is asked for twice is computed twice and counts once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clients.resident import ResidentModel
from clients.split.auxiliary import Seen, auxiliary_loss, misalignment
from clients.split.coding import Precision, decode, encode, pack_rows, relative_error
from clients.split.defence import GaussianNoise, NoPeek
from clients.split.half_done import HalfDone, HalfDoneFolder
from clients.split.model import Lower, SplitLora, fitting
from clients.split.steps import SplitSteps
from clients.split.turns import Batch, read_rows, write_batches, write_rows
from clients.tasks import Task
from clients.trainers.sgd import FitJob, TrainingDivergedError, seed_generators
from strategies.collectors.split import PRECISIONS
from strategies.collectors.split_session import SESSION, TURN
from strategies.parts import covered
from strategies.update import Layout
from strategies.wire import Refused

Arrays = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Told:
    """What a request says of its turn.

    Attributes:
        turn: its number, from 0.
        session: the server's token.
        batches: mini-batches in a turn.
        precision: of what crosses the cut.
    """

    turn: int
    session: str
    batches: int
    precision: Precision

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> Told:
        """Reads it; raises `Refused`."""
        turn, batches = settings.get(TURN), settings.get("split.batches")
        session, precision = settings.get(SESSION), settings.get("split.precision")
        numbers = type(turn) is int and type(batches) is int and turn >= 0 and batches >= 1
        if not numbers or not isinstance(session, str) or precision not in PRECISIONS:
            raise Refused(
                "malformed", f"turn {turn!r} of {batches!r} batches as {precision!r} ({session!r})"
            )
        return cls(turn, session, batches, precision)  # type: ignore[arg-type]


class Local:
    """A client in the middle of a session.

    Args:
        trainer: its settings.
        folder: where half-done work lies.
        job: the request.
        told: what the request says of its turn.
        model: the clients' half; its parameters become those of `state`.
        task: the loss, where labels stay with the client.
        state: changed in place.
    """

    def __init__(
        self,
        trainer: SplitSteps,
        folder: HalfDoneFolder,
        job: FitJob,
        told: Told,
        model: ResidentModel,
        task: Task,
        state: HalfDone,
    ) -> None:
        assert isinstance(model.module, SplitLora)
        self._trainer, self._folder, self._job, self._told = trainer, folder, job, told
        self._model, self._task, self.state = model, task, state
        self._module: SplitLora = model.module
        self._lower: Lower = model.module.lower
        self._device = model.flat.device
        seed_generators(self._device, job.seed)
        batches = list(trainer.batches(len(job.examples)))
        stride = self._stride = told.batches + trainer.auxiliary_steps
        if state.stride not in (0, stride):
            raise Refused("terms", f"{told.batches} batches a turn, others before in this session")
        state.stride = stride
        self._exchanges = [batches[at : at + stride] for at in range(0, len(batches), stride)]
        self._halves = 2 if self._module.u_shaped else 1

    @property
    def last_turn(self) -> int:
        """The number of the turn after which only an answer is wanting."""
        return self._halves * len(self._exchanges) - 1

    def turn(self, number: int, answer: Arrays) -> dict[str, NDArray[np.generic]]:
        """Takes the answer to the turn before, and makes this one; the work is on the disk when it returns.

        Raises:
            Refused: `phase`, where it does not follow what was done; or as the answer deserves.
            TrainingDivergedError: a loss is not finite.
        """
        if number > self.last_turn:
            raise Refused("phase", f"turn {number} of {self.last_turn + 1}")
        told = dict(self.state.figures) if self.state.turn > number else None
        if number % self._halves:
            self._check_order(number)
            made = self._gradients(number // self._halves, answer)
        else:
            self.take_answer(number, answer)
            if self._trainer.auxiliary_steps and self.state.turn == number:
                self._go_alone(number)
            made = self._activations(number // self._halves)
        if told is not None:
            self.state.figures = told
        self.state.turn = number + 1
        self._folder.save(self._job.client, self.state)
        return made

    def take_answer(self, number: int, answer: Arrays) -> None:
        """Makes the steps that the answer to the turn before this one is for, unless they are made."""
        self._check_order(number)
        if number and self.state.turn == number:
            take = self._align if self._trainer.auxiliary_steps else self._descend
            take(number // self._halves - 1, answer)

    def figures(self) -> dict[str, float]:
        """What is reported of all turns: means of what each batch came to."""
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for key, value in self.state.figures.items():
            name, _, of = key.partition("/")
            (counts if of == "count" else sums)[name] = value
        return {name: value / counts[name] for name, value in sums.items()}

    def _check_order(self, number: int) -> None:
        if self.state.turn not in (number, number + 1):
            raise Refused("phase", f"turn {number} was asked for, {self.state.turn} follows")

    def _rows(self, exchange: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of each batch that an exchange sends."""
        yield from self._examples(self._exchanges[exchange][: self._told.batches])

    def _examples(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        examples = self._job.examples
        for batch in batches:
            yield examples.inputs[batch].to(self._device), examples.targets[batch]

    def _load(self) -> None:
        """The model takes up the parameters before an exchange's steps."""
        self._model.flat.copy_(self.state.parameters)
        self._module.eval()

    def _activations(self, exchange: int) -> dict[str, NDArray[np.generic]]:
        """Activations of an exchange's batches, as they travel."""
        self._load()
        batches: list[Batch] = []
        for inputs, targets in self._rows(exchange):
            with torch.no_grad():
                activation, lengths = self._lower(inputs)
            self._finite(activation, exchange)
            rows, precision = pack_rows(activation, lengths), self._told.precision
            rounded = decode(encode(rows, precision), precision, rows.shape)
            self._count("activation_error", relative_error(rows, rounded))
            if self._trainer.noise:
                entropy = self._entropy(exchange, len(batches))
                activation = GaussianNoise(self._trainer.noise)(activation, entropy)
            kept = None if self._module.u_shaped else targets
            batches.append(Batch(activation.cpu(), lengths.cpu(), kept))
        return write_batches(batches, self._told.precision)

    def _entropy(self, exchange: int, batch: int) -> Callable[[int], bytes]:
        """The same bytes for the same batch of a session, and nobody else's."""
        key, number = bytes.fromhex(self.state.key), exchange * self._stride + batch
        return lambda size: hashlib.shake_256(key + str(number).encode()).digest(size)

    def _gradients(self, exchange: int, answer: Arrays) -> dict[str, NDArray[np.generic]]:
        """Gradients of the states that the server's half gave; those of the heads wait in the state."""
        self._load()
        rows = list(self._rows(exchange))
        lengths = [self._lower.lengths(inputs) for inputs, _ in rows]
        states = read_rows("states", answer, lengths, self._told.precision, self._module.hidden)
        gradients, pending = [], []
        for (_, targets), given, kept in zip(rows, states, lengths, strict=True):
            given = given.to(self._device).requires_grad_()
            logits = self._lower.finish(given, kept)
            loss = self._task.loss(logits, fitting(targets, logits).to(self._device))
            self._finite(loss, exchange)
            self._count("train_loss", loss.item())
            (back,), step = self._model.pulled([loss], [None], beside=[given])
            gradients.append(torch.zeros_like(given) if back is None else back)
            pending.append(step)
        self.state.pending = torch.stack(pending)
        gradients = [gradient.cpu() for gradient in gradients]
        return write_rows("gradient", gradients, lengths, self._told.precision)

    def _descend(self, exchange: int, answer: Arrays) -> None:
        """The steps of an exchange's batches, given the gradients of their activations."""
        if not self._model.trains:
            return  # a device without memory for adapters: the server's half learns of it all the same
        self._load()
        trainer, state = self._trainer, self.state
        rows = [inputs for inputs, _ in self._rows(exchange)]
        lengths = [self._lower.lengths(inputs) for inputs in rows]
        came = read_rows("gradient", answer, lengths, self._told.precision, self._module.hidden)
        start = state.parameters
        for number, (inputs, gradient) in enumerate(zip(rows, came, strict=True)):
            activation, kept = self._lower(inputs)
            outputs, weights = [activation], [gradient.to(self._device)]
            if trainer.nopeek:
                outputs.append(self._leak(inputs, activation, kept))
                weights.append(torch.ones((), device=self._device))
            _, step = self._model.pulled(outputs, weights)
            if state.pending is not None:
                step += state.pending[number]
            trainer.step(state.parameters, step, start, None, state.moments)
        state.pending = None

    def _go_alone(self, exchange: int) -> None:
        """A step on each batch of an exchange, by the auxiliary head's gradient (`clients.split.auxiliary`)."""
        self._load()
        trainer, state = self._trainer, self.state
        for inputs, targets in self._examples(self._exchanges[exchange]):
            activation, lengths = self._lower(inputs)
            loss = auxiliary_loss(
                self._auxiliary, self._task, activation, lengths, targets.to(self._device)
            )
            self._finite(loss, exchange)
            self._count("auxiliary_loss", loss.item())
            _, step = self._model.pulled([loss], [None])
            step[self._is_auxiliary] = (
                0  # it learns the server's gradients, and nothing of the labels
            )
            trainer.step(state.parameters, step, state.parameters, None, state.moments)
            self._model.flat.copy_(state.parameters)

    def _align(self, exchange: int, answer: Arrays) -> None:
        """The auxiliary head learns the gradients that came back; the rest of the clients' half stays."""
        self._load()
        rows = list(self._rows(exchange))
        lengths = [self._lower.lengths(inputs) for inputs, _ in rows]
        came = read_rows("gradient", answer, lengths, self._told.precision, self._module.hidden)
        seen = []
        for (inputs, targets), gradient in zip(rows, came, strict=True):
            with torch.no_grad():
                activation, kept = self._lower(inputs)
            seen.append(Seen(activation, kept, targets.to(self._device), gradient.to(self._device)))
        for number in range(self._trainer.alignments):
            apart = misalignment(self._auxiliary, self._task, seen)
            if not number:
                self._count("auxiliary_error", apart.item() ** 0.5)
            _, step = self._model.pulled([apart], [None])
            self._model.flat.sub_(step, alpha=self._trainer.auxiliary_lr)
        self.state.parameters.copy_(self._model.flat)

    @cached_property
    def _is_auxiliary(self) -> Tensor:
        """Which parameters are the auxiliary head's, (d,) bool."""
        layout = self._model.layout
        part = {
            n: s for n, s in zip(layout.names, layout.shapes, strict=True) if n.startswith("aux")
        }
        mask = covered(Layout(tuple(part), tuple(part.values())), layout)
        return torch.from_numpy(mask).to(self._device)

    @property
    def _auxiliary(self) -> nn.ModuleDict:
        heads = self._lower.auxiliary
        if heads is None:
            raise ValueError("client.auxiliary_steps needs a model with an auxiliary head")
        return heads

    def _leak(self, inputs: Tensor, activation: Tensor, lengths: Tensor) -> Tensor:
        """NoPeek's term of the loss."""
        term = NoPeek(self._trainer.nopeek)
        embedded = self._lower.embedded(inputs[:, : activation.shape[1]])
        leak = term.correlation(embedded, activation, lengths)
        self._count("distance_correlation", leak.item())
        return term.alpha * leak

    def _count(self, name: str, value: float) -> None:
        """One more value of a figure, of which the mean is reported."""
        figures = self.state.figures
        figures[name] = figures.get(name, 0.0) + value
        figures[f"{name}/count"] = figures.get(f"{name}/count", 0.0) + 1

    def _finite(self, tensor: Tensor, exchange: int) -> None:
        if not bool(torch.isfinite(tensor).all()):
            raise TrainingDivergedError(
                f"client {self._job.client}: what its half computes is not finite at exchange {exchange + 1}:"
                f" lower client.lr (now {self._trainer.lr:g}) or set client.max_grad_norm"
            )
