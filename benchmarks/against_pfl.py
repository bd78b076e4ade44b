"""Rounds on our engine and on Apple's pfl, side by side: clients a second and memory.

    python benchmarks/against_pfl.py --pfl build/pfl    # the folder of pfl's environment, made where it is missing

Two jobs, each in one process and in two, the sides by turns, medians of three runs. `mlp`: 50 clients of 36 images of
8 × 8, a perceptron of 4,810 parameters; `cnn`: 1,000 users of 50 images of 3 × 32 × 32, a cohort of 50, the two-layer
CNN of pfl's CIFAR-10 benchmark. One local epoch in batches of 10, SGD, no evaluation, random data. pfl's two processes
are torchrun's.
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
from typing import Any

from common import Measured, measured, trellis, versions

JOBS: dict[str, dict[str, Any]] = {
    "mlp": {
        "clients": 50, "cohort": 50, "examples": 36, "shape": [1, 8, 8], "batch_size": 10, "rounds": 60,
        "model": ["model=mlp"],
    },
    "cnn": {
        "clients": 1_000, "cohort": 50, "examples": 50, "shape": [3, 32, 32], "batch_size": 10, "rounds": 5,
        "model": ["model._target_=jobs.CifarCnn"],
    },
}  # fmt: skip
WARM_UP = 1
"""Rounds that don't count: imports and first allocations."""

Figures = tuple[float, float, float]
"""Clients a second in the median round, seconds of the command, peak bytes."""


def overrides_of(job: str) -> list[str]:
    """The job as a configuration of ours."""
    spec = JOBS[job]
    return [
        "task._target_=jobs.RandomImages",
        f"task.examples={spec['clients'] * spec['examples']}",
        f"task.shape={spec['shape']}",
        "task.partition=iid",
        "task.test_fraction=0",
        *spec["model"],
        f"num_clients={spec['clients']}",
        f"sampler.fraction={spec['cohort'] / spec['clients']}",
        "client.local_epochs=1",
        f"client.batch_size={spec['batch_size']}",
        "client.lr=0.01",
        "evaluate.every=0",
        f"rounds={spec['rounds']}",
    ]


def ours(job: str, processes: int, folder: Path) -> Figures:
    """A run on the engine."""
    summary, done = trellis(
        folder, *overrides_of(job), f"runtime.workers={processes}", "resume=never"
    )
    seconds = median(row["seconds"] for row in summary["history"][WARM_UP:])
    return JOBS[job]["cohort"] / seconds, done.seconds, done.peak_bytes


def theirs(job: str, processes: int, environment: Path) -> Figures:
    """A run on pfl."""
    python = environment / "bin" / "python"
    side = Path(__file__).with_name("pfl_side.py")
    spec = {name: {k: v for k, v in each.items() if k != "model"} for name, each in JOBS.items()}
    arguments = [str(side), job, str(JOBS[job]["rounds"]), json.dumps(spec)]
    launcher = [str(python)]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    done = _patiently([*launcher, *arguments])
    rounds = json.loads(next(line for line in reversed(done.output) if line.startswith("[")))
    return JOBS[job]["cohort"] / median(rounds[WARM_UP:]), done.seconds, done.peak_bytes


def _patiently(command: list[str]) -> Measured:
    """Runs pfl's side; its processes abort now and then as they end, and are run again."""
    for _ in range(3):
        try:
            return measured(command, {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""})
        except RuntimeError as error:
            failed = error
    raise failed


def prepare(environment: Path) -> str:
    """Makes pfl's environment where it is missing; its version."""
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        install = ["-m", "pip", "install", "--quiet", "pfl==0.6.0", "torch==2.13.0"]
        subprocess.run([python, *install], check=True)
    code = "import pfl, torch; print('pfl', pfl.__version__, 'with torch', torch.__version__)"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pfl", type=Path, default=Path("build/pfl"), metavar="DIR")
    parser.add_argument("--job", choices=list(JOBS), action="append")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(versions(), prepare(options.pfl.resolve()), f"load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        for job in options.job or JOBS:
            compare(job, options.repeats, options.pfl.resolve(), Path(folder))


def compare(job: str, repeats: int, environment: Path, folder: Path) -> None:
    """One job on both sides, in one and two processes."""
    best: dict[str, float] = {}
    for processes in (1, 2):
        runs: dict[str, list[Figures]] = {"trellis": [], "pfl": []}
        for _ in range(repeats):
            runs["trellis"].append(ours(job, processes, folder))
            runs["pfl"].append(theirs(job, processes, environment))
        figures = {
            side: [median(row) for row in zip(*rows, strict=True)] for side, rows in runs.items()
        }
        for side, (rate, seconds, peak) in figures.items():
            best[side] = max(best.get(side, 0.0), rate)
            print(
                f"{job} {processes} process(es) {side:<8} {rate:8.1f} clients/s  {seconds:6.1f} s in all  "
                f"{peak / 1e6:6.0f} MB",
                flush=True,
            )
        (rate, _, held), (rival, _, most) = figures["trellis"], figures["pfl"]
        print(
            f"{job} {processes} process(es): {rate / rival:.2f} × pfl, {held / most:.0%} of its memory"
        )
    print(f"{job}, best of either: {best['trellis'] / best['pfl']:.2f} × pfl", flush=True)


if __name__ == "__main__":
    main()
