"""Robust rules beside flwr's own strategies and beside ByzFL: seconds, memory, and the time to read the updates once.

    python benchmarks/robust_speed.py --byzfl build/byzfl    # the folder of its environment, made where it is missing
    python benchmarks/robust_speed.py --only flwr            # one of the comparisons

Every cell is a process of its own with one thread, sides by turns, the median of 3 to 9 runs in it. Against flwr both
sides start from the bytes of Flower messages and end with the aggregate (ours checks every reply on the way); against
ByzFL both start from an (n, d) matrix. f is 20% of n, for Bulyan (n − 3) / 4. A side that would need more memory than
--limit is left out. Then ours alone, with one thread and with two, and whole rounds of a run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from common import trellis, versions

SHAPES = [(n, d) for d in (100_000, 1_000_000) for n in (10, 50, 200)] + [(10, 10_000_000)]
FROM_BYTES = ("median", "trimmed_mean", "multi_krum", "bulyan", "krum", "mean")
FROM_MATRIX = ("multi_krum", "geometric_median", "nnm", "nnm_trimmed_mean")
OURS_ALONE = ("median", "trimmed_mean", "bulyan", "centered_clipping", "norm_bounding", "fltrust")
STRATEGIES = ("fedavg", "robust", "multi_krum")
THREADED = ("median", "trimmed_mean", "bulyan", "nnm_trimmed_mean")
CELL = Path(__file__).with_name("robust_cell.py")

Cell = dict[str, float]


def cell(
    side: str, rule: str, n: int, d: int, *, python: str = sys.executable, threads: int = 1
) -> Cell:
    """One cell, in a process of its own."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    done = subprocess.run(
        [python, str(CELL), side, rule, str(n), str(d), str(threads)],
        env={**os.environ, **dict.fromkeys(names, str(threads))},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{side} {rule} {n} x {d}: {done.stderr[-2_000:]}")
    found: Cell = json.loads(done.stdout.splitlines()[-1])
    return found


def gibibytes(side: str, rule: str, n: int, d: int) -> float:
    """About what a side needs: its input, and what its code is known to copy."""
    copies = {"byzfl": 2.0, "flwr": 3.0, "array": 1.0, "trellis": 1.0}[side]
    if side == "byzfl" and rule.startswith("nnm"):
        copies += n - n // 5  # vectors[indices] of every row's neighbours at once
    if side == "flwr" and rule == "bulyan":
        copies += 2
    return copies * n * d * 4 / 2**30


def compare(
    title: str, sides: tuple[str, str], rules: tuple[str, ...], python: str, limit: float
) -> None:
    """One table: ours, theirs, and how many times as long theirs took."""
    ours, theirs = sides
    print(f"\n### {title}\n")
    print(f"| rule | n | d | {ours}, ms | extra MiB | {theirs}, ms | extra MiB | speed |")
    print("| --- | --: | --: | --: | --: | --: | --: | --: |")
    for rule in rules:
        for n, d in SHAPES:
            if rule == "bulyan" and n < 7:
                continue
            mine = cell(ours, rule, n, d)
            line = f"| {rule} | {n} | {d:,} | {_ms(mine)} | {mine['extra_mib']:.0f} |"
            need = gibibytes(theirs, rule, n, d)
            if need > limit:
                print(f"{line} would need {need:.0f} GiB | | |", flush=True)
                continue
            other = cell(theirs, rule, n, d, python=python)
            times = other["seconds"] / mine["seconds"]
            print(f"{line} {_ms(other)} | {other['extra_mib']:.0f} | {times:.1f}× |", flush=True)


def against_the_limit() -> None:
    """Ours alone: each rule's time over that of reading every update once, and what a second thread gains."""
    print("\n### Over the time to read the updates once\n")
    print("| rule | n | d | ms | over one reading | with two threads | extra MiB |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for rule in ("mean", *FROM_MATRIX, *OURS_ALONE):
        for n, d in ((10, 1_000_000), (200, 1_000_000)):
            one = cell("array", rule, n, d)
            two = cell("array", rule, n, d, threads=2) if rule in THREADED else None
            gain = "" if two is None else f"{one['seconds'] / two['seconds']:.2f}×"
            print(
                f"| {rule} | {n} | {d:,} | {_ms(one)} | {one['seconds'] / one['read']:.1f} | {gain} "
                f"| {one['extra_mib']:.0f} |",
                flush=True,
            )


def rounds() -> None:
    """Whole rounds of the main job with 20 clients: what a rule adds to them, runs by turns, medians over two."""
    print("\n### Rounds of the main job (CNN of 25,706 parameters), 20 clients, 8 rounds, IID\n")
    print("| strategy | median round, s | over FedAvg |")
    print("| --- | --: | --: |")
    seconds: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    for seed in (1, 2):
        for name in STRATEGIES:
            with tempfile.TemporaryDirectory() as folder:
                summary, _ = trellis(
                    Path(folder), f"strategy={name}", "num_clients=20", "rounds=8", f"seed={seed}",
                    "task.partition=iid", "evaluate.every=0",
                )  # fmt: skip
            seconds[name] += [row["seconds"] for row in summary["history"][1:]]
    plain = median(seconds["fedavg"])
    for name, found in seconds.items():
        print(f"| {name} | {median(found):.3f} | {100 * (median(found) / plain - 1):+.1f}% |")


def _ms(found: Cell) -> str:
    return f"{found['seconds'] * 1e3:,.1f}"


def environment(folder: Path) -> str:
    """The Python of an environment that has ByzFL."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "byzfl==0.0.11"], check=True)
    return str(python)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--byzfl", type=Path, metavar="DIR", help="ByzFL's environment")
    parser.add_argument(
        "--only", choices=("flwr", "byzfl", "limit", "rounds"), help="one table only"
    )
    parser.add_argument("--limit", type=float, default=10, metavar="GIB", help="memory of a cell")
    options = parser.parse_args()
    print(versions(), "updates standard normal, seeded by their number")
    if options.only in (None, "flwr"):
        title = "From the bytes of Flower messages, against flwr's strategies"
        compare(title, ("trellis", "flwr"), FROM_BYTES, sys.executable, options.limit)
    if options.only in (None, "byzfl") and options.byzfl:
        python = environment(options.byzfl)
        title = "From an array, against ByzFL 0.0.11"
        compare(title, ("array", "byzfl"), FROM_MATRIX, python, options.limit)
    if options.only in (None, "limit"):
        against_the_limit()
    if options.only in (None, "rounds"):
        rounds()


if __name__ == "__main__":
    main()
