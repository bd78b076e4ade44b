"""What unequal devices cost, and what choosing among them gives: accuracy, virtual time, and each device's share.

    python benchmarks/fleet.py           # four fleets' ways, three seeds each, some minutes

100 devices, 10 asked a round, MNIST (Dirichlet(0.5)), an MLP of 50,890 parameters, one epoch in batches of 20. Equal
devices take the same time and never drop out; unequal ones are `runtime=heavy_tail`: log-normal speeds with σ = 1,
drop-outs of 10%, computing forty times as long, so that it and not the network is what takes time. All train for the
same number of rounds, in which each device's equal share is 15. Nothing printed depends on the machine: the clock is
the engine's. Medians of the seeds, with the smallest and largest.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from common import versions

from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.run import run_engine

ROUNDS, CLIENTS = 150, 100
COMMON = (
    "runtime=heavy_tail",
    "model=mlp",
    "task=mnist",
    "client.local_epochs=1",
    "client.lr=0.1",
    f"rounds={ROUNDS}",
    "evaluate.every=10",
    "runtime.devices.seconds_per_example=0.04",
)
FAIR = ("sampler=fair", "sampler.fraction=0.1")
WAYS: dict[str, tuple[str, ...]] = {
    "equal devices, uniform": ("runtime.dropout=0", "runtime.devices.speed_sigma=0"),
    "unequal, uniform": (),
    "unequal, uniform, 30% more asked": ("scheduler.over_selection=0.3",),
    "unequal, uniform, deadline=auto": ("scheduler.deadline=auto",),
    "unequal, fair": FAIR,
    "unequal, fair, deadline=auto": (*FAIR, "scheduler.deadline=auto"),
    "unequal, fair, enough=0.8": (*FAIR, "scheduler.enough=0.8"),
}


def run(overrides: tuple[str, ...], seed: int, folder: Path) -> dict[str, float]:
    """One run: accuracy in percent at the end, virtual seconds, and who took part."""
    name = f"run-{abs(hash(overrides)):x}-{seed}"
    settings = [*COMMON, *overrides, f"seed={seed}", f"output_dir={folder}", f"run_name={name}"]
    with (folder / f"{name}.txt").open("w") as stream:
        result = run_engine(compose(settings), PlainConsole(stream))
    summary = json.loads(result.summary_path.read_text())
    asked = summary["participation"]
    return {
        "accuracy": 100 * summary["final"]["accuracy"],
        "seconds": summary["totals"]["virtual_seconds"],
        "jain": asked["jain_index"],
        "least": asked["least"],
        "most": asked["most"],
    }


def spread(values: list[float], form: str) -> str:
    """The median, and the smallest and largest."""
    return f"{median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def main() -> None:
    """Runs each way with each seed, and prints a row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", help="by commas", default="1,2,3")
    seeds = [int(seed) for seed in parser.parse_args().seeds.split(",")]
    logging.disable(logging.WARNING)  # each drop-out is told of
    print(versions(), f"{CLIENTS} devices, {ROUNDS} rounds, seeds {seeds}\n", flush=True)
    print(
        "| | accuracy, % | points below equal devices | virtual seconds | Jain's index | least and most asked "
        "|\n|" + "---|" * 6,
        flush=True,
    )
    first: list[dict[str, float]] = []
    with TemporaryDirectory() as folder:
        for name, overrides in WAYS.items():
            runs = [run(overrides, seed, Path(folder)) for seed in seeds]
            first = first or runs
            lost = [a["accuracy"] - b["accuracy"] for a, b in zip(first, runs, strict=True)]
            print(
                f"| {name} | {spread([r['accuracy'] for r in runs], '.1f')} | {spread(lost, '.1f')} "
                f"| {spread([r['seconds'] for r in runs], '.0f')} | {median(r['jain'] for r in runs):.3f} "
                f"| {median(r['least'] for r in runs):.0f}, {median(r['most'] for r in runs):.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
