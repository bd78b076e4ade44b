"""What down-link compression saves and costs: bytes down a round and accuracy, on MNIST with the cnn.

    python benchmarks/downlink.py [--seeds 2] [--output FOLDER]

Ten of ten clients for 15 rounds, and ten of a hundred for 30, each with the whole model sent and with `downlink=delta`
on grids of several widths; and what becomes of the second where the server remembers more versions. Runs that are in
the folder already are read, not repeated. Prints tables, and draws docs/figures/downlink.png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import FIGURES, trellis, versions
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COHORT = 10
BITS = (6, 8, 10, 12)
CASES = {
    "10 of 10": ("num_clients=10", "rounds=15"),
    "10 of 100": ("num_clients=100", "sampler.fraction=0.1", "rounds=30"),
}
REMEMBERED = (4, 16)


def summary(folder: Path, name: str, *overrides: str) -> dict[str, Any]:
    """A run's summary, from the folder where it is there."""
    path = folder / name / "summary.json"
    if path.exists() and (found := json.loads(path.read_text()))["status"] == "completed":
        return dict(found)
    return trellis(folder, f"run_name={name}", "runtime.workers=1", *overrides)[0]


def down(one: dict[str, Any]) -> list[float]:
    """What a client is sent, in kB, by round."""
    return [row["download_bytes"] / COHORT / 1e3 for row in one["history"]]


def table(folder: Path, case: str, seeds: range) -> dict[str, list[float]]:
    """Prints a row for each grid; kB to a client by round, of the first seed."""
    curves: dict[str, list[float]] = {}
    print(f"\n### {case} clients a round, {len(seeds)} seeds\n")
    print(
        "| down-link | kB down, first round | mean of all | last 5 rounds | accuracy | against whole, by seed |"
    )
    print("|---|---|---|---|---|---|")
    whole: list[float] = []
    for setting in ("none", *BITS):
        chosen = (
            ("downlink=none",)
            if setting == "none"
            else ("downlink=delta", f"downlink.bits={setting}")
        )
        slug = f"{case.replace(' ', '')}-{setting}"
        runs = [
            summary(folder, f"{slug}-{seed}", *CASES[case], *chosen, f"seed={seed}")
            for seed in seeds
        ]
        sizes = np.array([down(one) for one in runs])
        accuracy = [100 * one["final"]["accuracy"] for one in runs]
        whole = whole or accuracy
        apart = ", ".join(f"{one - other:+.1f}" for one, other in zip(accuracy, whole, strict=True))
        label = "whole" if setting == "none" else f"{setting} bits"
        print(
            f"| {label} | {sizes[:, 0].mean():.1f} | {sizes.mean():.1f} | {sizes[:, -5:].mean():.1f} "
            f"| {np.mean(accuracy):.1f} | {apart} |"
        )
        curves[label] = list(sizes[0])
    return curves


def remembered(folder: Path) -> None:
    """Prints what ten of a hundred are sent where the server remembers more or fewer versions."""
    print("\n### 10 of 100 clients a round, 8 bits, seed 0\n")
    print("| versions remembered | mean of all | last 10 rounds |")
    print("|---|---|---|")
    for count in REMEMBERED:
        chosen = ("downlink=delta", "downlink.bits=8", f"downlink.versions={count}", "seed=0")
        sizes = down(summary(folder, f"remembers-{count}", *CASES["10 of 100"], *chosen))
        print(f"| {count} | {np.mean(sizes):.1f} | {np.mean(sizes[-10:]):.1f} |")


def draw(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """What a client is sent by round, a panel for each case."""
    figure = Figure(figsize=(8, 3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (case, lines) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        for label, sizes in lines.items():
            axes.plot(range(1, len(sizes) + 1), sizes, label=label)
        axes.set(xlabel="round", ylabel="kB down to a client", title=f"{case} clients", ylim=0)
        axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def main() -> None:
    """Runs what is missing, prints and draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    print(versions(), f"seeds 0 to {given.seeds - 1}")
    folder = given.output or Path(tempfile.mkdtemp())
    draw(
        {case: table(folder, case, range(given.seeds)) for case in CASES}, FIGURES / "downlink.png"
    )
    remembered(folder)


if __name__ == "__main__":
    main()
