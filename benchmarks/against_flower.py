"""The same rounds on our engine and in Flower's simulation, side by side: the median round, and from start to finish.

    python benchmarks/against_flower.py

50 clients on the digits (8 × 8, IID), a perceptron of 4,810 parameters, one local epoch in batches of 10, 20 rounds;
the engine as it is by default (clients trained at once, so in one process), and with clients one by one (two workers).
Each command's seconds count from its start to its end; the median round leaves out the first two, in which Flower's
actors start. Three runs of each, by turns, medians.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from statistics import median

from common import trellis, versions

JOB = (
    "task=digits",
    "task.partition=iid",
    "task.test_fraction=0",
    "model=mlp",
    "num_clients=50",
    "rounds=20",
    "client.local_epochs=1",
    "client.batch_size=10",
    "resume=never",
)
SIDES = {
    "engine": (),
    "engine, one by one": ("runtime.batch_clients=off",),
    "Flower's simulation": ("backend=flower",),
}
REPEATS, START_UP = 3, 2


def main() -> None:
    """Measures and prints."""
    print(versions(), f"load {os.getloadavg()[0]:.1f}", flush=True)
    rounds: dict[str, list[float]] = {side: [] for side in SIDES}
    totals: dict[str, list[float]] = {side: [] for side in SIDES}
    held: dict[str, list[int]] = {side: [] for side in SIDES}
    accuracy: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(REPEATS):
            for side, overrides in SIDES.items():
                summary, done = trellis(Path(folder) / str(repeat), *JOB, *overrides)
                rounds[side].append(median(row["seconds"] for row in summary["history"][START_UP:]))
                totals[side].append(done.seconds)
                held[side].append(done.peak_bytes)
                accuracy[side] = summary["final"]["accuracy"]
    slow = "Flower's simulation"
    for side in SIDES:
        seconds, total = median(rounds[side]), median(totals[side])
        print(
            f"{side:<20} median round {1e3 * seconds:7.1f} ms ({median(rounds[slow]) / seconds:5.1f} ×)   "
            f"start to finish {total:5.1f} s ({median(totals[slow]) / total:4.1f} ×)   "
            f"{median(held[side]) / 1e6:5.0f} MB   accuracy {accuracy[side]:.3f}"
        )


if __name__ == "__main__":
    main()
