"""Every robust rule under every attack: accuracy on MNIST, against FedAvg on the honest clients alone.

    python benchmarks/robust_accuracy.py build/robust.jsonl --jobs 2     # about 1,000 runs, half an hour; resumes
    python benchmarks/robust_accuracy.py build/robust.jsonl --draw       # also draws docs/figures/robust_*.png

20 clients, of which 6 lie (4 for Bulyan and for buckets of two, which bear no more), all asked each round; IID, and
Dirichlet(0.5) with momentum 0.9 on the clients; seeds 1, 2, 3. A perceptron of 25,450 parameters, 15 rounds of 2 local
epochs at rate 0.1, 4,000 training images and 1,000 to test on; every other setting the strategy's or the attack's
default. The baseline is FedAvg where the liars send NaN: admission refuses them, so the honest clients are alone.
Tables of means over the seeds, in Markdown; a run that never had enough replies for its rule made no model and counts
as a guess, 10%. The runs are those of `trellis run`, several to a process and without folders and pictures.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from common import FIGURES, versions
from flwr.app import ArrayRecord, MetricRecord
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fl_app.assembly import Assembly, engine_grid, make_evaluator, make_strategy
from fl_app.compose import compose

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
    "client.lr=0.1", "client.local_epochs=2", "runtime.workers=1",
)  # fmt: skip
CUTS = {
    "iid": ("task.partition=iid",),
    "dirichlet": ("task.partition=dirichlet", "task.alpha=0.5", "client.worker_momentum=0.9"),
}
SEEDS = (1, 2, 3)
CLIENTS, CHANCE = 20, 0.1
HONEST = "honest"
"""Stands for a rule: FedAvg on the honest clients alone, its attack the number of those that are not."""

Key = tuple[str, str, str]
"""Cut, rule, attack."""
Found = Mapping[Key, list[Mapping[str, float]]]


def liars(rule: str) -> int:
    """How many of the 20 clients lie to a rule, which is also its f."""
    return 4 if rule in ("bulyan", "bucketing") else 6


def overrides(cut: str, rule: str, attack: str, seed: int) -> list[str]:
    """One run, as a user would ask for it."""
    chosen = [*SETTINGS, f"seed={seed}"]
    if rule == HONEST:
        share = f"attack.fraction={int(attack) / CLIENTS}"
        return [*chosen, "strategy=fedavg", "attack=nan", share, *CUTS[cut]]
    chosen += ["combiner=bucketing"] if rule == "bucketing" else [f"strategy={rule}"]
    chosen += ["task.root_examples=100"] if rule == "fltrust" else []
    chosen += [] if rule == "fedavg" else [f"combiner.f={liars(rule)}"]
    chosen.append(f"attack={attack}")
    chosen += [] if attack == "none" else [f"attack.fraction={liars(rule) / CLIENTS}"]
    return [*chosen, *CUTS[cut]]


def cells() -> Iterator[tuple[str, str, str, int]]:
    """Every run: cut, rule, attack, seed."""
    for cut in CUTS:
        yield from product((cut,), (HONEST,), ("4", "6"), SEEDS)
        yield from product((cut,), ("fedavg", *RULES), ATTACKS, SEEDS)


def run(cell: tuple[str, str, str, int]) -> dict[str, object]:
    """One run: its cell and the final metrics."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    final: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = compose([*overrides(*cell), f"output_dir={folder}"])
        assembly = Assembly(config)
        evaluate = make_evaluator(assembly)

        def at_the_end(number: int, arrays: ArrayRecord) -> MetricRecord | None:
            return evaluate(number, arrays) if number == config.rounds else None

        strategy, voids = make_strategy(assembly, CLIENTS), []
        strategy.hooks.append(lambda view: voids.append(view.void))
        with engine_grid(assembly, CLIENTS, 0.0) as grid:
            result = strategy.start(
                grid, assembly.network.arrays(), config.rounds, evaluate_fn=at_the_end
            )
        final = dict(result.evaluate_metrics_serverapp[config.rounds])
    if all(voids):
        final["accuracy"] = CHANCE
    return {"cell": list(cell), **final}


def run_all(path: Path, jobs: int) -> None:
    """Runs what the file has not yet, and adds it."""
    done = {tuple(line["cell"]) for line in lines(path)}
    missing = [cell for cell in cells() if cell not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool(jobs) as pool, path.open("a") as file:
        for count, found in enumerate(pool.imap_unordered(run, missing), 1):
            file.write(json.dumps(found) + "\n")
            file.flush()
            print(f"{count}/{len(missing)} {found['cell']} {found['accuracy']:.3f}", flush=True)


def lines(path: Path) -> list[dict[str, object]]:
    """What is there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read(path: Path) -> Found:
    """Final metrics of every run, by cell without its seed."""
    found: dict[Key, list[Mapping[str, float]]] = defaultdict(list)
    for line in lines(path):
        cut, rule, attack, _ = line["cell"]
        found[cut, rule, attack].append(line)
    return found


def mean_of(runs: list[Mapping[str, float]], metric: str) -> float:
    """Mean over seeds; NaN where nothing ran."""
    values = [run[metric] for run in runs if metric in run]
    return fmean(values) if values else float("nan")


def tables(found: Found) -> None:
    """Prints accuracy, the worst case and the backdoor's success for each cut."""
    for cut in CUTS:
        honest = {
            count: 100 * mean_of(found[cut, HONEST, str(count)], "accuracy") for count in (4, 6)
        }
        print(f"\n### {cut}\n")
        print(
            f"FedAvg on the 14 honest clients alone: {honest[6]:.1f}%; on 16: {honest[4]:.1f}%.\n"
        )
        print(f"| rule | {' | '.join(ATTACKS)} | worst model poisoning | backdoor's success |")
        print(f"| --- |{' --: |' * (len(ATTACKS) + 2)}")
        for rule in ("fedavg", *RULES):
            row = [100 * mean_of(found[cut, rule, attack], "accuracy") for attack in ATTACKS]
            worst = min(row[1 : 1 + len(POISONING)]) - honest[liars(rule)]
            success = 100 * mean_of(found[cut, rule, "backdoor"], "backdoor_success")
            shown = " | ".join(f"{cell:.1f}" for cell in row)
            print(f"| {rule} | {shown} | {worst:+.1f} | {success:.1f} |")


def draw(found: Found, cut: str, path: Path) -> None:
    """A heat map: accuracy less that of FedAvg on the honest clients alone, in points."""
    rules = ("fedavg", *RULES)
    values = np.array(
        [
            [
                100 * mean_of(found[cut, rule, attack], "accuracy")
                - 100 * mean_of(found[cut, HONEST, str(liars(rule))], "accuracy")
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
    parser.add_argument("file", type=Path, help="for the runs' results, JSON lines")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--draw", action="store_true", help="draw docs/figures/robust_*.png")
    parser.add_argument("--tables", action="store_true", help="of what is there; run nothing")
    options = parser.parse_args()
    if not options.tables:
        run_all(options.file, options.jobs)
    print(versions(), "20 clients, 6 liars (4 for bulyan, bucketing), seeds 1, 2, 3")
    found = read(options.file)
    tables(found)
    for cut in CUTS if options.draw else ():
        draw(found, cut, FIGURES / f"robust_{cut}.png")


if __name__ == "__main__":
    main()
