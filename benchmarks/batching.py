"""When is it faster to train clients at once? Models and batch sizes, one by one and 32 at once.

    python benchmarks/batching.py

36 examples a client, one epoch, one thread, the best of three. The thresholds of `clients.trainers.suitability` come
from this table.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from common import versions
from jobs import RandomImages
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clients.models import Cnn, Linear, Mlp
from clients.resident import ResidentModel, arrays_of
from clients.tasks import Examples
from clients.trainers import SGD, FitJob
from clients.trainers.suitability import drawback
from clients.trainers.together import fit_together

CLIENTS, EXAMPLES = 32, 36
SMALL, LARGE = (1, 8, 8), (1, 28, 28)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "logistic regression, 8 × 8": (lambda: Linear(SMALL, 10), SMALL),
    "perceptron, 64, 8 × 8": (lambda: Mlp(SMALL, 10), SMALL),
    "perceptron, 256, 8 × 8": (lambda: Mlp(SMALL, 10, hidden=(256,)), SMALL),
    "perceptron, 64, 28 × 28": (lambda: Mlp(LARGE, 10), LARGE),
    "perceptron, 256 + 256, 8 × 8": (lambda: Mlp(SMALL, 10, hidden=(256, 256)), SMALL),
    "CNN, width 8, 8 × 8": (lambda: Cnn(SMALL, 10), SMALL),
    "CNN, width 8, 28 × 28": (lambda: Cnn(LARGE, 10), LARGE),
    "CNN, width 16, 28 × 28": (lambda: Cnn(LARGE, 10, width=16), LARGE),
}


def best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of three calls, after one that doesn't count."""
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def measure(name: str, batch_size: int) -> str:
    """One row."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    module = make()
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, *shape))
    arrays = arrays_of(module)
    model = ResidentModel(module, arrays)
    jobs = [
        FitJob(
            client,
            arrays,
            {},
            Examples(torch.randn(EXAMPLES, *shape), torch.randint(0, 10, (EXAMPLES,))),
            client,
            {},
            {},
        )
        for client in range(CLIENTS)
    ]
    trainer, task = SGD(lr=0.01, batch_size=batch_size), RandomImages(EXAMPLES, shape)
    alone = best(lambda: trainer.fit(jobs, model, task)) / CLIENTS
    together = best(lambda: fit_together(trainer, jobs, model, task)) / CLIENTS
    auto = "one by one" if drawback(trainer, module, task) else "at once"
    operations = 3e-6 * counter.get_total_flops() * batch_size
    return (
        f"| {name} | {model.layout.size:,} | {batch_size} | {operations:.1f} | {1e6 * alone:,.0f} | "
        f"{1e6 * together:,.0f} | {alone / together:.1f} × | {auto} |"
    )


def main() -> None:
    """Measures and prints a table in Markdown."""
    torch.set_num_threads(1)
    print(versions(), f"{CLIENTS} clients at once")
    print(
        "| model | parameters | batch | Mflop a step | µs a client, one by one | at once | | auto |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---|")
    for name in MODELS:
        for batch_size in (10, EXAMPLES):
            print(measure(name, batch_size), flush=True)


if __name__ == "__main__":
    main()
