"""FedAvg, FedProx, SCAFFOLD and FedAdam on MNIST: accuracy after 20 rounds, rounds to 90%, bytes.

    python benchmarks/algorithms.py build/algorithms     # 180 runs, about half an hour on 2 cores; resumes
    python benchmarks/algorithms.py build/algorithms --draw

IID and Dirichlet(0.5, 0.1), all five folds of the 5,000 images, seeds 1, 2, 3; 10 clients, all asked each round, a CNN
of 10,554 parameters, one local epoch in batches of 20 at rate 0.05, every other setting the strategy's default. Two
sweeps and a report, printed; `--draw` also draws docs/figures/algorithms.png: every run, and their median.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from common import FIGURES, versions
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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

COLOURS = {"fedavg": "#0072B2", "fedprox": "#E69F00", "scaffold": "#D55E00", "fedadam": "#009E73"}


def trellis(*words: str) -> None:
    """A command of ours, its output as it comes.

    Raises:
        CalledProcessError: it failed.
    """
    subprocess.run([sys.executable, "-m", "fl_app.cli", *words], check=True)


def draw(folder: Path, path: Path) -> None:
    """Accuracy by round: a panel for each cut, a thin line for each run, a thick one for their median."""
    runs: dict[tuple[str, str], list[list[float]]] = {}
    for file in sorted(folder.glob("*/summary.json")):
        config = yaml.safe_load(file.with_name("config.yaml").read_text())
        task, history = config["task"], json.loads(file.read_text())["history"]
        cut = "IID" if task["partition"] == "iid" else f"Dirichlet({task['alpha']})"
        accuracies = [row["accuracy"] for row in history]
        runs.setdefault((cut, config["strategy"]), []).append(accuracies)
    figure = Figure(figsize=(10, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, cut in zip(panels, ("IID", "Dirichlet(0.5)", "Dirichlet(0.1)"), strict=True):
        for strategy, colour in COLOURS.items():
            lines = np.array(runs[cut, strategy])
            rounds = np.arange(1, lines.shape[1] + 1)
            axes.plot(rounds, lines.T, color=colour, linewidth=0.5, alpha=0.25)
            axes.plot(rounds, np.median(lines, axis=0), color=colour, linewidth=2, label=strategy)
        axes.set(xlabel="round", title=cut, ylim=(0, 1), xticks=range(5, len(rounds) + 1, 5))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy")
    panels[0].legend(loc="lower right", frameon=False)
    figure.savefig(path)


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
        draw(options.folder, FIGURES / "algorithms.png")


if __name__ == "__main__":
    main()
