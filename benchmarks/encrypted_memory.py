"""What encrypted training takes in memory, and that it stays below a limit: real steps, measured and as planned.

    python benchmarks/encrypted_memory.py                      # 64-32-10 and 784-32-10, four limits each
    python benchmarks/encrypted_memory.py --sizes 64 --limits 400

Each row is a process of its own with nothing but the compute party in it, and its workers; the owner is another
process, whose memory does not count. The gradients of each step are held against those without any limit. The last
limit of each size can't be met: it is refused before any work.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.support.limited import Record, difference, trained

LIMITS = (4000.0, 1000.0, 400.0, 150.0)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 784], help="features")
    parser.add_argument("--limits", type=float, nargs="+", default=LIMITS, help="MB")
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f} at the start\n")
    print(
        "| features | limit, MB | peak, MB | planned | s a step | planned | shed | gradients differ by |"
    )
    print("|--:|--:|--:|--:|--:|--:|---|--:|")
    for features in given.sizes:
        record = Record()
        free = trained(features, None, given.steps, record)
        for limit in (None, *given.limits):
            found = free if limit is None else trained(features, limit, given.steps, record)
            _row(features, limit, found, free)


def _row(features: int, limit: float | None, found: dict[str, Any], free: dict[str, Any]) -> None:
    told = "none" if limit is None else f"{limit:.0f}"
    if "refused" in found:
        print(f"| {features} | {told} | refused: {found['refused']} | | | | | |", flush=True)
        return
    shed = ", ".join(f"{name} x{number}" for name, number in found["shed"].items()) or "nothing"
    print(
        f"| {features} | {told} | {found['peak_mb']:.0f} | {found['planned_mb']} | {np.median(found['seconds']):.2f}"
        f" | {found['planned_s']:.2f} | {shed} | {difference(found['gradients'], free['gradients']):.1e} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
