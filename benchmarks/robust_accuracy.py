"""Every robust rule under every attack: accuracy on MNIST, against FedAvg on the honest clients alone.

    python benchmarks/robust_accuracy.py build/robust --jobs 2     # about 1,000 runs, an hour on 2 cores; resumes
    python benchmarks/robust_accuracy.py build/robust --draw       # also draws docs/figures/robust_*.png

20 clients, of which 6 lie (4 for Bulyan and for buckets of two, which bear no more), all asked each round; IID, and
Dirichlet(0.5) with momentum 0.9 on the clients; seeds 1, 2, 3. A perceptron of 25,450 parameters, 15 rounds of 2 local
epochs at rate 0.1, 4,000 training images and 1,000 to test on; every other setting the strategy's or the attack's
default. The baseline is FedAvg where the liars send NaN: admission refuses them, so the honest clients are alone.
Tables of means over the seeds, in Markdown; a run that never had enough replies for its rule made no model and counts
as a guess, 10%.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median

import numpy as np
import yaml
from common import FIGURES, versions
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RULES = (
    "krum", "multi_krum", "bulyan", "median", "trimmed_mean", "geometric_median", "centered_clipping", "norm_bounding",
    "fltrust", "bucketing", "robust",
)  # fmt: skip
POISONING = (
    "sign_flip", "gaussian", "scaling", "zero", "nan", "alie", "ipm", "mimic", "min_max", "min_sum", "collusion",
)  # fmt: skip
DATA_POISONING = ("label_flip", "backdoor")
ATTACKS = ("none", *POISONING, *DATA_POISONING)
SETTINGS = (
    "task=mnist", "task.test_fraction=0", "model=mlp", "model.hidden=[32]", "num_clients=20", "rounds=15",
    "client.lr=0.1", "client.local_epochs=2", "runtime.workers=1", "seed=1,2,3", "evaluate.every=5",
)  # fmt: skip
CUTS = {
    "iid": ("task.partition=iid",),
    "dirichlet": ("task.partition=dirichlet", "task.alpha=0.5", "client.worker_momentum=0.9"),
}
CLIENTS, CHANCE = 20, 0.1
BASELINE = "fedavg, honest alone"

Key = tuple[str, str, str]
"""Cut, rule, attack."""


def liars(rule: str) -> int:
    """How many of the 20 clients lie to a rule, which is also its f."""
    return 4 if rule in ("bulyan", "bucketing") else 6


def sweep(folder: Path, jobs: int, *words: str) -> None:
    """Runs a grid of jobs; those that are done already are left as they are."""
    command = [sys.executable, "-m", "fl_app.cli", "run", "-m", "--jobs", str(jobs)]
    done = subprocess.run([*command, f"output_dir={folder}", *SETTINGS, *words])
    if done.returncode not in (0, 1):  # 1: a job failed, as one without enough replies does
        raise SystemExit(done.returncode)


def run_all(folder: Path, jobs: int) -> None:
    """Every cell of the tables."""
    attacks = f"attack={','.join(ATTACKS[1:])}"
    for name, cut in CUTS.items():
        for rule in ("fedavg", *RULES):
            chosen = (
                ["strategy=fedavg", f"combiner={rule}"]
                if rule == "bucketing"
                else [f"strategy={rule}"]
            )
            if rule == "fltrust":
                chosen.append("task.root_examples=100")
            f = () if rule == "fedavg" else (f"combiner.f={liars(rule)}",)
            share = f"attack.fraction={liars(rule) / CLIENTS}"
            where = folder / name / rule
            sweep(where, jobs, *cut, *chosen, *f, "attack=none")
            sweep(where, jobs, *cut, *chosen, *f, attacks, share)
        sweep(
            folder / name / "honest",
            jobs,
            *cut,
            "strategy=fedavg",
            "attack=nan",
            "attack.fraction=0.2,0.3",
        )


def read(folder: Path) -> dict[Key, list[Mapping[str, float]]]:
    """Final metrics of every run, by cell."""
    found: dict[Key, list[Mapping[str, float]]] = defaultdict(list)
    for path in sorted(folder.glob("*/*/*/summary.json")):
        cut, rule = path.parts[-4], path.parts[-3]
        summary = json.loads(path.read_text())
        config = yaml.safe_load((path.parent / "config.yaml").read_text())
        target = (config["attack"] or {}).get("_target_", "none")
        share = (config["attack"] or {}).get("fraction", 0)
        attack = NAMES[target.rpartition(".")[2]]
        seconds = median(row["seconds"] for row in summary["history"])
        final = summary["final"] if summary["status"] == "completed" else {"accuracy": CHANCE}
        if rule == "honest":
            attack = f"{round(share * CLIENTS)} of 20"
        found[cut, rule, attack].append({**final, "seconds": seconds})
    return found


NAMES = {
    "none": "none", "SignFlip": "sign_flip", "Gaussian": "gaussian", "Scaling": "scaling", "Zero": "zero",
    "NotANumber": "nan", "Alie": "alie", "Ipm": "ipm", "Mimic": "mimic", "MinMax": "min_max", "MinSum": "min_sum",
    "Collusion": "collusion", "LabelFlip": "label_flip", "Backdoor": "backdoor",
}  # fmt: skip


def mean_of(runs: list[Mapping[str, float]], metric: str) -> float:
    """Mean over seeds; NaN where nothing ran."""
    values = [run[metric] for run in runs if metric in run]
    return fmean(values) if values else float("nan")


def tables(found: Mapping[Key, list[Mapping[str, float]]]) -> None:
    """Prints accuracy, the worst case and the backdoor's success for each cut."""
    for cut in CUTS:
        honest = {
            count: 100 * mean_of(found[cut, "honest", f"{count} of 20"], "accuracy")
            for count in (4, 6)
        }
        print(f"\n### {cut}\n")
        print(
            f"FedAvg on the 14 honest clients alone: {honest[6]:.1f}%; on 16: {honest[4]:.1f}%.\n"
        )
        print(f"| rule | {' | '.join(ATTACKS)} | worst model poisoning | backdoor's success |")
        print(f"| --- |{' --: |' * (len(ATTACKS) + 2)}")
        for rule in ("fedavg", *RULES):
            cells = [100 * mean_of(found[cut, rule, attack], "accuracy") for attack in ATTACKS]
            worst = min(cells[1 : 1 + len(POISONING)]) - honest[liars(rule)]
            success = 100 * mean_of(found[cut, rule, "backdoor"], "backdoor_success")
            shown = " | ".join(f"{cell:.1f}" for cell in cells)
            print(f"| {rule} | {shown} | {worst:+.1f} | {success:.1f} |")


def draw(found: Mapping[Key, list[Mapping[str, float]]], cut: str, path: Path) -> None:
    """A heat map: accuracy less that of FedAvg on the honest clients alone, in points."""
    rules = ("fedavg", *RULES)
    values = np.array(
        [
            [
                100 * mean_of(found[cut, rule, attack], "accuracy")
                - 100 * mean_of(found[cut, "honest", f"{liars(rule)} of 20"], "accuracy")
                for attack in ATTACKS
            ]
            for rule in rules
        ]
    )
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="cividis", vmin=-40, vmax=0, aspect="auto")
    axes.set_xticks(range(len(ATTACKS)), ATTACKS, rotation=40, ha="right")
    axes.set_yticks(range(len(rules)), rules)
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value < -20 else "black"
        axes.text(column, row, f"{value:+.0f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_title(
        f"Accuracy under attack, {cut}, in points from FedAvg on the honest clients alone"
    )
    figure.colorbar(image, ax=axes, label="points", extend="min")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs what is missing, prints the tables, draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--draw", action="store_true", help="draw docs/figures/robust_*.png")
    parser.add_argument("--tables", action="store_true", help="of what is there; run nothing")
    options = parser.parse_args()
    if not options.tables:
        run_all(options.folder, options.jobs)
    print(versions(), "20 clients, 6 liars (4 for bulyan, bucketing), seeds 1, 2, 3")
    found = read(options.folder)
    tables(found)
    for cut in CUTS if options.draw else ():
        draw(found, cut, FIGURES / f"robust_{cut}.png")


if __name__ == "__main__":
    main()
