"""What the server does with each update when everything is on: updates a second, and what it adds to a round.

    OMP_NUM_THREADS=1 python benchmarks/aggregation_path.py                 # both tables, some minutes
    OMP_NUM_THREADS=1 python benchmarks/aggregation_path.py --only updates  # or rounds

Updates: a cohort's replies, as the records that clients make, through session, admission, server halves and combiner,
in one process with one thread. A cohort's seconds are the least of several; an update's are those from its reply to
its place in the combiner, whose own work at the end of the round is shared by all. Beside them the time to read the
vectors once, as float32: what memory allows.

Rounds: whole rounds of the in-process engine with 100 clients and 101,770 parameters, the same training on both sides,
plain FedAvg and everything on by turns.

Seconds are the processor's, which for one thread are those of the clock on a machine that is idle: who else uses it
changes them less. The clock's stand beside them for rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from common import versions
from flwr.app import ConfigRecord

from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.run import run_engine
from strategies.combiners import Krum, Mean, NearestNeighborMixing, TrimmedMean
from strategies.encoding import encode
from strategies.exchange import Exchange
from strategies.hooks import RoundView
from strategies.pipeline import Pipeline
from strategies.protocols import Combiner, Job, Reply, Stage
from strategies.replies import write_update
from strategies.schedulers.tally import Meter, Tally, admitted, following
from strategies.server_models import SGD, ServerModel
from strategies.stages import Clip, Quantize, TopK
from strategies.update import DELTA, Section, Update

LAYERS = 10
"""Arrays of about equal size that a model is made of."""
COHORTS = {1_000: 1_000, 100_000: 100, 1_000_000: 50}
"""Clients by parameters."""
COMPRESSIONS: Mapping[str, TopK | Quantize | None] = {
    "none": None,
    "quantize, 8 bits": Quantize(),
    "top-k, 1%": TopK(),
}
RULES = ("mean", "krum", "trimmed mean", "nnm + trimmed mean")
SECONDS = 3.0
"""At least three cohorts a cell, and more until so many seconds are over."""


@dataclass(frozen=True)
class Cell:
    """What a cell came to.

    Attributes:
        cohort: least seconds from the first reply to the aggregate.
        each: seconds of each update, from its reply to its place in the combiner.
        reading: seconds to read the cohort's vectors once.
        clients: of a cohort.
        bytes: of one update's vectors on the wire.
    """

    cohort: float
    each: list[float] = field(repr=False)
    reading: float
    clients: int
    bytes: int


def rule(name: str) -> Combiner:
    """A combiner with its default f, three tenths of the cohort."""
    rules: dict[str, Combiner] = {
        "mean": Mean(),
        "krum": Krum(),
        "trimmed mean": TrimmedMean(),
        "nnm + trimmed mean": NearestNeighborMixing(rule=TrimmedMean()),
    }
    return rules[name]


def stages_of(compression: TopK | Quantize | None) -> Sequence[Stage]:
    """The stages of a run that also clips."""
    first, last = ([], []) if compression is None else compression.stages()
    return [*first, Clip(1.0), *last]


def replies(pipeline: Pipeline, job: Job, clients: int) -> list[Reply]:
    """What an honest cohort sends: a common direction and each client's own, a fifth of them longer than the clip."""
    layout = job.layouts[DELTA]
    common = np.random.default_rng(0).standard_normal(layout.size, dtype=np.float32)
    config = ConfigRecord({**job.config, "server-round": job.round})
    found = []
    for client, request in enumerate(pipeline.collector.open(job, range(clients)).start()):
        own = np.random.default_rng([1, client]).standard_normal(layout.size, dtype=np.float32)
        length = 0.9 + 0.5 * (client % 5 == 0)
        vector = (common + own) * np.float32(length / np.sqrt(2 * layout.size))
        update = Update({DELTA: Section(vector, layout)}, 40.0, (client,), job.version)
        update = encode(update, pipeline.stages, config, client)
        content = write_update(update, client=client, round_number=job.round)
        found.append(Reply(request, content))
    return found


def aggregate(pipeline: Pipeline, job: Job, cohort: Sequence[Reply]) -> list[float]:
    """One round's replies to one update: seconds by reply."""
    session = pipeline.collector.open(job, range(len(cohort)))
    session.start()
    accumulator, tally, each = pipeline.begin(job, len(cohort)), Tally(), []
    for reply in cohort:
        began = time.process_time()
        for event in following(session, reply):
            update = admitted(pipeline, event, tally)
            assert update is not None, tally.refusals
            accumulator.add(update)
            tally.taken(update, pipeline)
        each.append(time.process_time() - began)
    assert accumulator.result() is not None
    return each


def measure(name: str, compression: TopK | Quantize | None, size: int) -> Cell:
    """One cell of the first table."""
    clients = COHORTS[size]
    pipeline = Pipeline(combiner=rule(name), stages=stages_of(compression))
    parts = np.array_split(np.zeros(size, np.float32), LAYERS)
    model = ServerModel({f"a{index}": part for index, part in enumerate(parts)}, SGD())
    job = pipeline.job(model)
    cohort = replies(pipeline, job, clients)
    seconds: list[float] = []
    each: list[float] = []
    began = time.monotonic()
    while len(seconds) < 3 or time.monotonic() - began < SECONDS:
        start = time.process_time()
        each += aggregate(pipeline, job, cohort)
        seconds.append(time.process_time() - start)
    travelled = cohort[0].content
    assert travelled is not None
    sent = sum(len(array.data) for array in travelled.array_records["update"].values())
    return Cell(min(seconds), each, _reading(clients, size), clients, sent)


def _reading(clients: int, size: int) -> float:
    """Seconds to read so many vectors once: a maximum of each, the best of three."""
    matrix = np.zeros((clients, size), np.float32)
    matrix += np.float32(1)
    best = np.inf
    for _ in range(3):
        start = time.process_time()
        for row in matrix:
            row.max()
        best = min(best, time.process_time() - start)
    return float(best)


def updates(sizes: Sequence[int]) -> None:
    """The first table."""
    print("\n### From replies to the aggregate\n")
    print(
        "| d | clients | combiner | compression | bytes | updates a second | an update, p99, ms "
        "| reading once | over it |"
    )
    print("| --: | --: | --- | --- | --: | --: | --: | --: | --: |")
    for size in sizes:
        for name in RULES:
            for label, compression in COMPRESSIONS.items():
                if name.endswith("trimmed mean") and isinstance(compression, TopK):
                    continue  # the contract refuses it: coordinates that few clients send are trimmed away
                found = measure(name, compression, size)
                print(
                    f"| {size:,} | {found.clients:,} | {name} | {label} | {found.bytes:,} "
                    f"| {found.clients / found.cohort:,.0f} | {1e3 * np.quantile(found.each, 0.99):.2f} "
                    f"| {found.clients / found.reading:,.0f} | {found.cohort / found.reading:.1f}× |",
                    flush=True,
                )


PLAIN: tuple[str, ...] = ()
EVERYTHING: Mapping[str, tuple[str, ...]] = {
    "8 bits, clip, nnm + trimmed mean, quarantine": (
        "compression=quantize", "clip=fixed", "combiner=nnm", "quarantine=strikes",
    ),
    "top-k 1%, clip, Krum, quarantine": (
        "compression=top_k", "clip=fixed", "combiner=krum", "quarantine=strikes",
    ),
}  # fmt: skip
JOB = ("task=mnist", "task.partition=iid", "model=mlp", "model.hidden=[128]", "num_clients=100",
       "evaluate.every=0", "runtime.workers=1", "resume=never")  # fmt: skip
EPOCHS = (1, 3)
"""Local ones, of 40 images in batches of 20: 2 and 6 steps, and clients train at once. 3 is the default."""


def rounds(repeats: int, count: int) -> None:
    """The second table: sides by turns, medians over all rounds but each run's first."""
    print("\n### Rounds of the engine, 100 clients, 101,770 parameters, one process\n")
    print(
        "| local steps | what is on | a round, ms | over FedAvg | by the clock, ms | over FedAvg |"
    )
    print("| --: | --- | --: | --: | --: | --: |")
    sides = {"FedAvg": PLAIN, **EVERYTHING}
    for epochs in EPOCHS:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(repeats):
            for name, overrides in sides.items():
                extra = (f"client.local_epochs={epochs}", f"rounds={count}")
                found[name] += _run([*JOB, *overrides, *extra])[1:]
        plain = [median(column) for column in zip(*found["FedAvg"], strict=True)]
        for name, rows in found.items():
            both = zip(map(median, zip(*rows, strict=True)), plain, strict=True)
            cells = [f"{1e3 * one:,.0f} | {100 * (one / other - 1):+.0f}%" for one, other in both]
            print(f"| {2 * epochs} | {name} | {' | '.join(cells)} |", flush=True)


def _run(overrides: Sequence[str]) -> list[tuple[float, float]]:
    """Seconds of a run's rounds, the processor's and the clock's."""
    spent: list[float] = []
    began = [0.0]
    begin, view = Meter.begin, Meter.view

    def beginning(exchange: Exchange) -> Meter:
        began[0] = time.process_time()
        return begin(exchange)

    def ending(*args: Any, **keywords: Any) -> RoundView:
        found = view(*args, **keywords)
        spent.append(time.process_time() - began[0])
        return found

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(Meter, "begin", beginning),
        patch.object(Meter, "view", ending),
    ):
        config = compose([*overrides, f"output_dir={folder}"])
        result = run_engine(config, PlainConsole(io.StringIO()))
        history = json.loads(result.summary_path.read_text())["history"]
    if result.status != "completed" or any(row["void"] for row in history):
        raise RuntimeError(f"{overrides}: {result.status}, {result.reason}")
    return list(zip(spent, [row["seconds"] for row in history], strict=True))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("updates", "rounds"), help="one table only")
    parser.add_argument("--size", type=int, choices=tuple(COHORTS), help="one size only")
    parser.add_argument("--repeats", type=int, default=3, help="runs a side")
    parser.add_argument("--rounds", type=int, default=8, help="rounds a run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(versions(), f"load {os.getloadavg()[0]:.1f}")
    if options.only != "rounds":
        updates(tuple(COHORTS) if options.size is None else (options.size,))
    if options.only != "updates":
        rounds(options.repeats, options.rounds)


if __name__ == "__main__":
    main()
