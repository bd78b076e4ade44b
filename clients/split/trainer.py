"""The clients' half of split training: a turn at a time, each from what lies on the disk.

Thapa et al. 2022, "SplitFed: When Federated Learning Meets Split Learning", Algorithm 2 (ClientUpdate and
ClientBackprop). A deployed client is a process a message, so nothing waits for the server's gradient in memory: it
comes with the request for the next turn, the forward pass of the turn before is computed again with the same
parameters, and its gradient is what the whole model's would be.

This file is what a request becomes; `local` is the arithmetic of it, `steps` the optimiser and its settings. What the
server does with an activation is known in none of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Protocol, Self, runtime_checkable

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from clients.resident import ResidentModel, Shapes
from clients.split.half_done import HalfDone, HalfDoneFolder
from clients.split.local import Local, Told
from clients.split.steps import SplitSteps
from clients.tasks import Task
from clients.trainers.sgd import Fit, FitJob, TrainingDivergedError
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
class SplitTrainer(SplitSteps):
    """Training of the clients' half.

    Attributes:
        folder: where half-done trainings lie; given by the application. The other settings are those of `SplitSteps`.
    """

    folder: Path | None = field(default=None, repr=False, compare=False)

    own_records: ClassVar[frozenset[str]] = frozenset({SPLIT})
    paces: ClassVar[bool] = False

    def keeping(self, folder: Path) -> Self:
        """The same trainer, whose half-done trainings lie in a folder."""
        return replace(self, folder=folder)

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
