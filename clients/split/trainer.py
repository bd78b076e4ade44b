"""The clients' half of split training: a turn at a time, each from what lies on the disk.

Thapa et al. 2022, "SplitFed: When Federated Learning Meets Split Learning", Algorithm 2 (ClientUpdate and
ClientBackprop). A deployed client is a process a message, so nothing waits for the server's gradient in memory: it
comes with the request for the next turn, the forward pass of the turn before is computed again with the same
parameters, and its gradient is what the whole model's would be.

This file is what a request becomes; `local` is the arithmetic of it. What the server does with an activation is not
known in either.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Protocol, Self, runtime_checkable

import numpy as np
import torch
from annotated_types import Ge, Gt
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from clients.resident import ResidentModel, Shapes
from clients.split.half_done import HalfDone, HalfDoneFolder
from clients.split.local import Local, Told
from clients.tasks import Task
from clients.trainers.adamw import AdamW
from clients.trainers.sgd import SGD, Fit, FitJob, TrainingDivergedError
from strategies.collectors.split_session import LAST, SPLIT
from strategies.collectors.turns import write_turn
from strategies.update import Layout
from strategies.wire import Refused, integer_in, unpack_model

Resident = Callable[[Shapes, Mapping[str, object]], ResidentModel]
"""The model that holds parameters of these names and shapes, given a request's settings."""


@runtime_checkable
class Turns(Protocol):
    """A trainer that answers requests that are no whole training."""

    def turn(self, job: FitJob, resident: Resident, task: Task) -> RecordDict:
        """The reply to one turn's request; raises `Refused` where it is out of order."""
        ...


@dataclass(frozen=True)
class SplitTrainer(AdamW):
    """Training of the clients' half.

    Attributes:
        optimizer: `adamw`, or `sgd` with `momentum`; of both halves, each with its own moments.
        noise: standard deviation of Gaussian noise on activations, in units of the median token's root mean square; 0
            for none. It hinders who looks at activations, and promises no ε.
        nopeek: weight of the distance correlation between tokens and activations in the clients' loss (Vepakomma et
            al. 2020, "NoPeek"); 0 for none.
        auxiliary_steps: q, mini-batches between two exchanges that clients train on alone, by a head of their own that
            learns to give the server's gradients (`clients.split.auxiliary`); 0 waits for the server at every step.
        auxiliary_lr: learning rate of that head's alignment.
        alignments: its steps at each exchange.
        folder: where half-done trainings lie; given by the application.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    noise: Annotated[float, Ge(0)] = 0.0
    nopeek: Annotated[float, Ge(0)] = 0.0
    auxiliary_steps: Annotated[int, Ge(0)] = 0
    auxiliary_lr: Annotated[float, Gt(0)] = 0.1
    alignments: Annotated[int, Ge(1)] = 5
    folder: Path | None = field(default=None, repr=False, compare=False)

    own_records: ClassVar[frozenset[str]] = frozenset({SPLIT})
    paces: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.optimizer == "adamw":
            super().__post_init__()
        if self.worker_momentum:
            raise ValueError("worker_momentum: the clients' half knows no whole update")

    def keeping(self, folder: Path) -> Self:
        """The same trainer, whose half-done trainings lie in a folder."""
        return replace(self, folder=folder)

    def with_lr(self, lr: float | None) -> Self:
        """The same trainer with another learning rate; None for the same one."""
        return self if lr is None else replace(self, lr=lr)

    def moments(self, start: Tensor) -> Tensor | None:  # type: ignore[override]  # none, where it is SGD
        """As the optimiser's."""
        return super().moments(start) if self.optimizer == "adamw" else SGD.moments(self, start)

    def step(
        self,
        parameters: Tensor,
        gradient: Tensor,
        start: Tensor,
        correction: Tensor | None,
        velocity: Tensor | None,
    ) -> None:
        """As the optimiser's."""
        rule = AdamW.step if self.optimizer == "adamw" else SGD.step
        rule(self, parameters, gradient, start, correction, velocity)

    def turn(self, job: FitJob, resident: Resident, task: Task) -> RecordDict:
        """Takes the answer to the last turn, and makes the next one.

        Raises:
            Refused: `phase`, for a turn that does not follow; `terms`; or as the answer's arrays deserve.
            TrainingDivergedError: a loss is not finite.
        """
        told = Told.of(job.settings)
        with torch.random.fork_rng(devices=[]):
            local = self._local(job, told, resident, task)
            arrays = local.turn(told.turn, _arrays(job))
        receipt: dict[str, int | bool] = {
            "client": job.client,
            "round": integer_in(ConfigRecord(dict(job.settings)), "server-round"),  # type: ignore[arg-type]
            "turn": told.turn,
            LAST: told.turn == local.last_turn,
        }
        return write_turn(SPLIT, arrays, receipt)

    def fit_one(self, job: FitJob, model: ResidentModel, task: Task) -> Fit:
        """Takes the answer to the last turn: the change of the clients' half in all turns.

        Raises:
            Refused: as `turn`.
        """
        told = Told.of(job.settings)
        model.load(job.arrays)
        with torch.random.fork_rng(devices=[]):
            local = self._local(job, told, lambda shapes, settings: model, task)
            local.take_answer(told.turn, _arrays(job))
        if not bool(torch.isfinite(local.state.parameters).all()):
            raise TrainingDivergedError(
                f"client {job.client}: its half is not finite after the last turn: lower client.lr (now {self.lr:g})"
            )
        model.flat.copy_(local.state.parameters)
        return Fit(model.sections(), len(job.examples), local.figures(), {})

    def _local(self, job: FitJob, told: Told, resident: Resident, task: Task) -> Local:
        """The client's training as it lies on the disk; begun, at the first turn."""
        if self.folder is None:
            raise ValueError("a split client needs a folder: SplitTrainer.keeping(folder)")
        folder = HalfDoneFolder(self.folder)
        state = folder.load(job.client, told.session)
        if state is None:
            if told.turn:
                raise Refused("phase", f"turn {told.turn} of a session that this client is not in")
            state = self._begun(job, told)
        model = resident(state.shapes, job.settings)
        if tuple(state.shapes.items()) != _shapes_of(model):
            raise Refused("shape", "the arrays that came are not those of the clients' half")
        return Local(self, folder, job, told, model, task, state)

    def _begun(self, job: FitJob, told: Told) -> HalfDone:
        layout = Layout.of(job.arrays)
        start = torch.from_numpy(layout.flatten(job.arrays))
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        return HalfDone(
            told.session, 0, shapes, start, self.moments(start), None, os.urandom(32).hex(), {}
        )


def _arrays(job: FitJob) -> Mapping[str, NDArray[np.generic]]:
    """What crossed the cut."""
    return unpack_model(job.records.get(SPLIT, ArrayRecord()))


def _shapes_of(model: ResidentModel) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(zip(model.layout.names, model.layout.shapes, strict=True))
