"""What clients cost the server: rounds an hour, aggregation and memory with 100 to 100,000 virtual devices.

    python benchmarks/scale.py                     # all rows, some minutes
    python benchmarks/scale.py --rows 10000:1000   # devices:asked a round

The same 200,000 random images of 8 × 8 (51 MB) cut among more and more devices, and a multilayer perceptron of 101,260
parameters. Each row is a process of its own, which does all the work, clients' training too, on one CPU: `rounds an
hour` has both in it, `aggregation` what the server alone does: of a reply, from its arrival to its place in the
combiner; of a round, the sum of those and what turns them into the new model.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
from common import versions

from fl_app.assembly import Assembly, composed, engine_grid
from fl_app.compose import compose
from strategies.hooks import RoundView
from strategies.schedulers import synchronous
from strategies.server_models import ServerModel

ROWS = ((100, 50), (1_000, 100), (10_000, 1_000), (100_000, 1_000))
"""Devices in all, and asked each round."""
ROUNDS = 20
_T = TypeVar("_T")


class Watch:
    """Seconds of the server's own work, by reply and by round."""

    def __init__(self) -> None:
        self.replies: list[float] = []
        self.rounds: list[float] = []
        self._reply, self._round = 0.0, 0.0

    def timed(self, function: Callable[..., _T]) -> Callable[..., _T]:
        """The same function, whose time counts."""

        def call(*arguments: Any, **keywords: Any) -> _T:
            began = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                self._round += (spent := time.perf_counter() - began)
                self._reply += spent

        return call

    def taken(self) -> None:
        """A reply is in its place."""
        self.replies.append(self._reply)
        self._reply = 0.0

    def over(self, _view: RoundView) -> None:
        """A round is over; for `hooks`."""
        self.rounds.append(self._round)
        self._reply, self._round = 0.0, 0.0


def measure(devices: int, asked: int) -> None:
    """One row, in this process; printed as JSON."""
    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        config = compose(
            [
                "task._target_=jobs.RandomImages",
                "task.examples=200000",
                "task.shape=[1,8,8]",
                "task.partition=iid",
                "task.test_fraction=0",
                "model=mlp",
                "model.hidden=[1350]",
                f"num_clients={devices}",
                f"sampler.fraction={asked / devices}",
                "client.local_epochs=1",
                "client.lr=0.01",
                f"rounds={ROUNDS}",
                "evaluate.every=0",
                "runtime.workers=1",
                f"output_dir={folder}",
            ]
        )
        assembly = Assembly(config)
        strategy = composed(assembly, devices)
        watch, views = Watch(), list[RoundView]()
        strategy.hooks = [watch.over, views.append]  # type: ignore[list-item]
        begin = strategy.pipeline.begin

        def watched(*arguments: Any) -> Any:
            accumulator = begin(*arguments)
            add = watch.timed(accumulator.add)

            def placed(update: Any) -> None:
                add(update)
                watch.taken()

            accumulator.add, accumulator.result = placed, watch.timed(accumulator.result)
            return accumulator

        with (
            patch.object(synchronous, "following", watch.timed(synchronous.following)),
            patch.object(synchronous, "admitted", watch.timed(synchronous.admitted)),
            patch.object(ServerModel, "apply", watch.timed(ServerModel.apply)),
            patch.object(strategy.pipeline, "begin", watched),
            engine_grid(assembly, devices, 0.0) as grid,
        ):
            strategy.start(grid, assembly.network.arrays(), ROUNDS, evaluate_fn=None)
    seconds = [view.seconds for view in views]
    print(
        json.dumps(
            {
                "parameters": assembly.network.size,
                "start": time.perf_counter() - began - sum(seconds),
                "round": float(np.median(seconds[1:])),
                "reply_p99": float(np.quantile(watch.replies, 0.99)),
                "round_p99": float(np.quantile(watch.rounds, 0.99)),
                "memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            }
        )
    )


def main() -> None:
    """Measures each row in a process of its own, and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows = ",".join(f"{devices}:{asked}" for devices, asked in ROWS)
    parser.add_argument("--rows", default=rows, help="devices:asked, by commas")
    parser.add_argument("--measure", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
        return
    print(versions(), f"{ROUNDS} rounds, load {os.getloadavg()[0]:.1f}\n", flush=True)
    print(
        "| devices | asked a round | parameters | rounds an hour | a round, s | aggregation of a reply, p99, ms "
        "| of a round, p99, s | start-up, s | peak memory, MB |\n|" + "---|" * 9,
        flush=True,
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    for row in options.rows.split(","):
        devices, asked = map(int, row.split(":"))
        done = subprocess.run(
            [sys.executable, __file__, "--measure", str(devices), str(asked)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {devices:,} | {asked:,} | {found['parameters']:,} | {3600 / found['round']:,.0f} "
            f"| {found['round']:.2f} | {1e3 * found['reply_p99']:.2f} | {found['round_p99']:.2f} "
            f"| {found['start']:.1f} | {found['memory'] / 1e6:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
