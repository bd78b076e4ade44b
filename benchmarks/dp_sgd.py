"""DP-SGD on the clients: what ε costs in accuracy, and what clipping each example costs in time and memory.

    python benchmarks/dp_sgd.py             both, in full: five folds of MNIST, ten clients; one or two hours
    python benchmarks/dp_sgd.py --quick     one fold, ε = 3 and none, and fewer repeats: minutes
    python benchmarks/dp_sgd.py accuracy    (or: cost) one of them; --models hog --folds 3: a part of it

Accuracy is that of `trellis run client=dp_sgd` on 1,000 test images a fold; each client holds 400 and is protected by
its own noise, from the server too. Settings were found on fold 0 with another partition, initial model and noise; the
search is not counted in ε.
Cost is that of one batch of 64 through `clients.trainers.per_example` beside an ordinary backward pass, each way in a
process of its own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from common import trellis, versions
from jobs import CifarCnn
from torch import Tensor, nn

from clients.models import Cnn, Gru, Mlp
from clients.resident import ResidentModel, arrays_of
from clients.tasks import Examples, Task
from clients.trainers.per_example import clipping

# ---- accuracy ----

FOLDS = 5


@dataclass(frozen=True)
class Setting:
    """What lost least for one model and ε, of a few that were tried: one step a round, on all of a client's examples.

    Attributes:
        rounds: of the run.
        lr: learning rate.
        norm: to which each example's gradient is clipped.
    """

    rounds: int
    lr: float
    norm: float


PRIVATE: dict[str, dict[float, Setting]] = {
    "hog": {1: Setting(100, 20, 0.25), 3: Setting(100, 20, 0.5), 8: Setting(100, 30, 0.5)},
    "linear": {1: Setting(60, 1, 0.3), 3: Setting(60, 2, 0.5), 8: Setting(60, 1, 1)},
    "cnn": {1: Setting(30, 1, 0.5), 3: Setting(30, 4, 0.3), 8: Setting(30, 2, 1)},
}
PLAIN = {"hog": (20, 3, 2.0), "linear": (20, 3, 0.1), "cnn": (20, 3, 0.1)}
"""Rounds, local epochs and learning rate without privacy, in batches of 20."""


def accuracy(quick: bool, models: Sequence[str], count: int) -> None:
    """Prints a table of accuracies by model and ε, over so many folds."""
    models = ["hog", "linear"] if quick else models
    targets = [3.0] if quick else [1.0, 3.0, 8.0]
    folds = range(1 if quick else count)
    print(f"\n| model | ε = {' | ε = '.join(f'{t:g}' for t in targets)} | no privacy |")
    print(f"|---|{'---|' * (len(targets) + 1)}")
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            cells = [
                _cell([_private(Path(folder), model, target, fold) for fold in folds])
                for target in targets
            ]
            cells.append(_cell([_plain(Path(folder), model, fold) for fold in folds]))
            print(f"| {model} | {' | '.join(cells)} |", flush=True)


def _private(folder: Path, model: str, target: float, fold: int) -> float:
    setting = PRIVATE[model][target]
    summary, _ = trellis(
        folder,
        "client=dp_sgd",
        f"model={model}",
        f"task.fold={fold}",
        "num_clients=10",
        "task.partition=iid",
        f"rounds={setting.rounds}",
        f"evaluate.every={setting.rounds}",
        "client.batch_size=400",
        "client.local_epochs=1",
        f"client.lr={setting.lr}",
        f"client.max_grad_norm={setting.norm}",
        "client.max_physical_batch=400",
        f"client.target_epsilon={target}",
    )
    spent = summary["privacy"]["epsilon"]
    if not 0.98 * target < spent <= target:
        raise RuntimeError(f"epsilon is {spent}, and {target} was planned")
    return float(summary["final"]["accuracy"])


def _plain(folder: Path, model: str, fold: int) -> float:
    rounds, epochs, lr = PLAIN[model]
    summary, _ = trellis(
        folder,
        "client=sgd",
        f"model={model}",
        f"task.fold={fold}",
        "num_clients=10",
        "task.partition=iid",
        f"rounds={rounds}",
        f"evaluate.every={rounds}",
        f"client.local_epochs={epochs}",
        f"client.lr={lr}",
    )
    return float(summary["final"]["accuracy"])


def _cell(found: Sequence[float]) -> str:
    """Mean and standard deviation over folds, in percent."""
    spread = f" ± {100 * stdev(found):.1f}" if len(found) > 1 else ""
    return f"{100 * mean(found):.1f}{spread}"


# ---- cost ----

BATCH = 64
WAYS = ("plain", "hooks", "ghost")


class Shaped(Task):
    """Random inputs of a shape: nothing but time is measured."""

    num_classes = 10

    def __init__(self, *shape: int, vocab_size: int | None = None) -> None:
        self.input_shape, self.vocab_size = shape, vocab_size

    def train(self) -> Examples:
        """One batch."""
        shape = (BATCH, *self.input_shape)
        inputs = torch.randn(shape) if self.vocab_size is None else torch.randint(1, 8000, shape)
        return Examples(inputs, torch.randint(10, (BATCH,)))

    def test(self) -> Examples:
        """Likewise."""
        return self.train()


MINILM = Path(__file__).resolve().parent.parent / "models" / "minilm"
"""By `make models`; without it there is no row for it."""

IMAGE, COLOUR, TEXT = (1, 28, 28), (3, 32, 32), (64,)
JOBS: dict[str, tuple[Callable[[], nn.Module], Task]] = {
    "mlp, 784-64-10": (lambda: Mlp(IMAGE, 10), Shaped(*IMAGE)),
    "cnn, width 16": (lambda: Cnn(IMAGE, 10, width=16), Shaped(*IMAGE)),
    "pfl's CIFAR cnn": (lambda: CifarCnn(COLOUR, 10), Shaped(*COLOUR)),
    "gru, 8,000 words": (lambda: Gru(TEXT, 10, 8000), Shaped(*TEXT, vocab_size=8000)),
    "MiniLM, adapters": (lambda: _adapted(), Shaped(*TEXT, vocab_size=30_522)),
}


def _adapted() -> nn.Module:
    from clients.lora import LoraClassifier

    return LoraClassifier(TEXT, 10, 30_522, pretrained=str(MINILM))


def cost(quick: bool) -> None:
    """Prints a table of milliseconds an example and peak memory."""
    print(f"\n| model | parameters | {' | '.join(f'{w}, ms | {w}, MB' for w in WAYS)} |")
    print(f"|---|---|{'---|' * (2 * len(WAYS))}")
    jobs = [name for name in JOBS if MINILM.is_dir() or not name.startswith("MiniLM")]
    for name in jobs[: 2 if quick else None]:
        cells = []
        for way in WAYS:
            command = [sys.executable, __file__, "one", name, way, "3" if quick else "15"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            cells.append(f"{found['ms']:.3g} | {found['mb']:.0f}")
        print(f"| {name} | {found['size']:,} | {' | '.join(cells)} |", flush=True)


def _one(name: str, way: str, repeats: int) -> None:
    """One way with one model: milliseconds an example, and how much its batches raised the peak."""
    torch.set_num_threads(1)
    make, task = JOBS[name]
    module = make()
    model = ResidentModel(module, arrays_of(module))
    module.train()
    examples = task.train()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if way == "plain":
        seconds = _timed(lambda x, y: model.gradients(task.loss(module(x), y)), examples, repeats)
    else:
        import opacus.grad_sample  # noqa: F401 - its import is no batch's cost

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with clipping(model, task, norm=1.0, ghost=way == "ghost", most=BATCH) as clipped_sum:
            seconds = _timed(clipped_sum, examples, repeats)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps(
            {
                "ms": 1e3 * seconds / BATCH,
                "mb": (after - before) / 1024,
                "size": model.flat.numel(),
            }
        )
    )


def _timed(step: Callable[[Tensor, Tensor], object], examples: Examples, repeats: int) -> float:
    """The fastest of some calls, after one that nobody times, in seconds."""
    step(examples.inputs, examples.targets)
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        step(examples.inputs, examples.targets)
        found.append(time.perf_counter() - began)
    return min(found)


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="all", choices=["all", "accuracy", "cost"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--models", nargs="+", choices=list(PRIVATE), default=list(PRIVATE))
    parser.add_argument("--folds", type=int, choices=range(1, FOLDS + 1), default=FOLDS)
    asked = parser.parse_args()
    print(versions())
    if asked.what != "accuracy":
        cost(asked.quick)
    if asked.what != "cost":
        accuracy(asked.quick, asked.models, asked.folds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        _one(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
