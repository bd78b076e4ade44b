"""The data owner as a Flower client: it is sent ciphertexts, and never the model.

Its update is minus the mean gradient of one mini-batch, as FedSGD's (McMahan et al. 2017, §2), which the compute party
evaluates on the owner's ciphertexts (K. Nandakumar et al. 2019, "Towards Deep Neural Network Training on Encrypted
Data"). A round is a few turns: which key and which mini-batch; what of them the other side lacks; with cross-entropy
the errors of the logits; and at last the packed means, whose decryption is an ordinary update, clipped, noised and
combined like all others.

Each turn is made from what lies on the owner's disk (`half_done`), since a deployed client is a process a message.
What comes is hostile until checked. How anything is computed on ciphertexts is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from flwr.app import RecordDict

from clients.encrypted.holder import KeyHolder
from clients.encrypted.turn import Arrays, OwnerTurn, Told, arrays_of
from clients.resident import ResidentModel
from clients.split.trainer import Resident
from clients.tasks import Task
from clients.trainers.sgd import Fit, FitJob
from strategies.collectors.encrypted import (
    COMPUTE,
    ENCRYPTED,
    OWNER,
    REFUSED,
    ROLE,
    Served,
)
from strategies.collectors.turns import LAST, Learner, write_turn
from strategies.update import DELTA, Layout, Section
from strategies.wire import Refused


@dataclass(frozen=True)
class EncryptedTrainer(KeyHolder):
    """The key's half of a training step; or, for the client that computes, the other one.

    Attributes:
        party: what computes, on the client that computes for the others; given by the application.
        computes: the client that does; given by the application. The other settings are those of `KeyHolder`.
    """

    party: Served | None = field(default=None, repr=False, compare=False)
    computes: int | None = field(default=None, repr=False, compare=False)
    _learners: dict[str, Learner] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    own_records: ClassVar[frozenset[str]] = frozenset({ENCRYPTED})

    def turn(self, job: FitJob, resident: Resident, task: Task) -> RecordDict:
        """The reply to one turn: an owner's, or the compute party's to another owner's.

        Raises:
            Refused: `terms`, `phase`, `missing`, `key`, or as the answer's arrays deserve.
            TrainingDivergedError: the logits have left their range.
        """
        if job.settings.get(ROLE) == COMPUTE:
            return self._computed(job)
        turn = OwnerTurn(self, job, resident({}, job.settings).module)
        arrays, last = turn.reply()
        return write_turn(ENCRYPTED, arrays, {**turn.receipt, LAST: last})

    def fit_one(self, job: FitJob, model: ResidentModel, task: Task) -> Fit:
        """Minus the decrypted mean gradient, of the mini-batch that the round is on.

        Raises:
            Refused: as `turn`.
            TrainingDivergedError: a gradient has left its range.
        """
        turn = OwnerTurn(self, job, model.module)
        gradients, metrics = turn.conclude()
        layout = Layout.of(
            dict(zip(model.layout.names, map(np.empty, model.layout.shapes), strict=True))
        )
        change = layout.flatten(gradients)
        section = Section(np.negative(change, out=change), layout)
        fit = self.concluded(job, {DELTA: section}, [metrics["train_loss"]])
        return replace(fit, metrics={**metrics, **fit.metrics})

    def _computed(self, job: FitJob) -> RecordDict:
        """The compute party's answer to an owner's turn, which the server has passed on."""
        told, owner = Told.of(job.settings), job.settings.get(OWNER)
        if self.party is None or job.client != self.computes or type(owner) is not int:
            raise Refused("terms", "this client computes for nobody")
        receipt: dict[str, bool | int | str] = {**told.receipt(job.client), OWNER: owner}
        learner = self._learners.get(told.session)
        if learner is None:
            self._learners.clear()
            learner = self._learners[told.session] = self.party.begin(job.arrays)
        try:
            arrays: Arrays = learner.answer(owner, arrays_of(job))
        except Refused as refused:
            arrays, receipt[REFUSED] = {}, refused.reason
        return write_turn(ENCRYPTED, arrays, receipt)
