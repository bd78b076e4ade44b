"""Do stale updates diverge at a high server rate, and do weights and damping hold them? On a quadratic.

    python benchmarks/staleness.py

Fifty clients pull a model of 20 parameters towards optima of their own, each by the whole distance from the model that
it was sent. With Δ(x_{t−τ}) of one fixed age τ the step x ← x + η·Δ diverges for η > 2·sin(π / (4τ + 2)): a high rate
and old updates do together what neither does alone. The scheduler and the engine are the real ones; the clients' speeds
are log-normal. Prints how far from the mean of all optima the model is, by way and seed, and draws
docs/figures/staleness.png.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import pi, sin
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from common import FIGURES, versions
from flwr.app import Message
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fl_app.engine import DeviceModel, EngineGrid, InProcessPool, one_by_one
from strategies.combiners import Mean
from strategies.exchange import Exchange
from strategies.pipeline import Pipeline
from strategies.replies import write_update
from strategies.schedulers import Buffered, Constant, Polynomial
from strategies.server_models import SGD, ServerModel
from strategies.update import DELTA, Layout, Section, Update
from strategies.wire import ARRAYS, config_of, integer_in, unpack_model

CLIENTS, SIZE, VERSIONS, SEEDS = 50, 20, 120, (0, 1, 2)
BUFFER, BUSY, RATE, START = 5, 45, 0.9, 10.0
WAYS: Mapping[str, Mapping[str, Any]] = {
    "five busy": {"staleness": Constant(), "concurrency": BUFFER},
    "neither": {"staleness": Constant()},
    "weights": {"staleness": Polynomial(0.5)},
    "damping": {"staleness": Constant(), "damp": True},
    "weights and damping": {"staleness": Polynomial(0.5), "damp": True},
}
COLOURS = ("#7a7a7a", "#c8553d", "#d9a441", "#1f3a5f", "#3d8f6d")


def run(seed: int, *, steps: int = VERSIONS, **settings: Any) -> tuple[list[float], float]:
    """The distance from the mean of all optima after each version, and the mean staleness."""
    optima = np.random.default_rng(seed).normal(0, 1, (CLIENTS, SIZE)).astype(np.float32)

    def answer(message: Message) -> Message:
        config = config_of(message.content)
        client = integer_in(config, "client")
        sent = unpack_model(message.content.array_records[ARRAYS])
        change = Section(optima[client] - sent["x"], Layout.of(sent))
        update = Update({DELTA: change}, 1.0, (client,), integer_in(config, "version"))
        at = integer_in(config, "server-round")
        return Message(write_update(update, client=client, round_number=at), reply_to=message)

    given = {"buffer": BUFFER, "concurrency": BUSY, "max_staleness": 1_000, **settings}
    scheduler = Buffered(population=CLIENTS, **given)
    pipeline = Pipeline(
        combiner=Mean(weighting="uniform"), optimizer=SGD(lr=RATE), scheduler=scheduler
    )
    pipeline.check(frozenset({DELTA}))
    model = ServerModel({"x": np.full(SIZE, START, np.float32)}, pipeline.optimizer)
    distances, ages = [], []
    with InProcessPool(lambda: one_by_one(answer)) as pool:
        grid = EngineGrid(
            pool,
            num_clients=CLIENTS,
            devices=DeviceModel(speed_sigma=0.5),
            seed=seed,
            work=lambda client: 1_000.0,
        )
        for view in scheduler.run(pipeline, model, Exchange(grid), steps, seed=seed):
            distances.append(float(np.linalg.norm(model.parameters - optima.mean(axis=0))))
            ages += view.staleness
    return distances, fmean(ages)


def draw(found: Mapping[str, list[list[float]]], path: Path) -> None:
    """The distance by version, on a logarithmic scale: thin lines are seeds, thick ones their median."""
    figure = Figure(figsize=(6.5, 3.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (name, runs), colour in zip(found.items(), COLOURS, strict=True):
        steps = range(1, len(runs[0]) + 1)
        for one in runs:
            axes.semilogy(steps, one, color=colour, linewidth=0.5, alpha=0.5)
        axes.semilogy(steps, np.median(runs, axis=0), color=colour, label=name)
    axes.set(xlabel="version", ylabel="distance from the optimum", ylim=(0.1, 1e6))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper left", fontsize="small")
    figure.savefig(path)


def main() -> None:
    """Measures, prints and draws."""
    print(versions(), f"seeds {SEEDS}, rate {RATE}, K = {BUFFER}, {BUSY} of {CLIENTS} busy")
    found: dict[str, list[list[float]]] = {}
    for name, settings in WAYS.items():
        runs = [run(seed, **settings) for seed in SEEDS]
        found[name] = [distances for distances, _ in runs]
        age = median(age for _, age in runs)
        most = 2 * sin(pi / (4 * age + 2))
        ends = ", ".join(f"{fmean(distances[-20:]):.2g}" for distances, _ in runs)
        print(
            f"{name:<20} mean age {age:.1f} (one fixed age bears a rate of {most:.2f}),"
            f" distance over the last 20 versions {ends}"
        )
    draw(found, FIGURES / "staleness.png")


if __name__ == "__main__":
    main()
