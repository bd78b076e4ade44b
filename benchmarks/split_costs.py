"""What split training costs a client, by cut: memory, compute and bytes.

    make models
    python benchmarks/split_costs.py

MiniLM (classes) and a GPT-2 of the published small size with random weights (tokens: memory and time do not depend on
what the weights are), batches of 8 x 128 tokens, rank 8, AdamW; each cell is a process of its own, one thread, the
median of three. Memory is what the process held at most over what it held when all libraries were imported; a client
computes its forward pass twice, since it keeps nothing while it waits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from common import versions

MB = 2**20
REPEATS = 3
CUTS = {
    "MiniLM": [(at, "float32") for at in range(6)] + [(3, "bfloat16")],
    "GPT-2": [(at, "float32") for at in (0, 3, 6, 9)] + [(6, "bfloat16")],
}


def cell(**settings: Any) -> dict[str, float]:
    """The median of a cell's runs."""
    script = str(Path(__file__).with_name("split_cell.py"))
    runs = []
    for _ in range(REPEATS):
        done = subprocess.run(
            [sys.executable, script, json.dumps(settings)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{settings}: {done.stderr[-2_000:]}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {key: median(run[key] for run in runs) for key in runs[0]}


def main() -> None:
    """Prints a table for each model."""
    print(versions(), f"transformers {version('transformers')}, peft {version('peft')}")
    with tempfile.TemporaryDirectory() as scratch:
        import transformers

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(scratch)
        folders = {"MiniLM": "models/minilm", "GPT-2": scratch}
        for name, cuts in CUTS.items():
            print(f"\n{name}: batches of 8 x 128 tokens\n")
            print("| client holds | frozen MiB | trained KiB | memory MiB | of the whole ", end="")
            print("| CPU s a step | wire MiB a step |\n|---|---|---|---|---|---|---|")
            whole = 0.0
            for at, dtype in cuts:
                found = cell(folder=folders[name], at=at, dtype=dtype)
                whole = whole or found["memory"]
                held = f"{at} blocks" if at else "the whole model"
                held += ", bf16 base" if dtype == "bfloat16" else ""
                print(
                    f"| {held} | {found['frozen'] / MB:.1f} | {found['trained'] / 1024:.0f} |"
                    f" {found['memory'] / MB:.0f} | {found['memory'] / whole:.0%} |"
                    f" {found['seconds']:.2f} | {found['wire'] / MB:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
