"""Does a model drift over 1,000 rounds of aggregation? Ours beside a float32 accumulation.

    python benchmarks/drift.py

Both add the same client updates (20 a round, weights by examples). The reference is numpy's 80-bit extended precision.
Prints the largest error relative to what has been added up, and draws docs/figures/drift.png.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from common import FIGURES, versions
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from strategies.combiners import Mean
from strategies.protocols import Plan
from strategies.server_models import SGD, ServerModel
from strategies.update import DELTA, Section, Update

ROUNDS, CLIENTS, SIZE, SEED = 1_000, 20, 10_000, 0


def measure() -> dict[str, list[float]]:
    """Error after each round: max over elements of |x - reference| / Σ|added|."""
    rng = np.random.default_rng(SEED)
    start = rng.standard_normal(SIZE).astype(np.float32)
    model = ServerModel({"weight": start}, SGD())
    layout = model.layouts[DELTA]
    plain = start.copy()
    reference = start.astype(np.longdouble)
    added = np.abs(start).astype(np.float64)
    errors: dict[str, list[float]] = {"Trellis": [], "float32 accumulation": []}
    for version in range(ROUNDS):
        deltas = rng.normal(0, 1e-4, (CLIENTS, SIZE)).astype(np.float32) + np.float32(1e-4)
        examples = rng.integers(1, 1_000, CLIENTS)
        accumulator = Mean().begin(Plan(model.layouts, CLIENTS, CLIENTS))
        total = np.zeros(SIZE, np.float32)
        for delta, weight in zip(deltas, examples, strict=True):
            accumulator.add(Update({DELTA: Section(delta, layout)}, float(weight), (0,), version))
            total += delta * np.float32(weight)
        aggregate = accumulator.result()
        assert aggregate is not None
        model.apply(aggregate)
        plain += total / np.float32(examples.sum())
        exact = (deltas.astype(np.longdouble) * examples[:, None]).sum(0) / examples.sum()
        reference += exact
        added += np.abs(exact).astype(np.float64)
        for name, vector in (("Trellis", model.parameters), ("float32 accumulation", plain)):
            errors[name].append(float(np.max(np.abs(vector - reference) / added)))
    return errors


def draw(errors: dict[str, list[float]], path: Path) -> None:
    """Both errors by round, on a logarithmic scale."""
    figure = Figure(figsize=(6, 3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (name, values), color in zip(errors.items(), ("#1f3a5f", "#c8553d"), strict=True):
        axes.semilogy(range(1, len(values) + 1), values, label=name, color=color)
    axes.set(xlabel="round", ylabel="largest relative error", title="Rounding error of the model")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Measures, prints and draws."""
    print(versions(), f"seed {SEED}, {ROUNDS} rounds of {CLIENTS} clients, d = {SIZE}")
    errors = measure()
    for name, values in errors.items():
        print(f"{name:<22} after 10 rounds {values[9]:.1e}, after {ROUNDS} {values[-1]:.1e}")
    draw(errors, FIGURES / "drift.png")


if __name__ == "__main__":
    main()
