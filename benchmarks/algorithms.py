"""FedAvg, FedProx, SCAFFOLD and FedAdam on MNIST: accuracy after 20 rounds, rounds to 90%, bytes.

    python benchmarks/algorithms.py build/algorithms     # 180 runs, about half an hour on 2 cores; resumes
    python benchmarks/algorithms.py build/algorithms --draw

IID and Dirichlet(0.5, 0.1), all five folds of the 5,000 images, seeds 1, 2, 3; 10 clients, all asked each round, a CNN
of 10,554 parameters, one local epoch in batches of 20 at rate 0.05, every other setting the strategy's default. Two
sweeps and a report, printed; `--draw` also copies the report's curves to docs/figures/algorithms.png.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from common import FIGURES, versions

SETTINGS = (
    "strategy=fedavg,fedprox,scaffold,fedadam",
    "task.fold=0,1,2,3,4",
    "seed=1,2,3",
    "num_clients=10",
    "rounds=20",
    "model.width=8",
    "client.local_epochs=1",
    "client.lr=0.05",
    "runtime.batch_clients=10",
)
CUTS = (
    ("task.partition=iid",),
    ("task.partition=dirichlet", "task.alpha=0.5,0.1"),
)
REPORT = (
    "--by",
    "strategy,task.partition,task.alpha",
    "--baseline",
    "strategy=fedavg",
    "--target",
    "0.9",
)


def trellis(*words: str) -> None:
    """A command of ours, its output as it comes.

    Raises:
        CalledProcessError: it failed.
    """
    subprocess.run([sys.executable, "-m", "fl_app.cli", *words], check=True)


def main() -> None:
    """Runs, reports, and draws on demand."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the runs; the same again resumes")
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    print(versions(), flush=True)
    for cut in CUTS:
        trellis("run", "-m", "--jobs", "2", *SETTINGS, *cut, f"output_dir={options.folder}")
    trellis("report", str(options.folder), *REPORT)
    if options.draw:
        shutil.copy(options.folder / "report" / "curves.png", FIGURES / "algorithms.png")


if __name__ == "__main__":
    main()
