"""The server's half of split training: what an activation is trained with, and the gradient that goes back.

Thapa et al. 2022, "SplitFed: When Federated Learning Meets Split Learning", Algorithm 1 (MainServer): forward from the
activation, loss, backward, a step of the server's own part. U-shaped (Vepakomma et al. 2018, "Split learning
for health", figure 2b), labels stay with the client: states go back first, and their gradients come up.

One module serves all clients; each learner's parameters take their place in it. What comes in is a peer's: everything
is held against what was asked for before a number of it is used. Nothing here knows of messages or rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.lora.adapters import OF_GOALS
from clients.resident import ResidentModel
from clients.split.coding import Precision, decode, encode, relative_error
from clients.split.model import SplitLora, Upper, fitting
from clients.split.trainer import SplitTrainer
from clients.split.turns import Batch, read_batches, read_rows, write_rows
from clients.tasks import Task
from clients.tasks.task import UNLABELLED
from clients.threads import one_thread
from strategies.protocols import ConfigValue
from strategies.update import Layout, Vector
from strategies.wire import Refused

Arrays = Mapping[str, NDArray[np.generic]]


class UpperServer:
    """The server's half of a split model, for sessions to begin learners on (`strategies`' `Served`).

    Args:
        module: both halves of the model, or the server's.
        names: the arrays of the clients' half, of all heads where clients hold them.
        task: the loss.
        trainer: the optimiser, as the clients'; `lr` may be another.
        precision: of what crosses the cut.
        most_batches: of one turn.
    """

    def __init__(
        self,
        module: SplitLora,
        names: frozenset[str],
        task: Task,
        trainer: SplitTrainer,
        precision: Precision,
        *,
        most_batches: int = 1_000,
    ) -> None:
        self.module, self.task, self.trainer = module, task, trainer
        self.precision, self.most_batches = precision, most_batches
        # Places, padding among them: what is unpacked is no larger than an honest batch, however little was sent.
        self.most_tokens = trainer.batch_size * module.longest
        self._names = names
        self._model: ResidentModel | None = None

    @property
    def partial(self) -> bool:
        """Whether clients train heads of their own."""
        return len(self.task.goals) > 1

    def describe(self) -> str:
        """Who holds what of the model, and what the server is sent."""
        model = self.module
        ends = " and what comes last" if model.u_shaped else ""
        labels = "the texts themselves, as labels" if model.of_tokens else "labels"
        sees = "activations" if model.u_shaped else f"activations and {labels}"
        return f"clients hold {model.at} of {model.blocks} blocks{ends}, the server sees {sees}"

    def clients_names(self, client: int) -> frozenset[str]:
        """The arrays that a client holds: of several goals' heads, where clients hold them, its own goal's."""
        goal = self.task.goal_of(client)
        if goal is None:
            return self._names
        others = tuple(
            f"{kind}.{name}." for kind in OF_GOALS for name in self.task.goals if name != goal
        )
        return frozenset(name for name in self._names if not name.startswith(others))

    def settings(self) -> Mapping[str, ConfigValue]:
        """Where the cut is."""
        return {"split.at": self.module.at}

    def begin(self, sent: Arrays) -> UpperLearner:
        """A learner that starts from the whole model as it was sent."""
        own = {name: array for name, array in sent.items() if name not in self._names}
        if self._model is None:
            device = self.trainer.torch_device
            self._model = ResidentModel(self.module, own, device)
        return UpperLearner(self, self._model, own)


@dataclass
class _Figures:
    """Sums over one client's batches."""

    batches: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        return {name: value / max(1, self.batches) for name, value in self.sums.items()}


class UpperLearner:
    """The server's half at work from one state of the model on.

    Args:
        server: its settings.
        model: the module that all learners share.
        sent: the server's arrays as they were sent.
    """

    def __init__(self, server: UpperServer, model: ResidentModel, sent: Arrays) -> None:
        self._server, self._model = server, model
        start = torch.from_numpy(model.layout.flatten(sent))
        self._start = start.to(model.flat.device)
        self._parameters = self._start.clone()
        self._moments = server.trainer.moments(self._start)
        self._upper: Upper = server.module.upper
        self._held: dict[int, list[Batch]] = {}
        self._figures: dict[int, _Figures] = {}
        self._touched: set[str] = set()

    def answer(self, client: int, arrays: Arrays) -> dict[str, NDArray[np.generic]]:
        """Trains on one turn of a client; what goes back.

        A turn that is refused leaves nothing in parameters or moments, which may be those of other clients too.

        Raises:
            Refused: `malformed`, `missing`, `dtype`, `shape`, `range`, `too_large`, `not_finite`: what no honest client
                sends.
        """
        self._model.flat.copy_(self._parameters)
        moments, touched = self._moments, set(self._touched)
        self._moments = None if moments is None else moments.clone()
        figures = self._figures.setdefault(client, _Figures())
        try:
            with one_thread():  # as clients train: the same bits whatever the number of threads
                answer = self._answer(client, arrays, figures)
                self._check_finite()
        except BaseException as error:
            self._moments, self._touched = moments, touched
            if isinstance(error, Exception) and not isinstance(error, Refused | MemoryError):
                # Targets past the classes, say: the task's own code finds them.
                raise Refused(
                    "malformed", f"nothing can be trained on this turn: {error!s:.200}"
                ) from error
            raise
        self._parameters.copy_(self._model.flat)
        return answer

    def change(self, client: int) -> tuple[Vector, Layout, Mapping[str, float]]:
        """What has changed of the server's parameters, but for heads that nobody trained, and a client's figures."""
        layout = self._model.layout
        shapes = {
            name: shape
            for name, shape in zip(layout.names, layout.shapes, strict=True)
            if not name.startswith("heads.") or name in self._touched
        }
        kept = Layout(tuple(shapes), tuple(shapes.values()))
        change = (self._parameters - self._start).cpu().numpy()
        vector = kept.flatten(layout.views(change))
        return vector, kept, self._figures.get(client, _Figures()).means()

    def _check_finite(self) -> None:
        """An activation may be finite, and what is made of it not."""
        for state in (self._model.flat, self._moments):
            if state is not None and not bool(torch.isfinite(state).all()):
                raise Refused("not_finite", "a step on this client's activations is not finite")

    def _check_goal(self, client: int, targets: Tensor) -> None:
        """Labels of other goals than a client's own would train heads that are not its to train."""
        task = self._server.task
        goal = task.goal_of(client)
        if goal is None:
            return
        if targets.shape[1:] != (len(task.goals),):
            raise Refused("shape", f"targets {tuple(targets.shape)} of {len(task.goals)} goals")
        others = [number for number, name in enumerate(task.goals) if name != goal]
        if bool((targets[:, others] != UNLABELLED).any()):
            raise Refused("range", "labels of goals that are other clients'")

    def _answer(
        self, client: int, arrays: Arrays, figures: _Figures
    ) -> dict[str, NDArray[np.generic]]:
        held = self._held.pop(client, None)
        if held is not None:
            return self._descend(held, arrays, figures)
        server = self._server
        batches = read_batches(
            arrays,
            server.precision,
            hidden=server.module.hidden,
            longest=server.module.longest,
            most_tokens=server.most_tokens,
            most_batches=server.most_batches,
        )
        figures.batches += len(batches)
        if not server.module.u_shaped:
            return self._train(client, batches, figures)
        self._held[client] = batches
        with torch.no_grad():
            states = [self._forward(batch.activation, batch).cpu() for batch in batches]
        return write_rows("states", states, [batch.lengths for batch in batches], server.precision)

    def _forward(self, activation: Tensor, batch: Batch) -> Tensor:
        output: Tensor = self._upper(activation, batch.lengths.to(activation.device))
        return output

    def _train(
        self, client: int, batches: Sequence[Batch], figures: _Figures
    ) -> dict[str, NDArray[np.generic]]:
        """A step on each batch, one after the other; the gradients of their activations."""
        gradients = []
        for batch in batches:
            if batch.targets is None:
                raise Refused("missing", "a batch came without its targets")
            self._check_goal(client, batch.targets)
            activation = self._given(batch.activation)
            logits = self._forward(activation, batch)
            targets = fitting(batch.targets, logits).to(activation.device)
            loss = self._server.task.loss(logits, targets)
            if not bool(torch.isfinite(loss)):
                raise Refused("not_finite", "the loss on this client's activations is not finite")
            figures.add("train_loss", loss.item())
            gradients.append(self._backward(loss, activation, None, figures, step=True)[0])
        return write_rows(
            "gradient", gradients, [batch.lengths for batch in batches], self._server.precision
        )

    def _descend(
        self, batches: Sequence[Batch], arrays: Arrays, figures: _Figures
    ) -> dict[str, NDArray[np.generic]]:
        """The steps of batches whose states went down, given these states' gradients."""
        server, lengths = self._server, [batch.lengths for batch in batches]
        came = read_rows("gradient", arrays, lengths, server.precision, server.module.hidden)
        gradients, steps = [], []
        for batch, given in zip(batches, came, strict=True):
            activation = self._given(batch.activation)
            states = self._forward(activation, batch)
            back, step = self._backward(states, activation, given, figures, step=False)
            gradients.append(back)
            steps.append(step)
        for step in steps:
            server.trainer.step(self._model.flat, step, self._start, None, self._moments)
        return write_rows("gradient", gradients, lengths, server.precision)

    def _backward(
        self,
        output: Tensor,
        activation: Tensor,
        given: Tensor | None,
        figures: _Figures,
        *,
        step: bool,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the activation, on the CPU, and of the parameters, (d,), whose step is made if `step`."""
        weight = None if given is None else given.to(activation.device)
        (found,), gradient = self._model.pulled([output], [weight], beside=[activation])
        views = self._model.layout.views(gradient.cpu().numpy())
        self._touched |= {n for n, g in views.items() if n.startswith("heads.") and g.any()}
        if step:
            self._server.trainer.step(self._model.flat, gradient, self._start, None, self._moments)
        back = torch.zeros_like(activation) if found is None else found
        precision = self._server.precision
        sent = decode(encode(back, precision), precision, back.shape)
        figures.add("gradient_error", relative_error(back, sent))
        return back.cpu(), gradient

    def _given(self, activation: Tensor) -> Tensor:
        return activation.to(self._model.flat.device).requires_grad_()
