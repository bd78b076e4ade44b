"""Adaptive clipping: where the bound goes, ours and that of Flower's wrapper, on the same clients.

    python benchmarks/dp_adaptive_clip.py build/dp_clip.jsonl           # 120 rounds, minutes; resumes
    python benchmarks/dp_adaptive_clip.py build/dp_clip.jsonl --quick   # from 1, the median only
    python benchmarks/dp_adaptive_clip.py build/dp_clip.jsonl --draw    # also draws docs/figures/dp_clip.png

200 clients, each with an update of its own in every round: norms are log-normal (median 2, σ = 0.5 of the logarithm)
and fixed, directions are fresh. The bound should come to a quantile of the norms (Andrew et al. 2021, "Differentially
Private Learning with Adaptive Clipping", Algorithm 1) from 0.1, 1 and 10, with rate 0.2, z = 1 and σ_b = 10 for both.

Ours is a checked `Pipeline` with `AdaptiveClip` and `Central`, client halves and server halves. Flower's is
`DifferentialPrivacyServerSideAdaptiveClipping` round `FedAvg` as it comes with flwr: it makes its requests, gets Flower
messages with weights in reply, and aggregates them.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from common import FIGURES, versions
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideAdaptiveClipping, FedAvg
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fl_app.engine.flwr_internals import claim_identity
from strategies.collectors import Plain
from strategies.combiners import Mean
from strategies.encoding import encode
from strategies.pipeline import Pipeline
from strategies.privacy import Central
from strategies.samplers import Poisson
from strategies.server_models import ServerModel
from strategies.stages import AdaptiveClip
from strategies.update import DELTA, Layout, Section, Update

CLIENTS, SIZE, ROUNDS = 200, 50, 120
RATE, Z, BIT_NOISE = 0.2, 1.0, 10.0
QUANTILES = (0.5, 0.9)
STARTS = (0.1, 1.0, 10.0)
SEED = 1
LAYOUT = Layout(("w",), ((SIZE,),))
COLOURS = {"ours": "#0072B2", "flower": "#D55E00"}

Row = dict[str, Any]


class Crowd:
    """The clients: norms for good, directions anew in each round.

    Attributes:
        norms: (CLIENTS,) float64.
    """

    def __init__(self) -> None:
        self._rng = np.random.default_rng(SEED)
        self.norms = self._rng.lognormal(np.log(2), 0.5, CLIENTS)

    def updates(self) -> NDArray[np.float32]:
        """One round's, (CLIENTS, SIZE)."""
        rows = self._rng.standard_normal((CLIENTS, SIZE))
        rows *= (self.norms / np.linalg.norm(rows, axis=1))[:, None]
        return rows.astype(np.float32)

    def get_node_ids(self) -> list[int]:
        """Flower's `Grid` as far as `FedAvg`'s sampling asks: who is there."""
        return list(range(1, CLIENTS + 1))


def ours(start: float, quantile: float) -> Iterator[float]:
    """Our bound before each round, and after the last."""
    crowd, clip = Crowd(), AdaptiveClip(start, quantile, RATE)
    pipeline = Pipeline(
        collector=Plain(metrics=False),
        stages=[clip],
        combiner=Mean("uniform", "cohort"),
        privacy=Central(noise_multiplier=Z, bit_noise=BIT_NOISE, population=CLIENTS, rounds=ROUNDS),
        sampler=Poisson(1.0, CLIENTS),
    )
    pipeline.check()
    model = ServerModel({"w": np.zeros(SIZE, np.float32)}, pipeline.optimizer)
    yield clip.present
    for number in range(1, ROUNDS + 1):
        job = pipeline.job(model)
        config = ConfigRecord({**job.config, "server-round": number})
        accumulator = pipeline.begin(job, CLIENTS)
        for client, row in enumerate(crowd.updates()):
            update = Update({DELTA: Section(row, LAYOUT)}, 1.0, (client,), job.version)
            accumulator.add(pipeline.decode(encode(update, pipeline.stages, config, client)))
        aggregate = pipeline.concluded(accumulator.result(), CLIENTS, job)
        if aggregate is None:
            raise RuntimeError("a round of all clients was void")
        model.apply(aggregate)
        pipeline.applied(aggregate, dict.fromkeys(range(CLIENTS), model.version), model.version)
        yield clip.present


def flower(start: float, quantile: float) -> Iterator[float]:
    """The bound of Flower's wrapper before each round, and after the last."""
    claim_identity(1)  # flwr's messages ask for the run that they are of
    crowd = Crowd()
    grid: Any = crowd
    base = FedAvg(fraction_train=1.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
    wrapper = DifferentialPrivacyServerSideAdaptiveClipping(
        base, Z, CLIENTS, start, quantile, RATE, BIT_NOISE
    )
    arrays = ArrayRecord({"w": _array(np.zeros(SIZE, np.float32))})
    yield wrapper.clipping_norm
    for number in range(1, ROUNDS + 1):
        requests = wrapper.configure_train(number, arrays, ConfigRecord(), grid)
        rows = crowd.updates()
        replies = [_trained(request, row) for request, row in zip(requests, rows, strict=True)]
        aggregated, _ = wrapper.aggregate_train(number, replies)
        if aggregated is None:
            raise RuntimeError("Flower aggregated nothing")
        arrays = aggregated
        yield wrapper.clipping_norm


def _array(values: NDArray[np.float32]) -> Any:
    return ArrayRecord([values])["0"]


def _trained(request: Message, update: NDArray[np.float32]) -> Message:
    """What a vanilla Flower client replies: the weights that it was sent, moved by its update."""
    weights = request.content.array_records["arrays"]["w"].numpy().astype(np.float32)
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": _array(weights + update)}),
            "metrics": MetricRecord({"num-examples": 1}),
        }
    )
    return Message(content, reply_to=request)


RUNS: dict[str, Callable[[float, float], Iterator[float]]] = {"ours": ours, "flower": flower}


def table(rows: Sequence[Row]) -> None:
    """Prints where each bound came to."""
    values = {row["quantile"]: row["true"] for row in rows}
    print(f"\nThe mean of the last ten of {ROUNDS} rounds' bounds.\n")
    print(f"| quantile | its true value | bounds | {' | '.join(f'from {s:g}' for s in STARTS)} |")
    print(f"|---|---|---|{'---|' * len(STARTS)}")
    for quantile, who in product(values, RUNS):
        cells = []
        for start in STARTS:
            same = [
                r for r in rows if (r["quantile"], r["who"], r["start"]) == (quantile, who, start)
            ]
            cells += [f"{np.mean(r['bounds'][-10:]):.3g}" for r in same] or [""]
        print(f"| {quantile:g} | {values[quantile]:.3f} | {who} | {' | '.join(cells)} |")
    for row in rows:
        if row["ended"]:
            print(f"{row['who']} from {row['start']:g} at {row['quantile']:g}: {row['ended']}")


def draw(rows: Sequence[Row], path: Path) -> None:
    """The bound by round: a panel for each quantile."""
    figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    quantiles = sorted({row["quantile"] for row in rows})
    panels = figure.subplots(1, len(quantiles), sharey=True, squeeze=False)[0]
    for axes, quantile in zip(panels, quantiles, strict=True):
        labelled = set()
        for row in (row for row in rows if row["quantile"] == quantile):
            who = row["who"]
            label = {"ours": "Trellis", "flower": "flwr's wrapper"}[who]
            axes.semilogy(
                row["bounds"],
                color=COLOURS[who],
                label=None if who in labelled else label,
                linestyle="-" if who == "ours" else "--",
            )
            labelled.add(who)
        axes.axhline(row["true"], color="black", linewidth=0.8, linestyle=":", label="true value")
        axes.set_title(f"quantile {quantile:g} of the clients' norms")
        axes.set_xlabel("round")
        axes.set_ylim(1e-7, 1e10)
    panels[0].set_ylabel("clipping bound C")
    panels[0].legend(fontsize=8, loc="upper left")
    figure.savefig(path)


def found(who: str, quantile: float, start: float) -> Row:
    """One curve, as far as it goes: Flower's wrapper divides by an update's norm, and may come to one of zero."""
    row: Row = {"who": who, "quantile": quantile, "start": start, "ended": ""}
    row |= {"true": float(np.quantile(Crowd().norms, quantile)), "bounds": []}
    try:
        for bound in RUNS[who](start, quantile):
            row["bounds"].append(float(f"{bound:.6g}"))
    except ZeroDivisionError as error:
        row["ended"] = f"round {len(row['bounds'])}: {type(error).__name__}: {error}"
    return row


def main() -> None:
    """Runs what the file has not yet, prints, draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="for the curves, JSON lines")
    parser.add_argument("--quick", action="store_true", help="from 1, and the median only")
    parser.add_argument("--draw", action="store_true", help="draw docs/figures/dp_clip.png")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    print(versions(), f"{CLIENTS} clients, seed {SEED}")
    options.file.parent.mkdir(parents=True, exist_ok=True)
    with options.file.open("a+") as file:
        file.seek(0)
        rows = [json.loads(line) for line in file]
        done = {(row["who"], row["quantile"], row["start"]) for row in rows}
        for quantile, start, who in product(QUANTILES, STARTS, RUNS):
            wanted = not options.quick or (quantile, start) == (0.5, 1.0)
            if wanted and (who, quantile, start) not in done:
                rows.append(found(who, quantile, start))
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
    table(rows)
    if options.draw:
        draw(rows, FIGURES / "dp_clip.png")


if __name__ == "__main__":
    main()
