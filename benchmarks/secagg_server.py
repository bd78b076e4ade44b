"""The server's work in a masked round, up to 5,000 clients: survivors · d + dropped · k · d, fitted and held against.

    python benchmarks/secagg_server.py            # seven minutes, in memory
    python benchmarks/secagg_server.py --quick    # up to 500 clients, two minutes

Real rounds of `rounds.py` with real clients, whose files lie in memory (--folder). Four costs make the model: an
element that is added or stretched to a mask, n_s · d for the uploads and one mask each for the survivors and the pairs
of a drop-out and a survivor; a pair's key agreement; a share, n · (k + 1); and a client. They are fitted to the rounds
with fewer clients (least relative squares, none below zero), and predict those with the most.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from common import versions
from numpy.typing import NDArray
from rounds import LARGEST_WEIGHT, SEED, Cohort, play
from scipy.optimize import nnls

from strategies.collectors import Masked
from strategies.protocols import ClientOwn

CLIENTS, QUICK = (100, 200, 500, 1_000, 5_000), (100, 200, 500)
SIZES, PARTS = (1_000, 10_000, 50_000), (0.0, 0.05, 0.3)
FEW, SIZE, MANY = 200, 10_000, 1_000
"""Beyond FEW clients one d is measured, and 30% drop-outs up to MANY."""


@dataclass(frozen=True)
class Point:
    """One round.

    Attributes:
        members: clients.
        size: d.
        gone: drop-outs.
        degree: neighbours k.
        seconds: the server's processor seconds.
    """

    members: int
    size: int
    gone: int
    degree: int
    seconds: float

    @property
    def pairs(self) -> float:
        """A drop-out and a survivor that are neighbours, as expected."""
        return self.gone * self.degree * (self.members - self.gone) / (self.members - 1)

    @property
    def work(self) -> NDArray[np.float64]:
        """Elements, agreements, shares and clients."""
        masks = self.members - self.gone + self.pairs
        return np.array(
            [masks * self.size, self.pairs, self.members * (self.degree + 1), self.members]
        )


def measure(members: int, size: int, part: float, folder: str) -> Point:
    """One round; small ones three times, the median."""
    cohort = Cohort(members, size)
    gone = cohort.gone(part)
    tolerated = max(0.05, part)
    seconds = []
    for _ in range(3 if members <= FEW else 1):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            collector = Masked(dropouts=tolerated, limit=1.0, max_weight=LARGEST_WEIGHT)
            half = collector.client_half(ClientOwn(Path(name), {}, simulated=True))
            seconds.append(play(cohort, collector, half, gone).server.cpu)
    degree = collector.plan(members)[0].degree
    return Point(members, size, len(gone), degree, float(np.median(seconds)))


def fit(points: list[Point]) -> NDArray[np.float64]:
    """Seconds for each kind of work: least relative squares."""
    rows = np.array([point.work / point.seconds for point in points])
    scale = rows.max(axis=0)
    found: NDArray[np.float64] = nnls(rows / scale, np.ones(len(points)))[0] / scale
    return found


def main() -> None:
    """Measures, fits and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/secagg_server.py --quick --folder /tmp",
    )
    parser.add_argument("--quick", action="store_true", help="up to 500 clients only")
    memory = Path("/dev/shm")
    parser.add_argument("--folder", default=str(memory) if memory.is_dir() else None)
    options = parser.parse_args()
    print(
        versions(),
        f"vectors seeded with {SEED}, keys the system's; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    clients = QUICK if options.quick else CLIENTS
    began, points = time.monotonic(), list[Point]()
    for members, size, part in product(clients, SIZES, PARTS):
        if members <= FEW or (size == SIZE and (part < 0.3 or members <= MANY)):
            points.append(measure(members, size, part, options.folder))
            print(points[-1], flush=True)
    print()
    fitted = [point for point in points if point.members < clients[-1]]
    costs = fit(fitted)
    print(
        f"fitted to {len(fitted)} rounds: {1e9 * costs[0]:.2f} ns an element, {1e6 * costs[1]:.0f} µs an agreement,"
        f" {1e6 * costs[2]:.2f} µs a share, {1e6 * costs[3]:.0f} µs a client; {time.monotonic() - began:.0f} s\n"
    )
    print("| clients | d | drop out | neighbours | measured, s | model, s | |\n|" + " --: |" * 7)
    for point in points:
        model = float(point.work @ costs)
        print(
            f"| {point.members:,} | {point.size:,} | {point.gone:,} | {point.degree} | {point.seconds:.3f} |"
            f" {model:.3f} | {100 * (model / point.seconds - 1):+.0f}%{'' if point in fitted else ', predicted'} |"
        )


if __name__ == "__main__":
    main()
