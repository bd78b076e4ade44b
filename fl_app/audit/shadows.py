"""Shadow models: the run's own configuration, trained on random halves of its examples (Carlini et al. 2022, §V).

The halves come in pairs, one the complement of the other, so that with an even number of shadows each example is in
about half of them. A shadow is a whole federated training on the real engine with a seed of its own; what it would say
of every example is kept in the run's audit folder, and a later audit of the same run trains only what is missing.

Which example is in which half rests on the run's seed: no ε does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from clients.resident import ResidentModel
from clients.tasks import Examples, Task
from fl_app.assembly import Assembly
from fl_app.audit.target import Arrays, Target
from fl_app.audit.training import Progress, train
from fl_app.services.files import write_atomically
from strategies.seeds import generator, integer

_CACHE = "shadows"
_LOSSES, _INSIDE, _IDENTITY = "losses", "inside", "identity"


@dataclass(frozen=True)
class Shadow:
    """One shadow model, as far as an attack needs it.

    Attributes:
        inside: (n,) bool, which of the examples it was trained on.
        losses: (n,) float64, its loss on each.
    """

    inside: NDArray[np.bool_]
    losses: NDArray[np.float64]


def shadows(
    target: Target,
    examples: Examples,
    natural_ids: list[str] | None,
    count: int,
    progress: Callable[[int], Progress],
) -> list[Shadow]:
    """Trains so many shadows, or takes them from the run's audit folder.

    Args:
        target: the run.
        examples: all that the attack is to judge, n of them.
        natural_ids: whose each is, where the task's are somebody's.
        count: how many shadows.
        progress: for a shadow's number, what is told of its rounds.

    Raises:
        ConfigError: half of the examples can't be cut among the run's clients.
        AuditError: a training failed.
    """
    folder = target.folder / _CACHE
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number in range(count):
        path = folder / f"{number}.safetensors"
        identity = f"{target.summary.get('config_hash')} {target.rounds} {len(examples)}"
        shadow = _kept(path, identity)
        if shadow is None:
            shadow = _trained(target, examples, natural_ids, number, progress(number))
            tensors = {_LOSSES: shadow.losses, _INSIDE: shadow.inside}
            write_atomically(path, save(tensors, {_IDENTITY: identity}))
        found.append(shadow)
    return found


def _kept(path: Path, identity: str) -> Shadow | None:
    try:
        with safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get(_IDENTITY) != identity:
                return None
            return Shadow(file.get_tensor(_INSIDE), file.get_tensor(_LOSSES))
    except (OSError, SafetensorError):
        return None


def _trained(
    target: Target,
    examples: Examples,
    natural_ids: list[str] | None,
    number: int,
    progress: Progress,
) -> Shadow:
    """Trains shadow `number`; clients' own test parts of the half are not trained on, as in the run."""
    seed = target.config.seed
    order = generator(seed, "shadows", number // 2).permutation(len(examples))
    rows = np.sort(np.array_split(order, 2)[number % 2])
    own_seed = integer(seed, "shadow", number) % 2**32
    assembly = Assembly(target.trained_anew(f"shadow-{number}", seed=own_seed))
    ids = None if natural_ids is None else [natural_ids[row] for row in rows]
    assembly.task = with_training_data(assembly.task, examples.take(rows), ids)
    strategy = train(assembly, target.num_clients, progress=progress)
    assert strategy.model is not None  # `train` has ended well
    inside = np.zeros(len(examples), bool)
    inside[rows[trained_rows(assembly, target.num_clients)]] = True
    return Shadow(inside, losses(assembly, strategy.model.arrays(), examples))


def trained_rows(assembly: Assembly, num_clients: int) -> NDArray[np.int64]:
    """Row numbers in the task's training data that clients train on, sorted."""
    data = assembly.data(num_clients)
    return np.sort(np.concatenate([data.rows(client)[0] for client in range(num_clients)]))


def with_training_data(task: Task, examples: Examples, natural_ids: list[str] | None) -> Task:
    """The same task with other training examples; still of its own class, which says how it may be trained."""
    other = copy.copy(task)
    vars(other).update(train=lambda: examples, natural_ids=lambda: natural_ids)
    return other


def losses(assembly: Assembly, arrays: Arrays, examples: Examples) -> NDArray[np.float64]:
    """A model's loss on each example, in eval mode, (n,) float64.

    Args:
        assembly: gives network and task.
        arrays: the whole model by name.
        examples: n of them.
    """
    task, device = assembly.task, assembly.trainer.torch_device
    model = ResidentModel(assembly.module(), arrays, device)
    model.load(arrays)
    model.module.eval()
    # A loss of the task's own may be no mean over examples: then each is a batch by itself.
    alone = type(task).loss is not Task.loss
    size = 1 if alone else assembly.config.evaluate.batch_size
    parts: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(examples), size):
            targets = examples.targets[start : start + size].to(device)
            output = model.module(examples.inputs[start : start + size].to(device))
            # In float32 every probability near 1 is 1, and no two sure predictions could be told apart.
            output = output.double() if is_cross_entropy(task) else output
            found = task.loss(output, targets) if alone else task.losses(output, targets)
            parts.append(found.reshape(-1).double().cpu())
    return np.asarray(torch.cat(parts).numpy(), np.float64)


def is_cross_entropy(task: Task) -> bool:
    """Whether a task's loss is the one that tasks have unless they say otherwise."""
    return type(task).loss is Task.loss and type(task).losses is Task.losses
