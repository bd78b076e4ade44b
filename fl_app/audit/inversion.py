"""Gradient inversion: pictures made of what the server sees of one client.

The attack is that of Geiping, Bauermeister, Dröge, Moeller 2020, "Inverting Gradients – How Easy Is It to Break Privacy
in Federated Learning?", eq. 4. It is the worst case, on purpose: a client with one example takes one plain gradient
step from the run's initial model, and the attacker knows model, step and label (which an update tells: Zhao et al.
2020, "iDLG"). It looks for the picture x whose gradient points the same way as the update,

    minimise 1 − cos(∇loss(x, y), −Δ) + α·TV(x),

by Adam on the sign of x's gradient, within the range of the task's pictures. Cosines know no length: a clip alone,
which only shortens an update, hides nothing of it. Real update, real clip, real noise, real mask: each from the code
that a run uses. What resists this attack may give way to another one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from clients.resident import ResidentModel, arrays_of
from clients.tasks import Examples, Task
from clients.threads import one_thread
from clients.trainers import SGD
from clients.trainers.sgd import Fit, FitJob
from fl_app.audit.likeness import psnr, squared_error, ssim
from fl_app.audit.target import Target
from fl_app.audit.training import Progress
from fl_app.config.faults import ConfigError, Fault
from strategies.privacy.noise import gaussian
from strategies.secagg.fixed_point import FixedPoint
from strategies.secagg.masks import add_masks
from strategies.seeds import generator
from strategies.stages.clip import clip, l2_norm
from strategies.update import DELTA, Section, Update

PLAIN, CLIPPED, NOISED, MASKED = "plain", "clipped", "clipped + noise", "masked"
BLANK = "mean picture"
"""What a guess that has seen nothing looks like: the mean of the task's training pictures."""

UNSET_MULTIPLIER = 1.0
"""z of the noise where the run has none."""

_RATE, _TOTAL_VARIATION = 0.1, 1e-2
_COHORT = 10
"""Members that the mask's fixed-point numbers leave room for."""


@dataclass(frozen=True)
class Inversion:
    """What became of some pictures.

    Attributes:
        originals: (n, channels, height, width) within 0 … 1.
        found: by what the server saw, pictures of the same shape.
        norm: C of the clip.
        noise_multiplier: z of the noise: N(0, z²C²) on each element.
        norms: (n,) of the plain updates.
        steps: of the attack.
    """

    originals: Tensor
    found: Mapping[str, Tensor]
    norm: float
    noise_multiplier: float
    norms: NDArray[np.float64]
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types: for each view, each picture's figures."""
        return {
            "pictures": len(self.originals),
            "steps": self.steps,
            "clip": self.norm,
            "noise_multiplier": self.noise_multiplier,
            "update_norms": [round(float(norm), 6) for norm in self.norms],
            "views": {name: self.likeness(name) for name in self.found},
        }

    def likeness(self, name: str) -> dict[str, list[float]]:
        """MSE, PSNR (dB) and SSIM of each picture of a view."""
        figures = {"mse": squared_error, "psnr": psnr, "ssim": ssim}
        return {
            key: [round(float(value), 4) for value in measure(self.found[name], self.originals)]
            for key, measure in figures.items()
        }


def invert(
    target: Target,
    pictures: int,
    *,
    progress: Progress,
    steps: int = 600,
    multiplier: float | None = None,
    entropy: Callable[[int], bytes] = os.urandom,
) -> Inversion:
    """Attacks single updates of client 0, plain and protected.

    Args:
        target: the run: its task, model, step length, clip and noise.
        pictures: how many of client 0's examples, each alone in an update.
        progress: told of the attack's steps.
        steps: of the attack.
        multiplier: z; the run's, or 1, by default.
        entropy: of noise and masks.

    Raises:
        ConfigError: the task has no pictures, or the model can't be attacked so.
    """
    task = target.assembly.task
    examples = _examples(target, pictures)
    updates = [_update(target, examples.take([index])) for index in range(len(examples))]
    norms = np.array([l2_norm(update.delta.vector) for update in updates])
    norm, z = _norm(target, norms), multiplier or _multiplier(target)
    views = seen(updates, norm, z, entropy)
    attack = _Attack(target.assembly.module(), task, target.config.seed)
    training = task.train().inputs
    low, high = float(training.min()), float(training.max())
    labels = examples.targets.repeat(len(views))
    everything = torch.from_numpy(np.concatenate(list(views.values()))).float()
    with one_thread():  # the parts are too small to be worth sharing
        found = attack.run(everything, labels, low, high, steps, progress)
    originals, found, training = (
        (part - low) / (high - low) for part in (examples.inputs, found, training)
    )
    n = len(examples)
    named = {name: found[place * n : place * n + n] for place, name in enumerate(views)}
    named[BLANK] = training.mean(dim=0, keepdim=True).expand_as(originals)
    return Inversion(originals, named, norm, z, norms, steps)


def seen(
    updates: list[Update], norm: float, z: float, entropy: Callable[[int], bytes] = os.urandom
) -> dict[str, NDArray[np.float64]]:
    """What a server sees of each client, by how it is protected: (n, d) float64 each.

    Args:
        updates: n plain ones.
        norm: C of the clip.
        z: the noise's standard deviation over C.
        entropy: of noise and masks.
    """
    clipped = [clip(update, norm, (DELTA,)).delta.vector for update in updates]
    noised = [vector + z * norm * gaussian(len(vector), entropy) for vector in clipped]
    coding = FixedPoint(norm, _COHORT)
    masked = []
    for vector in clipped:
        upload = np.empty(len(vector), np.uint32)
        coding.encode(vector, upload)
        add_masks(upload, [entropy(32)], [entropy(32)])
        masked.append(coding.decode(upload))
    plain = [update.delta.vector for update in updates]
    views: dict[str, Sequence[NDArray[Any]]] = {
        PLAIN: plain,
        CLIPPED: clipped,
        NOISED: noised,
        MASKED: masked,
    }
    return {name: np.array(vectors, np.float64) for name, vectors in views.items()}


def _examples(target: Target, count: int) -> Examples:
    """Some of client 0's examples, any of them; refused where they are no pictures."""
    task = target.assembly.task
    own = target.assembly.data(target.num_clients).train(0)
    if len(task.input_shape) != 3 or not own.inputs.is_floating_point():
        name, shape = type(task).__qualname__, tuple(task.input_shape)
        raise ConfigError(
            [Fault("--inversion", f"needs pictures; {name} has inputs of shape {shape}")]
        )
    if task.goals:
        told = "guesses one label a picture, and this task has several goals: leave it out"
        raise ConfigError([Fault("--inversion", told)])
    order = generator(target.config.seed, "inversion").permutation(len(own))
    return own.take(order[:count])


def _multiplier(target: Target) -> float:
    promise = target.promise
    if promise is None or promise.unit != "client" or promise.noise_multiplier is None:
        return UNSET_MULTIPLIER
    return promise.noise_multiplier


def _norm(target: Target, norms: NDArray[np.float64]) -> float:
    """The run's own C, or a smaller one that these updates reach: what does not clip shows nothing of clipping."""
    node = target.config.clip
    own = node.arguments.get("norm") if node is not None else None
    reached = float(np.median(norms)) / 2
    return min(float(own), reached) if isinstance(own, float | int) else reached


def _update(target: Target, example: Examples) -> Update:
    """One plain step of the run's length on one example, by the client's own code."""
    assembly = target.assembly
    module = assembly.module()
    arrays = arrays_of(module)
    model = ResidentModel(module, arrays)
    trainer = SGD(local_epochs=1, batch_size=1, lr=assembly.trainer.lr, device="cpu")
    fit = trainer.fit_one(FitJob(0, arrays, {}, example, 0, {}, {}), model, assembly.task)
    return Update(_only_delta(fit), 1.0, (0,), 0)


def _only_delta(fit: Fit) -> dict[str, Section]:
    return {DELTA: fit.sections[DELTA]}


class _Attack:
    """Looks for pictures, many at once.

    Args:
        module: the network as the clients were sent it.
        task: gives the loss.
        seed: of the first guesses.
    """

    def __init__(self, module: nn.Module, task: Task, seed: int) -> None:
        self._module, self._task, self._seed = module.eval(), task, seed
        self._names = [name for name, _ in module.named_parameters()]
        self._parameters = [value.detach().clone() for value in module.parameters()]

    def run(
        self,
        updates: Tensor,
        labels: Tensor,
        low: float,
        high: float,
        steps: int,
        progress: Progress,
    ) -> Tensor:
        """(n, *input_shape) pictures from (n, d) updates and (n,) labels."""
        gradients = vmap(grad(self._loss), in_dims=(None, 0, 0))
        shape = (len(labels), *self._task.input_shape)
        random = torch.Generator().manual_seed(self._seed)
        found = torch.randn(shape, generator=random).mul_(0.1).requires_grad_()
        optimizer = torch.optim.Adam([found], lr=_RATE)
        schedule = torch.optim.lr_scheduler.MultiStepLR(
            optimizer, [steps * 5 // 8, steps * 7 // 8], gamma=0.3
        )
        for step in range(1, steps + 1):
            parts = gradients(self._parameters, found, labels)
            ours = torch.cat([part.flatten(1) for part in parts], dim=1)
            # The update is minus the gradient times the step's length.
            apart = 1 + F.cosine_similarity(ours, updates, dim=1)
            (slope,) = torch.autograd.grad(
                (apart + _TOTAL_VARIATION * _total_variation(found)).sum(), found
            )
            found.grad = slope.sign()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                found.clamp_(low, high)
            progress(step, steps)
        return found.detach()

    def _loss(self, parameters: list[Tensor], picture: Tensor, label: Tensor) -> Tensor:
        named = dict(zip(self._names, parameters, strict=True))
        output = functional_call(self._module, named, (picture.unsqueeze(0),))
        return self._task.losses(output, label.unsqueeze(0)).squeeze(0)


def _total_variation(pictures: Tensor) -> Tensor:
    down = (pictures[:, :, 1:] - pictures[:, :, :-1]).abs().mean(dim=(1, 2, 3))
    across = (pictures[:, :, :, 1:] - pictures[:, :, :, :-1]).abs().mean(dim=(1, 2, 3))
    return down + across
