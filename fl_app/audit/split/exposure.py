"""What a split run lets an observer see, made again from the run's own parts: its model, its clients' texts, its wire.

Activations, gradients and updates come from the code that clients and server run; the audit adds public text, which
the observer has, and the victim's text, by which guesses are judged. Public text is docstrings of installed packages
that the task does not read, cut into the model's tokens as the task's texts are.

What the attacks make of it is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from numpy.typing import NDArray
from torch import Tensor

from clients.places import absolute
from clients.resident import ResidentModel
from clients.split.coding import Precision, decode, encode, mask_of
from clients.split.defence import GaussianNoise, NoPeek
from clients.split.model import SplitLora
from clients.split.trainer import SplitTrainer
from clients.tasks import Examples
from clients.tasks.docstrings import read_docstrings
from clients.tasks.text import tokens
from fl_app.assembly import Assembly
from fl_app.audit.target import Target
from fl_app.config.faults import ConfigError, Fault
from strategies.ranges import Ranged
from strategies.seeds import generator

PUBLIC = ("numpy", "transformers", "sympy", "networkx", "pandas", "scipy")
"""The first two of them that the task does not read are the public text."""


class NotApplicableError(Exception):
    """An attack that says nothing of this run; the message says why."""


@dataclass(frozen=True)
class Sizes(Ranged):
    """How much an audit tries.

    Attributes:
        private: clients' texts that activations are inverted of.
        public: texts of each of two packages that the inverter learns on.
        labelled: clients' examples whose labels are looked for.
        spans: batches whose tokens are looked for in a gradient, of each size.
        senders: clients whose updates are told apart.
        rounds: that they send updates in.
        examples: of each of them a round.
        seconds: after which no further attack begins.
    """

    private: Annotated[int, Ge(2)] = 48
    public: Annotated[int, Ge(20)] = 150
    labelled: Annotated[int, Ge(8)] = 128
    spans: Annotated[int, Ge(2)] = 5
    senders: Annotated[int, Ge(2)] = 6
    rounds: Annotated[int, Ge(2)] = 4
    examples: Annotated[int, Ge(1)] = 8
    seconds: Annotated[float, Gt(0)] = 150.0


@dataclass(frozen=True)
class Wire:
    """What is done to an activation before anybody sees it.

    Attributes:
        precision: of what travels.
        noise: standard deviation, as the trainer's.
        nopeek: weight of the distance correlation in the clients' loss: in gradients only, activations show it where
            the run was trained with it.
    """

    precision: Precision = "fp32"
    noise: float = 0.0
    nopeek: float = 0.0

    @property
    def name(self) -> str:
        """In words."""
        parts = [f"noise {self.noise:g}"] if self.noise else []
        parts += [self.precision] if self.precision != "fp32" else []
        parts += [f"NoPeek {self.nopeek:g}"] if self.nopeek else []
        return ", ".join(parts) or "none"

    def seen(self, activation: Tensor) -> Tensor:
        """An activation, (b, l, h) float32, as the other side decodes it."""
        noised = GaussianNoise(self.noise)(activation) if self.noise else activation
        return self.coded(noised)

    def coded(self, tensor: Tensor) -> Tensor:
        """The same, or a gradient, through the wire's precision alone."""
        if self.precision == "fp32":
            return tensor.detach()
        return decode(encode(tensor, self.precision), self.precision, tuple(tensor.shape))


@dataclass(frozen=True)
class Texts:
    """Texts as the model is given them.

    Attributes:
        examples: inputs, (n, length) long, and targets; of public texts these are zeros.
        lengths: (n,) long.
        scored: (n, length) bool: real tokens, but for a first or last one that all texts have in common.
    """

    examples: Examples
    lengths: Tensor
    scored: Tensor

    @property
    def truth(self) -> Tensor:
        """The tokens to be found, (t,) long, text by text."""
        return self.examples.inputs[self.scored]

    @property
    def owner(self) -> NDArray[np.int64]:
        """Which text each of them is of, (t,)."""
        found: NDArray[np.int64] = self.scored.nonzero()[:, 0].numpy()
        return found


def texts_of(examples: Examples, padding_id: int) -> Texts:
    """Texts of examples whose padding stands at the end."""
    ids = examples.inputs
    lengths = (ids != padding_id).sum(dim=1).clamp(min=1)
    scored = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
    rows = torch.arange(len(ids))
    for places in (torch.zeros_like(lengths), lengths - 1):
        if len(ids) > 1 and bool((ids[rows, places] == ids[0, places[0]]).all()):
            scored[rows, places] = False
    return Texts(examples, lengths, scored)


class Exposure:
    """A run's model and texts, and what can be seen of them.

    Args:
        target: a run of a split model.
        sizes: how many texts.

    Raises:
        ConfigError: the run's model is not cut, or its file does not fit.
    """

    def __init__(self, target: Target, sizes: Sizes) -> None:
        self.target, self.sizes = target, sizes
        self.assembly = target.assembly
        if not self.assembly.split:
            raise ConfigError(
                [Fault("--split", "needs a run of strategy=split_lora", str(target.path))]
            )
        assert isinstance(self.assembly.trainer, SplitTrainer)
        self.trainer: SplitTrainer = self.assembly.trainer
        self.arrays: Mapping[str, NDArray[np.generic]] = target.model()
        self.task = self.assembly.task
        arguments = target.config.collector.arguments
        self.wire = Wire(arguments["precision"], self.trainer.noise, self.trainer.nopeek)
        self.seed = target.config.seed
        own = self._filled(self.assembly)
        self.at = own.at
        self._modules = {own.at: own}

    def module(self, at: int | None = None) -> SplitLora:
        """The released model, cut where the run cuts it or elsewhere; frozen weights are in memory once a cut."""
        at = self.at if at is None else at
        if at not in self._modules:
            config = self.target.config
            arguments = {**config.model.arguments, "split_point": at}
            model = config.model.model_copy(update={"arguments": arguments})
            made = self._filled(Assembly(config.model_copy(update={"model": model})))
            self._modules = {self.at: self._modules[self.at], at: made}
        return self._modules[at]

    def _filled(self, assembly: Assembly) -> SplitLora:
        """An assembly's model with the released arrays."""
        module = assembly.module()
        assert isinstance(module, SplitLora)
        try:
            ResidentModel(module, self.arrays).load(self.arrays)
        except ValueError as error:
            raise ConfigError([Fault("RUN", str(error), str(self.target.path))]) from error
        return module.eval()

    @cached_property
    def private(self) -> Texts:
        """Some texts that clients train on, of all clients."""
        return self._drawn(self.sizes.private, "private")

    @cached_property
    def labelled(self) -> Texts:
        """Some with the labels that their clients train on."""
        return self._drawn(self.sizes.labelled, "labelled")

    def _drawn(self, count: int, name: str) -> Texts:
        clients = self.target.num_clients
        data = self.assembly.data(clients)
        own = [data.train(client) for client in range(min(clients, count))]
        inputs, targets = (
            torch.cat([getattr(one, part) for one in own]) for part in ("inputs", "targets")
        )
        everything = Examples(inputs, targets)
        order = generator(self.seed, f"audit {name}").permutation(len(everything))
        return texts_of(everything.take(order[:count]), self.task.padding_id)

    @cached_property
    def public(self) -> Texts:
        """Texts of packages that the task does not read, as long as the task's."""
        config = self.target.config
        used = config.task.arguments.get("packages") or ()
        packages = tuple(sorted([name for name in PUBLIC if name not in used][:2]))
        found = read_docstrings(packages, self.sizes.public, 12)
        place = absolute(str(config.model.arguments["pretrained"]), config.directory)
        way = tokens([], vocab_size=3, max_length=self.task.input_shape[0], tokenizer=place)
        ids = way.encode([one.text for one in found])
        return texts_of(Examples(ids, torch.zeros(len(ids), dtype=torch.long)), way.padding_id)

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """The tokens that begin and end every text; where none begins it, the most frequent of public text."""
        texts = self.public
        ids, last = texts.examples.inputs, texts.lengths[0] - 1
        before = [int(ids[0, 0])] if not texts.scored[0, 0] else [int(texts.truth.mode().values)]
        return before, [] if texts.scored[0, last] else [int(ids[0, last])]

    def batches(self, texts: Texts) -> Sequence[Examples]:
        """In the sizes that clients train on."""
        rows = torch.split(torch.arange(len(texts.lengths)), self.trainer.batch_size)
        return [texts.examples.take(part) for part in rows]

    def activations(self, at: int, texts: Texts, wires: Sequence[Wire]) -> list[Tensor]:
        """By wire, what is seen of the tokens that are scored, (t, h)."""
        lower, length = self.module(at).lower, texts.scored.shape[1]
        found: list[list[Tensor]] = [[] for _ in wires]
        with torch.no_grad():
            for batch in self.batches(texts):
                activation, _ = lower(batch.inputs)
                for parts, wire in zip(found, wires, strict=True):
                    seen = wire.seen(activation)
                    parts.append(F.pad(seen, (0, 0, 0, length - seen.shape[1])))
        return [torch.cat(parts)[texts.scored] for parts in found]

    def gradients(self, batch: Examples, wire: Wire, *, mean: bool = False) -> dict[str, Tensor]:
        """What one backward pass sends over the wire and leaves at the clients' adapters.

        Args:
            batch: of texts.
            wire: what protects.
            mean: of the batch, as in training; else each example's own, summed.

        Returns:
            `cut`: of the activation, (b, l, h). U-shaped, `states`: of what the server's half gave, (b, l, h).
            `adapters`: of the clients' adapters, (d,) float32.
        """
        lower, upper = self.module().lower, self.module().upper
        activation, lengths = lower(batch.inputs)
        received = wire.seen(activation).requires_grad_()
        output = upper(received, lengths)
        if not self.module().u_shaped:
            (back,) = torch.autograd.grad(self._loss(output, batch, mean), received)
            found = {"cut": wire.coded(back)}
        else:
            states = wire.coded(output).requires_grad_()
            loss = self._loss(lower.finish(states, lengths), batch, mean)
            (slope,) = torch.autograd.grad(loss, states)
            found = {"states": wire.coded(slope)}
            (back,) = torch.autograd.grad(output, received, found["states"])
            found["cut"] = wire.coded(back)
        total = (activation * found["cut"]).sum()
        if wire.nopeek:
            embedded = lower.embedded(batch.inputs[:, : activation.shape[1]])
            total = total + NoPeek(wire.nopeek)(embedded, activation, lengths)
        trained = [one for one in lower.adapters.parameters() if one.requires_grad]
        parts = torch.autograd.grad(total, trained)
        return {**found, "adapters": torch.cat([part.flatten() for part in parts])}

    def _loss(self, logits: Tensor, batch: Examples, mean: bool) -> Tensor:
        missing = batch.inputs.shape[1] - logits.shape[1] if logits.dim() == 3 else 0
        whole = F.pad(logits, (0, 0, 0, missing)) if missing else logits
        losses = self.task.losses(whole, batch.targets)
        return losses.mean() if mean else losses.sum()


def pooled(gradient: Tensor, inputs: Tensor, padding_id: int) -> NDArray[np.float64]:
    """Each example's gradient, (b, h), of its tokens' together, (b, l, h)."""
    lengths = (inputs != padding_id).sum(dim=1).clamp(min=1)
    mask = mask_of(lengths, gradient.shape[1]).unsqueeze(2)
    found: NDArray[np.float64] = (gradient * mask).sum(dim=1).double().numpy()
    return found
