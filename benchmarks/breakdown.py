"""What bounds a round: where the engine's time goes on the two jobs of against_pfl.py, in one process.

    python benchmarks/breakdown.py

Methods are timed from outside, each without what it calls of the others in the list; the rest is Flower's messages and
the engine's own bookkeeping.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from against_pfl import JOBS, overrides_of
from common import versions

from clients.resident import ResidentModel
from clients.stacked import StackedModel
from clients.trainers import SGD, together
from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.run import run_engine
from strategies import exchange, pipeline
from strategies.collectors import plain
from strategies.combiners.mean import MeanAccumulator

PARTS: tuple[tuple[str, object, str], ...] = (
    ("forward and backward, one by one", SGD, "_descend"),
    ("forward and backward, at once", together, "_descend"),
    ("optimiser's steps", SGD, "step"),
    ("shuffling and padding", together._Plan, "of"),
    ("loading the model", ResidentModel, "load"),
    ("loading the model", together, "_starts"),
    ("changes of the model", ResidentModel, "sections"),
    ("changes of the model", StackedModel, "vectors"),
    ("reading replies", plain.PlainSession, "receive"),
    ("adding up", MeanAccumulator, "add"),
    ("counting bytes", exchange, "count_bytes"),
    ("stages", pipeline, "encode"),
)


class Stopwatches:
    """Seconds by part, each without the parts within it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with a watch on it."""

        def call(*args: Any, **keywords: Any) -> Any:
            self._inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **keywords)
            finally:
                spent = time.perf_counter() - began
                self.seconds[part] += spent - self._inner.pop()
                self._inner[-1] += spent

        return call


def measure(job: str, folder: str) -> None:
    """One run, told part by part."""
    watches = Stopwatches()
    originals = [(owner, name, getattr(owner, name)) for _, owner, name in PARTS]
    for (part, owner, name), (*_, original) in zip(PARTS, originals, strict=True):
        setattr(owner, name, watches.timed(part, original))
    try:
        config = compose(
            [*overrides_of(job), "runtime.workers=1", f"output_dir={folder}", "resume=never"]
        )
        result = run_engine(config, PlainConsole(io.StringIO()))
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
    rows = json.loads(result.summary_path.read_text())["history"]
    total = sum(row["seconds"] for row in rows)
    clients = sum(row["clients_sampled"] for row in rows)
    print(f"{job}: {1e6 * total / clients:,.0f} µs a client")
    rest = total - sum(watches.seconds.values())
    for part, seconds in [*watches.seconds.most_common(), ("messages and the rest", rest)]:
        print(f"  {part:<34} {1e6 * seconds / clients:>9,.1f} µs  {seconds / total:4.0%}")


def main() -> None:
    """Measures both jobs."""
    torch.set_num_threads(1)
    print(versions(), f"load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        for job in JOBS:
            measure(job, folder)


if __name__ == "__main__":
    main()
