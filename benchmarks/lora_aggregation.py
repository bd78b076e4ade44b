"""Aggregation of adapters of unequal ranks: seconds, memory, and how far each rule is from the mean of the products.

    python benchmarks/lora_aggregation.py              # all, about five minutes
    python benchmarks/lora_aggregation.py --only error # or speed

One layer of m x m, clients of ranks 4, 8, 16 and 64 by turns, who share a signal of rank 12 that decays from 1 to 0.1,
each with noise of its own. Speed: the best 64 ranks of the mean product from stacked factors, exactly (QR of both
sides, then the small core) and at random, beside the dense matrix and its decomposition; every cell in a process of its
own with one thread, the median of 5 runs at 768 and of 3 at 4096 (the dense one there: 1), one side after the other;
memory is what the process takes at most beyond its input.
Error: ‖·‖_F of what a rule gives less the exact mean product, relative to that, with the clients' bases aligned (as
after one round from a common start) and with each turned by a rotation of its own, which leaves every product as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median

import numpy as np
from common import versions

from strategies.combiners import (
    LoraFedEx,
    LoraMean,
    LoraPartitioned,
    LoraStack,
    LoraSvd,
    LoraZeroPad,
)
from strategies.lora import Factors, decomposed, distance, frobenius, stacked
from strategies.parts import widened
from strategies.protocols import Combiner, Plan
from strategies.update import DELTA, Layout, Update

RANKS = (4, 8, 16, 64)
RANK = max(RANKS)
SIGNAL, NOISE = 12, 0.1
CELLS = [(768, 10), (768, 50), (4096, 10), (4096, 50)]
SIDES = ("exact", "randomized", "dense")
DENSE = {(768, 10), (768, 50), (4096, 10)}
"""Cells in which the dense matrix is decomposed, too: of 4096 x 4096 it takes minutes."""
RULES: dict[str, Combiner] = {
    "lora_mean": LoraMean(weighting="uniform", report=False),
    "lora_zero_pad": LoraZeroPad(weighting="uniform"),
    "lora_zero_pad, sparsity": LoraZeroPad(weighting="uniform", sparsity=True),
    "lora_svd": LoraSvd(weighting="uniform"),
    "lora_partitioned": LoraPartitioned(weighting="uniform"),
    "lora_stack, q = 64": LoraStack(weighting="uniform", alpha=RANK, rank=RANK),
    "lora_fedex, q = 64": LoraFedEx(weighting="uniform", alpha=RANK, rank=RANK),
}


def clients(m: int, count: int, *, turned: bool = False) -> list[Factors]:
    """Each client's B and A; `turned` gives each a basis of its own."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((m, SIGNAL)))[0] for _ in range(2))
    roots = np.sqrt(np.logspace(0, -1, SIGNAL))
    made = []
    for index in range(count):
        rank = RANKS[index % len(RANKS)]
        kept = min(rank, SIGNAL)
        left = NOISE / np.sqrt(m) * rng.standard_normal((m, rank))
        right = NOISE / np.sqrt(m) * rng.standard_normal((rank, m))
        left[:, :kept] += u[:, :kept] * roots[:kept]
        right[:kept] += (v[:, :kept] * roots[:kept]).T
        turn = np.linalg.qr(rng.standard_normal((rank, rank)))[0]
        made.append(Factors(left @ turn, turn.T @ right) if turned else Factors(left, right))
    return made


def run_cell(side: str, m: int, count: int) -> dict[str, float]:
    """One side's median seconds, its memory in MiB beyond the input, and the error of what it keeps."""
    products = clients(m, count)
    weights = [1 / count] * count
    repeats = 1 if side == "dense" and m > 1000 else 5 if m < 1000 else 3
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, error = [], 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        if side == "dense":
            matrix = np.zeros((m, m))
            for one, weight in zip(products, weights, strict=True):
                matrix += weight * (one.left @ one.right)
            s = np.linalg.svd(matrix, full_matrices=False)[1]
            error = float(np.linalg.norm(s[RANK:]) / np.linalg.norm(s))
        else:
            whole = stacked(products, weights)
            found = decomposed(whole, RANK, method="exact" if side == "exact" else "randomized")
            error = found.error / found.norm
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": median(seconds), "memory": (peak - before) / 1024, "error": error}


def cell(side: str, m: int, count: int) -> dict[str, float]:
    """Likewise, in a process of its own."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    done = subprocess.run(
        [sys.executable, __file__, "--cell", side, str(m), str(count)],
        env={**os.environ, **dict.fromkeys(names, "1")},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{side} {m} {count}: {done.stderr[-2_000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def speed() -> None:
    """The table of seconds and memory."""
    print("| m | clients | ranks in all | side | seconds | MiB | error of 64 ranks |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for m, count in CELLS:
        total = sum(RANKS[index % len(RANKS)] for index in range(count))
        for side in SIDES:
            if side == "dense" and (m, count) not in DENSE:
                continue
            found = cell(side, m, count)
            print(
                f"| {m} | {count} | {total} | {side} | {found['seconds']:.3g} | {found['memory']:.0f} "
                f"| {found['error']:.5f} |",
                flush=True,
            )


def combined(rule: Combiner, products: Sequence[Factors], m: int) -> Factors:
    """What a rule makes of a round of clients, residual and all, as one product."""
    shapes = {
        "adapters.q.A.weight": (RANK, m),
        "adapters.q.B.weight": (m, RANK),
        "residual.q.left": (m, RANK),
        "residual.q.right": (RANK, m),
    }
    layout = Layout(tuple(shapes), tuple(shapes.values()))
    held = rule.begin(
        Plan({DELTA: layout}, len(products), len(products), sent=np.zeros(layout.size, np.float32))
    )
    for index, one in enumerate(products):
        part = Layout(layout.names[:2], ((one.rank, m), (m, one.rank)))
        arrays = {layout.names[0]: one.right, layout.names[1]: one.left}
        section = widened(part.flatten(arrays), part, layout)
        held.add(Update({DELTA: section}, 1.0, (index,), 0))
    result = held.result()
    if result is None:
        raise RuntimeError("nothing was combined")
    a, b, left, right = layout.views(result.delta.vector.astype(np.float64)).values()
    return stacked([Factors(b, a), Factors(left, right)])


def errors() -> None:
    """The table of distances to the exact mean product."""
    print("| `combiner=` | " + " | ".join(f"{m}, {n}: aligned | turned" for m, n in CELLS) + " |")
    print("| --- |" + " --- |" * 2 * len(CELLS))
    cases = [(clients(m, n, turned=turned), m) for m, n in CELLS for turned in (False, True)]
    for name, rule in RULES.items():
        row = []
        for products, m in cases:
            exact = stacked(products, [1 / len(products)] * len(products))
            row.append(distance(exact, combined(rule, products, m)) / frobenius(exact))
        print(f"| {name} | " + " | ".join(f"{error:.4f}" for error in row) + " |", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["speed", "error"])
    parser.add_argument("--cell", nargs=3, metavar=("SIDE", "M", "CLIENTS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.cell:
        side, m, count = options.cell
        print(json.dumps(run_cell(side, int(m), int(count))))
        return 0
    print(versions(), "one thread a cell")
    for name, table in (("speed", speed), ("error", errors)):
        if options.only in (None, name):
            print()
            table()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
