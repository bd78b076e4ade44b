"""What masks add to whole rounds of the engine: 100 clients, a CNN of 1.0M parameters, one local epoch of MNIST.

    python benchmarks/secagg_training.py                         # one worker and two: ten minutes
    python benchmarks/secagg_training.py --workers 1 --width 24   # a CNN of 45,000 parameters

4,000 images, 40 a client, IID. Each run is a process of its own; a round's seconds are from sampling to the new model,
and its processor seconds those of the process and its workers. With one worker the parts are told apart from outside;
what training takes there also says what the ratio would be with the 600 images a client of a whole MNIST.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import psutil
import torch
from common import measured, versions
from rounds import Watch

from clients.client import Client
from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.run import run_engine
from strategies import exchange
from strategies.collectors.masked_session import MaskedSession
from strategies.collectors.plain import PlainClient, PlainSession
from strategies.combiners.mean import MeanAccumulator
from strategies.schedulers import Synchronous
from strategies.secagg.member import MaskedClient

CLIENTS, IMAGES, WHOLE = 100, 40, 600
JOB = (
    "task.partition=iid",
    "task.test_fraction=0",
    f"num_clients={CLIENTS}",
    "client.local_epochs=1",
    "model=cnn",
    "evaluate.every=0",
    "rounds=1",
    "resume=never",
)
SIDES = {
    "plain": ("strategy=fedavg",),
    "masked, 5% may drop out": ("strategy=secure", "collector.dropouts=0.05"),
    "masked, 30% may drop out": ("strategy=secure", "collector.dropouts=0.3"),
}
PARTS: dict[str, tuple[tuple[type | Any, str], ...]] = {
    "training": ((Client, "_fit"),),
    "clients' protocol": (
        (MaskedClient, "prepare"),
        (MaskedClient, "reply"),
        (MaskedClient, "answer"),
        (PlainClient, "reply"),
    ),
    "server's protocol": (
        *((MaskedSession, name) for name in ("start", "receive", "expire")),
        (PlainSession, "receive"),
        (MeanAccumulator, "add"),
        (MeanAccumulator, "result"),
    ),
    "counting bytes": ((exchange, "count_bytes"),),
}


class _Tree:
    """Processor and wall seconds of calls, those of this process's children among them."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with the clock on it."""

        @wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            cpu, wall = _cpu(), time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                self.cpu += _cpu() - cpu
                self.wall += time.perf_counter() - wall

        return call


def _cpu() -> float:
    process = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return float(sum(spent.user + spent.system for spent in times))


def one(overrides: list[str]) -> None:
    """One run in this process, as a line of JSON."""
    tree, parts = _Tree(), {part: Watch() for part in PARTS}
    Synchronous._round = tree.watch(Synchronous._round)  # type: ignore[method-assign]
    for part, methods in PARTS.items():
        for owner, name in methods:
            setattr(owner, name, _watched(getattr(owner, name), parts[part]))
    with tempfile.TemporaryDirectory() as folder:
        config = compose([*JOB, *overrides, f"output_dir={folder}"])
        result = run_engine(config, PlainConsole(io.StringIO()))
        if result.status != "completed":
            raise RuntimeError(result.reason)
        summary = json.loads(result.summary_path.read_text())
    row = summary["history"][0]
    print(
        json.dumps(
            {
                "cpu": tree.cpu,
                "wall": tree.wall,
                "up": row["upload_bytes"],
                "down": row["download_bytes"],
                "parts": {part: watch.cpu for part, watch in parts.items()},
            }
        )
    )


def _watched(function: Callable[..., Any], watch: Watch) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        with watch.on():
            return function(*args, **named)

    return call


def table(workers: int, width: int) -> None:
    """Plain and masked rounds with so many workers."""
    print(f"\n{workers} worker{'s' * (workers > 1)}\n")
    parts = " | ".join(PARTS) if workers == 1 else ""
    print(f"| | round, s | CPU s | over plain | MB up | MB down | {parts} |")
    print("| --- | --: | --: | --: | --: | --: |" + " --: |" * (len(PARTS) if parts else 0))
    plain: dict[str, Any] = {}
    for name, overrides in SIDES.items():
        options = (*overrides, f"model.width={width}", f"runtime.workers={workers}")
        command = [sys.executable, __file__, "--one", *options]
        found = json.loads(measured(command, {"OMP_NUM_THREADS": "1"}).output[-1])
        plain = plain or found
        each = "".join(f" {found['parts'][part]:.2f} |" for part in PARTS) if parts else ""
        print(
            f"| {name} | {found['wall']:.1f} | {found['cpu']:.1f} | {found['cpu'] / plain['cpu']:.3f}× |"
            f" {found['up'] / 1e6:.1f} | {found['down'] / 1e6:.1f} |{each}",
            flush=True,
        )
        if parts and found is not plain:
            added = found["cpu"] - found["parts"]["training"]
            base = plain["cpu"] - plain["parts"]["training"]
            training = plain["parts"]["training"] * WHOLE / IMAGES
            print(
                f"  without training {added:.2f} s against {base:.2f}, {added / base:.1f} times; with {WHOLE} images"
                f" a client (calculated) {(training + added) / (training + base):.3f} times",
                file=sys.stderr,
            )


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/secagg_training.py --workers 1 --width 24",
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--width", type=int, default=153, help="of the CNN: 153 is 1.0M parameters")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        one(options.one)
        return
    print(versions(), f"load {os.getloadavg()[0]:.1f}", flush=True)
    for workers in options.workers:
        table(workers, options.width)


if __name__ == "__main__":
    main()
