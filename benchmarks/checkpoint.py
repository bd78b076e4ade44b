"""What a checkpoint costs: seconds and bytes at 100 thousand, 1 million and 10 million parameters, under FedAdam.

    python benchmarks/checkpoint.py                   # in the present folder's file system; under a minute
    python benchmarks/checkpoint.py --folder /data

Interleaved, the median of five of each: a checkpoint (`fl_app.services.checkpoint`: arrays and JSON with a SHA-256,
synced, renamed, the folder synced, older ones pruned), a bare write and sync of as many bytes, the copy that is held in
memory where a round is not saved, and reading one back with its checksum.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import versions

from fl_app.services.checkpoint import Checkpoints, read
from strategies.hooks import RoundView
from strategies.server_models import Adam, ServerModel
from strategies.state import State
from strategies.update import DELTA, Section, Update

SIZES = (100_000, 1_000_000, 10_000_000)
REPEATS = 5


def trained(size: int) -> ServerModel:
    """A model of so many parameters after one step, so that the optimiser's moments are numbers like any others."""
    rng = np.random.default_rng(0)
    model = ServerModel({"weight": rng.normal(size=size).astype(np.float32)}, Adam())
    layout = model.layouts[DELTA]
    model.apply(
        Update({DELTA: Section(rng.normal(size=size).astype(np.float32), layout)}, 1.0, (0,), 0)
    )
    return model


def bare(path: Path, data: bytes) -> None:
    """Writes and syncs bytes, and nothing else."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def seconds(work: Callable[[], object]) -> float:
    """What one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measured(size: int, folder: Path) -> dict[str, float]:
    """Medians of all that is measured, and the file's bytes."""
    model = trained(size)

    def state() -> State:
        return {"strategy": {"model": model.state_dict()}}

    checkpoints = Checkpoints(folder / str(size), state=state)
    taken: dict[str, list[float]] = {"checkpoint": [], "bare": [], "held": [], "read": []}
    for number in range(1, REPEATS + 1):
        view = RoundView(number, model, 0.0, 0.0, 0, 0, 0, 0, 0, False)
        taken["checkpoint"].append(seconds(lambda view=view: checkpoints(view)))
        path = checkpoints.folder / checkpoints.names[0]
        data = path.read_bytes()
        taken["bare"].append(seconds(lambda data=data: bare(folder / "bare", data)))
        taken["held"].append(seconds(lambda: copy.deepcopy(state())))
        taken["read"].append(seconds(lambda path=path: read(path)))
    return {"bytes": len(data), **{name: statistics.median(times) for name, times in taken.items()}}


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="on the disk that is to be measured"
    )
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=parser.parse_args().folder))
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"{versions()} load {load} (an idle machine has less than 0.5)")
    print("| parameters | MB | checkpoint, s | bare write, s | held in memory, s | read back, s |")
    print("|---|---|---|---|---|---|")
    try:
        for size in SIZES:
            row = measured(size, folder)
            told = " | ".join(f"{row[name]:.4f}" for name in ("checkpoint", "bare", "held", "read"))
            print(f"| {size:,} | {row['bytes'] / 1e6:.2f} | {told} |", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
