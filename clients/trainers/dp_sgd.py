"""DP-SGD on a client: its examples are protected from whoever sees its updates.

Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1, with the sampling that its analysis is of:
each example is in a batch by a coin of its own (q = B/n), and the sum of the clipped gradients is divided by the
expected size of a batch, whatever came. A batch that came out empty is still a step, of noise alone. What is done with
the noised gradient (momentum, weight decay, a mean over rounds) costs nothing more.

Coins and noise come from the operating system's entropy, never from a seed. A round is charged to the client's ledger
before it begins (`clients.dp_ledger`). Nothing but the update and its ε leaves: losses are functions of the examples.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from clients.dp_ledger import ClientLedger
from clients.resident import ResidentModel
from clients.tasks import Task
from clients.trainers.dp_account import AccountantName, Budget, Round
from clients.trainers.per_example import clipping, trained
from clients.trainers.per_example_trial import require_per_example
from clients.trainers.sgd import SGD, Fit, FitJob, TrainingDivergedError
from strategies.privacy.examples import OwnAccounts
from strategies.privacy.noise import Entropy, Seeded, gaussian
from strategies.secagg.masks import keystream
from strategies.update import DELTA, EPSILON, Section
from strategies.wire import PAUSED, Refused


@dataclass(frozen=True)
class DpSgd(SGD):
    """Minibatch SGD with clipped per-example gradients and Gaussian noise; ⌈n/B⌉ steps an epoch.

    Attributes:
        max_grad_norm: C, to which each example's gradient is clipped in L2 norm.
        noise_multiplier: z; the noise on a sum of clipped gradients has standard deviation z·C. None: found for
            `target_epsilon`. 0 only with `reproducible_noise`.
        target_epsilon: ε that this client never passes; a request that would is refused. None: no bound.
        delta: δ, less than one over the client's number of examples.
        participations: rounds that the noise is found for, with the client's own q and number of steps. Each attempt
            of a round is one, whether its update is taken or not.
        accountant: `pld` is the tightest; `rdp` the quickest to find the noise.
        ghost: ghost clipping, for models whose per-example gradients don't fit in memory.
        max_physical_batch: examples at a time; the step is the same.
        reproducible_noise: coins and noise from the run's seed, for tests: no ε is claimed, and nothing is charged.

    Raises:
        ValueError: neither `noise_multiplier` nor `target_epsilon` is set, or a setting doesn't fit.
    """

    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    noise_multiplier: Annotated[float, Ge(0)] | None = None
    target_epsilon: Annotated[float, Gt(0)] | None = None
    delta: Annotated[float, Gt(0), Lt(1)] = 1e-5
    participations: Annotated[int, Ge(1)] = 1
    accountant: AccountantName = "pld"
    ghost: bool = False
    max_physical_batch: Annotated[int, Ge(1)] = 64
    reproducible_noise: bool = False

    stackable: ClassVar[bool] = False
    paces: ClassVar[bool] = False  # its account is of a fixed number of steps
    charged: ClassVar[bool] = True
    _ledgers: ClassVar[Path | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_multiplier is None and self.target_epsilon is None:
            raise ValueError(
                "client=dp_sgd needs client.target_epsilon, for which the noise is then found, or"
                " client.noise_multiplier"
            )
        if self.noise_multiplier == 0 and not self.reproducible_noise:
            raise ValueError(
                "client.noise_multiplier=0 has no epsilon: it is for client.reproducible_noise=true"
            )
        if self.amp:
            raise ValueError(
                "client=dp_sgd needs client.amp=false: norms in bfloat16 are off by up to a percent"
            )

    def promise(self) -> OwnAccounts:
        """What a server may say of clients that train so."""
        return OwnAccounts(
            self.delta,
            self.accountant,
            budget=self.target_epsilon,
            promised=not self.reproducible_noise,
        )

    def keeping(self, folder: Path) -> DpSgd:
        """The same trainer, of clients whose ledgers lie in this folder."""
        kept = copy.copy(self)
        object.__setattr__(kept, "_ledgers", folder)
        return kept

    def fit_one(self, job: FitJob, model: ResidentModel, task: Task) -> Fit:
        """Charges one client, then trains it.

        Raises:
            BudgetSpent: the client's ε would be passed.
            ValueError: the model can't be trained so, there are no examples, δ is too large for them, or the ledger
                can't be read.
            OSError: the ledger can't be written.
            Refused: the training itself failed; a server is not told why. Or `paused`, before anything is charged.
            TrainingDivergedError: the noised steps have left the finite numbers.
        """
        # Once it is charged it goes through to its end: coins and noise are never written down to go on from.
        if job.course.pause is not None and (reason := job.course.pause()) is not None:
            raise Refused(PAUSED, reason)
        each = Round.of(len(job.examples), self.batch_size, self.local_epochs)
        model.load(job.arrays)
        model.module.train()
        require_per_example(model, task, job.examples, ghost=self.ghost)
        noise, epsilon = self._charged(job, each)
        start = model.flat.clone()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(job.seed)
            try:
                self._descend_in_noise(job, model, task, start, each, noise)
            except (
                Exception
            ) as error:  # its text may hold an example's numbers: for the client's own log
                raise Refused("training", f"{type(error).__name__}: {error}") from error
        if not model.flat.isfinite().all():  # noised already: tells nothing of the examples
            raise TrainingDivergedError(
                f"client {job.client} left the finite numbers: lower client.lr (now {self.lr:g})"
            )
        fit = self.concluded(job, _delta_alone(model), [0.0] * each.steps)
        # Losses and the number of examples stay here; without a weight of its own each client counts as one.
        return replace(fit, num_examples=1, metrics=epsilon)

    def at_once(self, job: FitJob) -> int:
        """Examples whose gradients are in memory at a time."""
        micro_batch = job.course.micro_batch
        return min(self.max_physical_batch, micro_batch or self.max_physical_batch)

    def _charged(self, job: FitJob, each: Round) -> tuple[float, Mapping[str, float]]:
        """The noise multiplier, and the ε after this round to report, once the round is on the ledger."""
        count = len(job.examples)
        if self.delta >= 1 / count:
            raise ValueError(
                f"client.delta={self.delta:g} would allow one of {count} examples to be published: set it below"
                f" 1/{count} = {1 / count:.2g}"
            )
        budget = Budget(self.accountant, self.delta, self.target_epsilon, self.participations)
        noise = self.noise_multiplier
        if noise is None:
            noise = budget.noise_for(each)
        if self.reproducible_noise:
            return noise, {}
        if self._ledgers is None:
            raise ValueError("this trainer has no folder for its clients' ledgers: see `keeping`")
        ledger = ClientLedger(self._ledgers, job.client)
        return noise, {EPSILON: budget.charge(ledger, each.release(noise), each.steps)}

    def _descend_in_noise(
        self,
        job: FitJob,
        model: ResidentModel,
        task: Task,
        start: Tensor,
        each: Round,
        noise_multiplier: float,
    ) -> None:
        """The local steps."""
        device = model.flat.device
        entropy: Entropy = Seeded(job.seed, "dp-sgd") if self.reproducible_noise else os.urandom
        inputs, targets = job.examples.inputs.to(device), job.examples.targets.to(device)
        lr = self.lr * job.course.rate(0)
        after = SGD(lr=lr, momentum=self.momentum, weight_decay=self.weight_decay)
        velocity = torch.zeros_like(start) if self.momentum else None
        where = _trained_coordinates(model)
        gradient = torch.zeros_like(start)
        std = noise_multiplier * self.max_grad_norm
        coins = poisson_batches(len(targets), each.rate, each.steps, entropy)
        with clipping(
            model,
            task,
            norm=self.max_grad_norm,
            ghost=self.ghost,
            most=self.at_once(job),
        ) as clipped_sum:
            for batch in coins:
                rows = batch.to(device)
                total = clipped_sum(inputs[rows], targets[rows])
                noised = total.double().cpu() + std * torch.from_numpy(
                    gaussian(len(total), entropy)
                )
                gradient.zero_()
                gradient[where] = (noised / each.batch).to(device, torch.float32)
                with torch.no_grad():
                    after.step(model.flat, gradient, start, None, velocity)


def poisson_batches(count: int, rate: float, steps: int, entropy: Entropy) -> Iterator[Tensor]:
    """Rows of each step's batch, (k,) long: each row is in by a coin of its own.

    Args:
        count: rows there are.
        rate: probability of a coin, kept to 2⁻⁶⁴ and never above.
        steps: how many batches.
        entropy: of the coins.
    """
    stream = keystream(entropy(32))
    threshold = int(rate * 2.0**64)  # exact: a power of two
    for _ in range(steps):
        if threshold >= 2**64:
            yield torch.arange(count)
            continue
        words = np.frombuffer(stream.update(bytes(8 * count)), "<u8")
        yield torch.from_numpy(np.flatnonzero(words < np.uint64(threshold)))


def _trained_coordinates(model: ResidentModel) -> Tensor:
    """(d,) bool: what of the flat parameters is not frozen, in the order of `trained`."""
    frozen = {id(parameter) for parameter in model.travelling} - {id(p) for p in trained(model)}
    return torch.cat(
        [
            torch.full((p.numel(),), id(p) not in frozen, device=model.flat.device)
            for p in model.travelling
        ]
    )


def _delta_alone(model: ResidentModel) -> dict[str, Section]:
    """The model's change; buffers have not changed (`require_per_example`), and are not even looked at."""
    return {
        name: section if name == DELTA else replace(section, vector=np.zeros_like(section.vector))
        for name, section in model.sections().items()
    }
