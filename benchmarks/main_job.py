"""The main job on the engine and in Flower's simulation, side by side: accuracy and seconds.

    python benchmarks/main_job.py            # three seeds on the engine, one in Flower's simulation
    python benchmarks/main_job.py --draw     # also draws docs/figures/run.png from the first seed's run

Runs real `trellis run` processes in a temporary folder and reads their summaries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import FIGURES, versions

from fl_app.services.curves import draw_curves

SEEDS = (0, 1, 2)


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """One run's summary, with the seconds of the whole command."""
    began = time.monotonic()
    command = [sys.executable, "-m", "fl_app.cli", "run", f"output_dir={folder}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    summary: dict[str, Any] = json.loads(Path(done.stdout.splitlines()[-1]).read_text())
    return summary | {"command_seconds": time.monotonic() - began}


def line(name: str, summary: dict[str, Any]) -> str:
    """What is told of one run."""
    rounds = [row["seconds"] for row in summary["history"]]
    return (
        f"{name:<28} accuracy {summary['final']['accuracy']:.3f} after {summary['rounds_completed']} rounds; "
        f"{summary['command_seconds']:.1f} s in all, median round {median(rounds):.2f} s, "
        f"peak memory {summary['totals']['peak_rss_bytes'] / 1e6:.0f} MB"
    )


def main() -> None:
    """Runs, prints, and draws on demand."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draw", action="store_true")
    draw = parser.parse_args().draw
    print(versions(), f"seeds {SEEDS}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = [run(folder / f"engine-{seed}", f"seed={seed}") for seed in SEEDS]
        for summary in engine:
            print(line(f"engine, seed {summary['seed']}", summary))
        flower = run(folder / "flower", "backend=flower", "seed=0")
        print(line("Flower's simulation, seed 0", flower))
        same = [row["accuracy"] for row in flower["history"]] == [
            row["accuracy"] for row in engine[0]["history"]
        ]
        print(f"accuracy equal in every round on both back ends: {same}")
    if draw:
        draw_curves(
            engine[0]["history"],
            FIGURES / "run.png",
            "FedAvg on MNIST, 10 clients, Dirichlet(0.5), seed 0",
        )


if __name__ == "__main__":
    main()
