"""FedSGD: a client sends minus the mean gradient of one mini-batch, at the model that it was sent.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", §2 (FedSGD; here with
mini-batches for the client's whole data): no local step, so the server's optimiser takes all of them, and momentum,
Adam and schedules are its own.

It is the plaintext twin of encrypted training, which computes the same gradients on ciphertexts: same mini-batches,
same order of them (`clients.encrypted.schedule`), same losses. It knows nothing of keys or ciphertexts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor

from clients.encrypted.schedule import batch_of_round, batches
from clients.resident import ResidentModel
from clients.tasks import Examples, Task
from clients.trainers.sgd import SGD, Fit, FitJob, TrainingDivergedError, seed_generators
from strategies.update import DELTA, Section
from strategies.wire import Refused


@dataclass(frozen=True)
class FedSgd(SGD):
    """One mini-batch's mean gradient a round, its sign turned: an update is a change, and a gradient points uphill.

    Attributes:
        batch_size: m, the most examples of a mini-batch; all of them are of about that size.
        loss: `cross_entropy` is the task's own; `squared` is half the squared distance of the outputs from the label's
            indicator, ½‖o − y‖².
        seed: of the mini-batches and their order; the run's.
    """

    batch_size: Annotated[int, Ge(1)] = 512
    loss: Literal["cross_entropy", "squared"] = "cross_entropy"
    seed: Annotated[int, Ge(0)] = 0

    # Settings of local steps, of which there are none.
    local_epochs: int = field(default=1, init=False, repr=False)
    lr: float = field(default=1.0, init=False, repr=False)
    momentum: float = field(default=0.0, init=False, repr=False)
    weight_decay: float = field(default=0.0, init=False, repr=False)
    max_grad_norm: float | None = field(default=None, init=False, repr=False)

    paces: ClassVar[bool] = False
    stackable: ClassVar[bool] = False
    mends: ClassVar[frozenset[str]] = frozenset()  # one gradient, whole, and no step of its own

    def batch(self, job: FitJob) -> np.ndarray:
        """Rows of the mini-batch that a job's round is on, (k,) int64.

        Raises:
            Refused: `malformed`, where there are several and the request does not say its round.
        """
        cut = batches(job.examples.targets.numpy(), self.batch_size, self.seed, job.client)
        if len(cut) == 1:  # a server's own job on its root data names no round
            return cut[0]
        return cut[batch_of_round(_round_of(job.settings), len(cut), self.seed, job.client)]

    def fit_one(self, job: FitJob, model: ResidentModel, task: Task) -> Fit:
        """The gradient of one client.

        Raises:
            TrainingDivergedError: the loss or its gradient is not finite.
            Refused: `malformed`, as `batch` does.
        """
        batch = job.examples.take(self.batch(job))
        model.load(job.arrays)
        model.module.train()
        with torch.random.fork_rng(devices=[]):
            seed_generators(model.flat.device, job.seed)
            loss = self._loss(model, task, batch)
            gradient = model.flattened(model.gradients(loss)).cpu().numpy()
        if not np.isfinite(gradient).all() or not torch.isfinite(loss):
            raise TrainingDivergedError(
                f"client {job.client}'s loss or its gradient is not finite at the model that it was sent: "
                "lower server.lr"
            )
        sections = dict(
            model.sections()
        )  # running statistics may have moved; the parameters have not
        layout = sections[DELTA].layout
        change = layout.flatten(model.layout.views(gradient))
        sections[DELTA] = Section(np.negative(change, out=change), layout)
        return self.concluded(job, sections, [loss.item()])

    def _loss(self, model: ResidentModel, task: Task, batch: Examples) -> Tensor:
        device = model.flat.device
        inputs, targets = batch.inputs.to(device), batch.targets.to(device)
        with torch.autocast(
            device.type, torch.bfloat16, enabled=self.amp and device.type == "cuda"
        ):
            outputs = model.module(inputs)
            if self.loss == "squared":
                return squared_loss(outputs, targets)
            return task.loss(outputs, targets)


def squared_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over examples of ½‖o − y‖², whose gradient at an output is o − y: a polynomial, unlike cross-entropy's.

    Args:
        outputs: (n, K).
        targets: (n,) long, classes; y is their indicator, (n, K).

    Raises:
        ValueError: the targets are no class labels.
    """
    if targets.ndim != 1 or targets.is_floating_point():
        raise ValueError("loss=squared needs one class label an example: use loss=cross_entropy")
    wanted = F.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
    return 0.5 * (outputs - wanted).square().sum(dim=1).mean()


def _round_of(settings: Mapping[str, object]) -> int:
    number = settings.get("server-round")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise Refused("malformed", f"the request's 'server-round' is {number!r}, not a round")
    return number
