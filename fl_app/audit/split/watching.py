"""What gradients and updates of a run tell: labels, senders, and how much a defence changes of them.

The attacks' arithmetic is in `labels`, `senders` and `norms`, which know no run; here it meets the run's examples, its
wire and its clients' own training, and each attack comes to figures with what a guess would get.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.resident import ResidentModel
from clients.split.trainer import SplitTrainer
from clients.tasks.task import UNLABELLED
from clients.trainers import SGD
from clients.trainers.adamw import AdamW
from clients.trainers.sgd import FitJob
from fl_app.audit.split.exposure import Exposure, NotApplicableError, Wire, pooled
from fl_app.audit.split.labels import by_clusters, by_direction, by_norm
from fl_app.audit.split.norms import compared
from fl_app.audit.split.score import Score, most_frequent, share
from fl_app.audit.split.senders import told_apart
from fl_app.audit.training import Progress
from strategies.seeds import generator, integer
from strategies.update import DELTA, Layout

_ATTACKS = {
    "gradient norm": (by_norm, "AUC", "rarest class against the others"),
    "gradient direction": (by_direction, "AUC", "rarest class, 5 of its examples known"),
    "gradient clusters": (by_clusters, "accuracy", "classes, no example known"),
}
_AT_CUT = (
    "whoever reads the gradients that come down and has no labels: what they tell of labels. The server has been sent "
    "the labels, unless the run is U-shaped"
)
_AT_STATES = "the server of a U-shaped run, which is sent no labels: what the gradients that clients send tell of them"
_SENT = "whoever sees single updates without names: the share that is given to the right {} by updates of other rounds"


def labelled(
    exposure: Exposure, wires: Sequence[Wire], confidence: float, progress: Progress
) -> list[Score]:
    """Labels from gradients, for each wire and each place where gradients travel.

    Raises:
        NotApplicableError: the task has no class labels, or these examples are of one class.
    """
    labels, rows = _labels(exposure)
    examples = exposure.labelled.examples.take(rows)
    size, padding = exposure.trainer.batch_size, exposure.task.padding_id
    parts = torch.split(torch.arange(len(examples)), size)
    found = []
    for number, wire in enumerate(wires):
        gathered: dict[str, list[NDArray[np.float64]]] = {}
        for done, part in enumerate(parts, 1):
            batch = examples.take(part)
            sent = exposure.gradients(batch, wire)
            for place in sent.keys() - {"adapters"}:
                gathered.setdefault(place, []).append(pooled(sent[place], batch.inputs, padding))
            progress(number * len(parts) + done, len(wires) * len(parts))
        for place in sorted(gathered):
            found += _label_scores(
                exposure, np.concatenate(gathered[place]), labels, place, wire, confidence
            )
    return found


def _label_scores(
    exposure: Exposure,
    gradients: NDArray[np.float64],
    labels: NDArray[np.int64],
    place: str,
    wire: Wire,
    confidence: float,
) -> list[Score]:
    at_cut = place == "cut"
    found = []
    for attack, (tried, measure, what) in _ATTACKS.items():
        leak = tried(gradients, labels, confidence)
        found.append(
            Score(
                attack=f"labels by {attack}",
                measure=measure,
                cut=exposure.at if at_cut else None,
                setting=f"{wire.name}, {'at the cut' if at_cut else 'at the last states'}",
                value=leak.value,
                interval=leak.interval,
                baseline=leak.baseline,
                n=leak.n,
                units=leak.n,
                meaning=f"{_AT_CUT if at_cut else _AT_STATES} ({what})",
            )
        )
    return found


def _labels(exposure: Exposure) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Class labels, and the rows that have them: of several goals, of the one with the most."""
    targets = exposure.labelled.examples.targets
    if exposure.task.goals and targets.dim() == 2:
        targets = targets[:, (targets != UNLABELLED).sum(dim=0).argmax()]
    if targets.dim() != 1 or targets.is_floating_point():
        raise NotApplicableError(
            "the task has no class labels: what is learnt are the tokens themselves"
        )
    rows = (targets != UNLABELLED).nonzero()[:, 0].numpy()
    labels: NDArray[np.int64] = targets.numpy()[rows]
    # A class of one or two can neither be known nor be found.
    counts = np.bincount(labels)
    kept = counts[labels] >= 4
    if len(set(labels[kept].tolist())) < 2:
        raise NotApplicableError("the examples are of one class: there are no labels to tell apart")
    return labels[kept], rows[kept]


def senders(exposure: Exposure, confidence: float, progress: Progress) -> list[Score]:
    """Whose update is whose, of the clients' adapters; and of which task group, where there are several.

    Raises:
        NotApplicableError: there is one client.
    """
    clients = min(exposure.sizes.senders, exposure.target.num_clients)
    if clients < 2:
        raise NotApplicableError("one client sends all updates")
    updates, who, when = _updates(exposure, clients, progress)
    asked: dict[str, list[Any]] = {"client": who}
    groups = [exposure.task.goal_of(client) for client in who]
    if len(set(groups)) > 1:
        asked["task group"] = groups
    found = []
    for unit, names in asked.items():
        hits, trials = told_apart(updates, [sorted(set(names)).index(one) for one in names], when)
        value, interval = share(hits, trials, confidence)
        found.append(
            Score(
                attack=f"update's {unit}",
                measure="accuracy",
                cut=exposure.at,
                setting=f"{clients} clients, {len(trials)} rounds, noise {exposure.wire.noise:g}",
                value=value,
                interval=interval,
                baseline=most_frequent([sorted(set(names)).index(one) for one in names])[1],
                n=int(trials.sum()),
                units=len(trials),
                meaning=_SENT.format(unit),
            )
        )
    return found


def _updates(
    exposure: Exposure, clients: int, progress: Progress
) -> tuple[NDArray[np.float64], list[int], list[int]]:
    """Updates of the clients' half in rounds that go on from the released model, who sent each, and when.

    Clients train the whole model, which is what both halves of it do in turns.
    """
    module = exposure.module()
    trainer, arrays = _whole_trainer(exposure.trainer), dict(exposure.arrays)
    data = exposure.assembly.data(exposure.target.num_clients)
    model = ResidentModel(module, arrays)
    updates: list[NDArray[np.float64]] = []
    who: list[int] = []
    when: list[int] = []
    for turn in range(exposure.sizes.rounds):
        changes = []
        for client in range(clients):
            own = data.train(client)
            order = generator(exposure.seed, "audit senders", turn, client).permutation(len(own))
            job = FitJob(
                client, arrays, {}, own.take(order[: exposure.sizes.examples]),
                integer(exposure.seed, "audit senders", turn, client), {}, {},
            )  # fmt: skip
            with _noised(module, exposure.wire):
                section = trainer.fit_one(job, model, exposure.task).sections[DELTA]
            changes.append(section.vector.astype(np.float64))
            progress(turn * clients + client + 1, exposure.sizes.rounds * clients)
        layout = section.layout
        updates += [change[_own(layout, module.clients_names())] for change in changes]
        who += range(clients)
        when += [turn] * clients
        step = layout.views(np.mean(changes, axis=0).astype(np.float32))
        arrays |= {name: np.add(arrays[name], change) for name, change in step.items()}
    model.load(exposure.arrays)
    module.eval()
    return np.array(updates), who, when


def _own(layout: Layout, names: frozenset[str]) -> NDArray[np.bool_]:
    """The places of the clients' adapters in a vector."""
    own = [name in names and name.startswith("adapters.") for name in layout.names]
    return np.repeat(own, np.diff(layout.offsets))


def _whole_trainer(trainer: SplitTrainer) -> SGD:
    """The trainer of a whole model whose steps the split one's are."""
    kind = AdamW if trainer.optimizer == "adamw" else SGD
    return kind(**{one.name: getattr(trainer, one.name) for one in fields(kind) if one.init})


@contextmanager
def _noised(module: Any, wire: Wire) -> Iterator[None]:
    """Training sees the noise on activations that the run has; rounding has no gradient and is left out."""
    noise = Wire(noise=wire.noise)

    def noised(_: object, given: object, sent: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        activation, lengths = sent
        return activation + (noise.seen(activation) - activation).detach(), lengths

    handle = module.lower.register_forward_hook(noised)
    try:
        yield
    finally:
        handle.remove()


def norms(exposure: Exposure, wires: Sequence[Wire], progress: Progress) -> dict[str, Any]:
    """Norms of some batches' gradients without and with each wire, by what travels and by wire."""
    batches = exposure.batches(exposure.private)[:3]
    plain = [exposure.gradients(batch, Wire(), mean=True) for batch in batches]
    found: dict[str, Any] = {}
    for number, wire in enumerate(wires, 1):
        other = [exposure.gradients(batch, wire, mean=True) for batch in batches]
        for place in plain[0]:
            rows = [
                [one[place].flatten().double().numpy() for one in many] for many in (plain, other)
            ]
            pairs = [compared(a[None], b[None]).to_dict() for a, b in zip(*rows, strict=True)]
            told = {name: [value for pair in pairs for value in pair[name]] for name in pairs[0]}
            found.setdefault(wire.name, {})[place] = told
        progress(number, len(wires))
    return found
