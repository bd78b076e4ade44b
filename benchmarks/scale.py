"""What clients cost that are not sampled: start-up, round and memory with 100 to 100,000 virtual clients.

    python benchmarks/scale.py

The same 200,000 random images of 8 × 8 (51 MB) cut among more and more clients, 50 of them asked each round.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from statistics import median

from common import trellis, versions

POPULATIONS = (100, 1_000, 10_000, 100_000)
COHORT, ROUNDS = 50, 10


def main() -> None:
    """Measures and prints."""
    print(versions(), f"cohort {COHORT}, load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for population in POPULATIONS:
            summary, done = trellis(
                Path(folder),
                "task._target_=jobs.RandomImages",
                "task.examples=200000",
                "task.shape=[1,8,8]",
                "task.partition=iid",
                "task.test_fraction=0",
                "model=mlp",
                f"num_clients={population}",
                f"sampler.fraction={COHORT / population}",
                "client.local_epochs=1",
                "client.lr=0.01",
                f"rounds={ROUNDS}",
                "evaluate.every=0",
                "runtime.workers=1",
            )
            seconds = [row["seconds"] for row in summary["history"]]
            examples = 200_000 // population
            print(
                f"{population:>7,} clients of {examples:>5,} examples: start-up "
                f"{done.seconds - sum(seconds):4.1f} s, median round {1e3 * median(seconds[1:]):7.1f} ms, "
                f"{done.peak_bytes / 1e6:4.0f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
