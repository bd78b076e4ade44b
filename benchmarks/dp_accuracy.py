"""What ε costs in accuracy where clients are the unit: by ε, by population (an extrapolation), and over 1,000 rounds.

    python benchmarks/dp_accuracy.py build/dp.jsonl            # 37 runs, about 40 minutes on a shared core; resumes
    python benchmarks/dp_accuracy.py build/dp.jsonl --quick    # one fold of hog at ε = 8 and none, two minutes
    python benchmarks/dp_accuracy.py build/dp.jsonl --draw     # also draws docs/figures/dp_accuracy.png
    python benchmarks/dp_accuracy.py build/dp.jsonl --tables   # of what is there; runs nothing

Runs are those of `trellis run strategy=dp` (`dp_cell.py` has the settings); means over folds with 95% intervals by
Student's t, losses fold by fold against the same model, clients, rounds and clip without noise, with a server's rate
and momentum of its own.

Populations beyond the 1,000 clients are not simulated. As in pfl-research (Granqvist et al. 2024, "pfl-research:
simulation framework for accelerating research in Private Federated Learning"), z is found for the large population and
cohort, and the mean of the simulated cohort gets the noise that the mean of the large one would have. No ε is claimed
for such a run: what it shows is the noise's effect, and only that.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common import FIGURES, versions
from dp_cell import (
    CLIENTS,
    COHORT,
    DELTA,
    EPSILONS,
    FOLDS,
    LONG_ROUNDS,
    MODELS,
    POPULATIONS,
    Cell,
    run,
)
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import t as student

Found = dict[Cell, dict[str, Any]]


def cells(quick: bool) -> list[Cell]:
    """Every run, what matters most first."""
    if quick:
        return [("dp", "hog", epsilon, FOLDS[0]) for epsilon in (8.0, 0.0)]
    asked: list[Cell] = []
    for fold in FOLDS:
        asked += [("dp", "hog", epsilon, fold) for epsilon in (0.0, *EPSILONS)]
        asked += [(str(one.clients), "hog", 1.0, fold) for one in POPULATIONS]
        asked += [("dp", "cnn", epsilon, fold) for epsilon in (0.0, *EPSILONS)]
        asked.append(("ftrl", "hog", 3.0, fold))
    return [*asked, ("long", "linear", 1.0, 0)]


def read(path: Path) -> Found:
    """What is there."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["cell"][0], row["cell"][1], row["cell"][2], row["cell"][3]): row for row in rows}


def run_all(path: Path, wanted: Iterable[Cell]) -> None:
    """Runs what the file has not yet, and adds it."""
    done = read(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for cell in wanted:
        if cell in done:
            continue
        found = run(cell)
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{cell} {found['accuracy']:.3f}, {found['seconds']:.0f} s", flush=True)


def values(found: Found, kind: str, model: str, epsilon: float) -> dict[int, float]:
    """Accuracy in percent by fold."""
    return {
        cell[3]: 100 * row["accuracy"]
        for cell, row in found.items()
        if cell[:3] == (kind, model, epsilon)
    }


def losses(found: Found, kind: str, model: str, epsilon: float) -> list[float]:
    """Points lost against the run without privacy, fold by fold."""
    plain = values(found, "dp", model, 0.0)
    private = values(found, kind, model, epsilon)
    return [plain[fold] - private[fold] for fold in sorted(private.keys() & plain.keys())]


def interval(sample: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95% interval; NaN for the half where there is one value only."""
    if len(sample) < 2:
        return (sample[0] if sample else float("nan")), float("nan")
    spread = stdev(sample) / len(sample) ** 0.5
    return fmean(sample), float(student.ppf(0.975, len(sample) - 1)) * spread


def shown(sample: Sequence[float]) -> str:
    """A cell of a table."""
    if not sample:
        return ""
    mean, half = interval(sample)
    return f"{mean:.1f}" if len(sample) < 2 else f"{mean:.1f} ± {half:.1f}"


def by_epsilon(found: Found) -> None:
    """Prints accuracy by model and ε."""
    print(f"\n### Accuracy by ε, {CLIENTS:,} clients, δ = {DELTA:.2g}\n")
    print("| model | run | ε spent | z | rounds | accuracy, % | points lost | folds |")
    print("|---|---|---|---|---|---|---|---|")
    rows = [("dp", model, epsilon) for model in MODELS for epsilon in (0.0, *EPSILONS)]
    for kind, model, epsilon in [*rows, ("ftrl", "hog", 3.0)]:
        sample = values(found, kind, model, epsilon)
        if not sample:
            continue
        row = next(row for cell, row in found.items() if cell[:3] == (kind, model, epsilon))
        name = {"dp": f"ε = {epsilon:g}", "ftrl": f"DP-FTRL, ε = {epsilon:g}"}[kind]
        name = name if epsilon else "no privacy"
        told = row["privacy"]
        spent, z = (
            (f"{told['epsilon']:.3f}", f"{told['noise_multiplier']:.3g}") if told else ("", "")
        )
        lost = shown(losses(found, kind, model, epsilon)) if epsilon else ""
        print(
            f"| {model} | {name} | {spent} | {z} | {row['rounds']} | {shown(list(sample.values()))} |"
            f" {lost} | {', '.join(map(str, sorted(sample)))} |"
        )


def by_population(found: Found) -> None:
    """Prints the extrapolation."""
    print("\n### Extrapolation: ε = 1 by population, hog\n")
    print(
        "| population | cohort | δ | z | noise on the mean, of C | accuracy, % | points lost | folds |"
    )
    print("|---|---|---|---|---|---|---|---|")
    rounds = MODELS["hog"].settings[0.0].rounds
    real = values(found, "dp", "hog", 1.0)
    if real:
        row = next(row for cell, row in found.items() if cell[:3] == ("dp", "hog", 1.0))
        z = row["privacy"]["noise_multiplier"]
        print(
            f"| {CLIENTS:,} (run) | {COHORT:,} | {DELTA:.2g} | {z:.3g} | {z / COHORT:.2g} |"
            f" {shown(list(real.values()))} | {shown(losses(found, 'dp', 'hog', 1.0))} |"
            f" {', '.join(map(str, sorted(real)))} |"
        )
    for one in POPULATIONS:
        sample = values(found, str(one.clients), "hog", 1.0)
        if not sample:
            continue
        z = one.noise(1.0, rounds)
        print(
            f"| {one.clients:,} | {one.cohort:,} | {one.delta:.2g} | {z:.3g} | {z / one.cohort:.2g} |"
            f" {shown(list(sample.values()))} | {shown(losses(found, str(one.clients), 'hog', 1.0))} |"
            f" {', '.join(map(str, sorted(sample)))} |"
        )


def long_run(found: Found) -> None:
    """Prints what 1,000 rounds came to, and what their account took."""
    row = found.get(("long", "linear", 1.0, 0))
    if row is None:
        return
    charges = sorted(row["charge_ms"])
    print(
        f"\n### {LONG_ROUNDS} rounds\n\nε = {row['privacy']['epsilon']:.4f} of 1 after {row['rounds']} rounds;"
        f" a charge took {charges[len(charges) // 2]:.1f} ms at the median, {fmean(charges):.1f} ms in the mean,"
        f" {charges[int(0.99 * len(charges))]:.1f} ms at the 99th percentile, {charges[-1]:.0f} ms at most;"
        f" a round {row['round_ms']:.0f} ms; accuracy {100 * row['accuracy']:.1f}%"
    )


def draw(found: Found, path: Path) -> None:
    """Accuracy by ε, and points lost by population."""
    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for model, colour in zip(MODELS, ("#0072B2", "#D55E00"), strict=True):
        points = [(e, *interval(list(values(found, "dp", model, e).values()))) for e in EPSILONS]
        if any(mean == mean for _, mean, _ in points):
            left.errorbar(
                *zip(*points, strict=True), color=colour, marker="o", capsize=3, label=model
            )
        plain = values(found, "dp", model, 0.0)
        if plain:
            left.axhline(
                fmean(plain.values()), color=colour, linestyle=":", label=f"{model}, no privacy"
            )
    left.set_xscale("log")
    left.set_xticks(EPSILONS, [f"{e:g}" for e in EPSILONS])
    left.minorticks_off()
    left.set(xlabel="ε of a client", ylabel="accuracy, %", title=f"{CLIENTS:,} clients, MNIST")
    left.legend(fontsize=8, loc="lower right")
    sizes = [CLIENTS, *(one.clients for one in POPULATIONS)]
    kinds = ["dp", *(str(one.clients) for one in POPULATIONS)]
    points = [
        (size, *interval(losses(found, kind, "hog", 1.0)))
        for size, kind in zip(sizes, kinds, strict=True)
    ]
    right.errorbar(*zip(*points, strict=True), color="#0072B2", marker="o", capsize=3)
    right.axhline(0, color="black", linewidth=0.6)
    right.set_xscale("log")
    right.set(
        xlabel="population", ylabel="points lost", title="ε = 1, hog; beyond 1,000 extrapolated"
    )
    figure.savefig(path)


def main() -> None:
    """Runs what is missing, prints the tables, draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="for the runs' results, JSON lines")
    parser.add_argument("--quick", action="store_true", help="one fold, hog, ε = 8 and none")
    parser.add_argument("--draw", action="store_true", help="draw docs/figures/dp_accuracy.png")
    parser.add_argument("--tables", action="store_true", help="of what is there; run nothing")
    options = parser.parse_args()
    print(versions(), f"seed = fold, folds {', '.join(map(str, FOLDS))} of 0 to 4")
    if not options.tables:
        run_all(options.file, cells(options.quick))
    found = read(options.file)
    by_epsilon(found)
    by_population(found)
    long_run(found)
    if options.draw:
        draw(found, FIGURES / "dp_accuracy.png")


if __name__ == "__main__":
    main()
