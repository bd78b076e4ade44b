"""Virtual seconds to 90% test accuracy on MNIST: rounds beside buffered and fully asynchronous aggregation.

    python benchmarks/time_to_accuracy.py             # 81 runs; --only heavy,equal,... and --seeds for a part

`runtime=heavy_tail`: 100 clients (Dirichlet(0.5)), log-normal speeds with σ = 1. An MLP of 50,890 parameters, three
epochs in batches of 20 at rate 0.1, a server rate of 1, for all. A run ends with the first model that has 90%; one that
never has it counts as infinitely long. Nothing printed depends on the machine but the last line: the clock is the
engine's. Medians of the seeds, with the smallest and largest; `updates` are client trainings asked for until then.

Four fleets: drop-outs of 10%, which the server learns of after 50 s (Flower's two missed heartbeats); the same without
drop-outs; the same with forty times the computation, so that it and not the network is what takes time; and equal
speeds without drop-outs. What is compared with: Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous
Aggregation", section 5; over-selection of Bonawitz et al. 2019.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from math import inf
from statistics import median
from tempfile import TemporaryDirectory

from common import versions

from fl_app.assembly import Assembly, composed, engine_grid, make_evaluator
from fl_app.compose import compose
from strategies.hooks import RoundView, Stop

TARGET, CLIENTS, MOST_UPDATES = 0.9, 100, 6_000
COMMON = ("runtime=heavy_tail", "model=mlp", "runtime.workers=1", "task=mnist")
COMPASS = "scheduler.pace={_target_:strategies.schedulers.Compass,least_steps:2,most_steps:12}"

SYNCHRONOUS = ("strategy=fedavg",)
OVER = (*SYNCHRONOUS, "scheduler.over_selection=0.3")
BUFFERED = ("strategy=fedbuff", "scheduler.buffer=10")


def busy(count: int, *more: str) -> tuple[str, ...]:
    """FedBuff with K = 10 and so many clients at work."""
    return (*BUFFERED, f"scheduler.concurrency={count}", *more)


def deadline(seconds: float) -> str:
    """Of a round, or of a dispatch."""
    return f"scheduler.deadline={seconds:g}"


FEDASYNC = ("strategy=fedasync", "scheduler.concurrency=10", "evaluate.every=10")


@dataclass(frozen=True)
class Fleet:
    """Devices, and what is compared on them.

    Attributes:
        settings: overrides.
        ways: overrides by name; the first is what the others are held against.
    """

    settings: tuple[str, ...]
    ways: dict[str, tuple[str, ...]]


NO_DROPOUT = ("runtime.dropout=0",)
COMPUTING = (*NO_DROPOUT, "runtime.devices.seconds_per_example=0.04")
FLEETS = {
    "heavy": Fleet(
        (),
        {
            "rounds": SYNCHRONOUS,
            "rounds, 30% more asked": OVER,
            **{f"rounds, deadline {d:g} s": (*SYNCHRONOUS, deadline(d)) for d in (0.75, 1.5, 3)},
            "FedBuff, 10 busy": busy(10),
            "FedBuff, 10 busy, deadline 3 s": busy(10, deadline(3)),
            "FedBuff, 40 busy, deadline 3 s": busy(40, deadline(3)),
            "FedAsync, 10 busy, deadline 3 s": (*FEDASYNC, deadline(3)),
        },
    ),
    "no drop-outs": Fleet(
        NO_DROPOUT,
        {
            "rounds": SYNCHRONOUS,
            "rounds, 30% more asked": OVER,
            "FedBuff, 10 busy": busy(10),
            "FedBuff, 40 busy": busy(40),
        },
    ),
    "computing": Fleet(
        COMPUTING,
        {
            "rounds": SYNCHRONOUS,
            "rounds, 30% more asked": OVER,
            **{f"rounds, deadline {d:g} s": (*SYNCHRONOUS, deadline(d)) for d in (5, 10, 20)},
            "FedBuff, 10 busy": busy(10),
            "FedBuff, 10 busy, damp": busy(10, "scheduler.damp=true"),
            "FedBuff, 10 busy, Compass": busy(10, COMPASS),
            "FedBuff, 20 busy": busy(20),
            "FedBuff, 40 busy": busy(40),
            "FedAsync, 10 busy": FEDASYNC,
        },
    ),
    "equal": Fleet(
        (*NO_DROPOUT, "runtime.devices.speed_sigma=0"),
        {"rounds": SYNCHRONOUS, "FedBuff, 10 busy": busy(10), "FedBuff, 40 busy": busy(40)},
    ),
}


@dataclass(frozen=True)
class Found:
    """What it took to reach the target: virtual seconds, model versions, clients asked; infinite where it was not."""

    seconds: float
    versions: float
    updates: float


def reach(overrides: tuple[str, ...], seed: int, folder: str) -> Found:
    """Runs until the first model that has the target's accuracy, or until so many clients have been asked."""
    versions = MOST_UPDATES if FEDASYNC[0] in overrides else MOST_UPDATES // 10
    settings = (*COMMON, *overrides, f"seed={seed}", f"rounds={versions}", f"output_dir={folder}")
    config = compose(settings)
    assembly = Assembly(config)
    strategy = composed(assembly, CLIENTS)
    asked, found = 0, Found(inf, inf, inf)

    def watch(view: RoundView) -> Stop | None:
        nonlocal asked, found
        asked += view.sampled
        if view.evaluation.get("accuracy", 0.0) >= TARGET:
            found = Found(view.clock, view.round, asked)
            return Stop("the target is reached")
        return Stop("out of updates") if asked >= MOST_UPDATES else None

    strategy.hooks = [watch]
    with engine_grid(assembly, CLIENTS, 0.0) as grid:
        strategy.start(
            grid,
            assembly.network.arrays(),
            num_rounds=config.rounds,
            timeout=config.round_timeout,
            evaluate_fn=make_evaluator(assembly),
        )
    return found


def compare(fleet: Fleet, seeds: list[int], folder: str) -> None:
    """Prints a row for each way; times are held against the first's, seed by seed."""
    first: list[Found] = []
    print("| | seconds | times faster | updates | versions |\n|---|---|---|---|---|", flush=True)
    for name, overrides in fleet.ways.items():
        runs = [reach((*overrides, *fleet.settings), seed, folder) for seed in seeds]
        first = first or runs
        faster = [a.seconds / b.seconds for a, b in zip(first, runs, strict=True)]
        cells = (
            spread([run.seconds for run in runs], ".0f"),
            spread(faster, ".1f"),
            spread([run.updates for run in runs], ".0f"),
            spread([run.versions for run in runs], ".0f"),
        )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def spread(values: list[float], form: str) -> str:
    """The median, and the smallest and largest."""
    least, most = min(values), max(values)
    return f"{median(values):{form}} ({least:{form}}–{most:{form}})"


def main() -> None:
    """Compares on each fleet that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="fleets, by commas", default=",".join(FLEETS))
    parser.add_argument("--seeds", help="by commas", default="1,2,3")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # each drop-out is told of
    print(versions(), f"{CLIENTS} clients, seeds {options.seeds}", flush=True)
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        for name in options.only.split(","):
            print(f"\n{name}: {' '.join((*COMMON, *FLEETS[name].settings))}", flush=True)
            seeds = [int(seed) for seed in options.seeds.split(",")]
            compare(FLEETS[name], seeds, folder)
    print(f"\n{time.monotonic() - began:.0f} s of wall time")


if __name__ == "__main__":
    main()
