"""What split training reaches, and what crosses the wire for it, beside LoRA without a cut.

    make models
    python benchmarks/split_accuracy.py

MiniLM with adapters of rank 8 on docstrings of six packages (80 of each, 32 tokens), 3 clients, Dirichlet(0.5), 5
rounds of one epoch in batches of 16, AdamW; the engine. Each row on the same seeds; accuracy on modules that nobody
trained on, and bytes of all clients in a round.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from importlib.metadata import version
from statistics import mean, median
from typing import Any

from common import versions

from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.run import run_engine

SEEDS = (0, 1, 2)
SETTINGS = [
    "task=docstrings",
    "task.max_per_package=80",
    "task.max_length=32",
    "num_clients=3",
    "rounds=5",
    "evaluate.every=5",
    "client.lr=2e-3",
    "client.batch_size=16",
    "client.local_epochs=1",
]
WHOLE = ["model=lora", "client=adamw", "combiner=lora_mean"]
SPLIT = ["strategy=split_lora"]
ROWS = {
    "whole model, LoRA FedAvg": WHOLE,
    "cut at 1/4 (2 of 6)": [*SPLIT, "model.split_point=2"],
    "cut at 1/2": SPLIT,
    "cut at 3/4 (4 of 6)": [*SPLIT, "model.split_point=4"],
    "SplitFed v2": [*SPLIT, "collector.variant=v2"],
    "U-shaped": [*SPLIT, "model.u_shaped=true"],
    "bf16 base": [*SPLIT, "model.base_dtype=bfloat16"],
    "fp16 wire": [*SPLIT, "collector.precision=fp16"],
    "bf16 wire": [*SPLIT, "collector.precision=bf16"],
    "int8 wire": [*SPLIT, "collector.precision=int8"],
    "8 batches an exchange": [*SPLIT, "collector.batches_per_exchange=8"],
    "32 batches an exchange": [*SPLIT, "collector.batches_per_exchange=32"],
    "auxiliary head, 3 of 4 batches alone": [*SPLIT, "client.auxiliary_steps=3"],
    "noise 0.5": [*SPLIT, "client.noise=0.5"],
    "NoPeek 0.5": [*SPLIT, "client.nopeek=0.5"],
}


def run(seed: int, overrides: list[str]) -> dict[str, Any]:
    """A run's summary."""
    with tempfile.TemporaryDirectory() as folder:
        where = [f"output_dir={folder}", f"seed={seed}", "runtime.workers=1"]
        result = run_engine(compose([*SETTINGS, *where, *overrides]), PlainConsole(io.StringIO()))
        found: dict[str, Any] = json.loads(result.summary_path.read_text())
        return found


def main() -> None:
    """All rows, or those whose names begin with an argument."""
    print(
        versions(), f"transformers {version('transformers')}, peft {version('peft')}; seeds {SEEDS}"
    )
    print(
        "\n| | accuracy | by seed | up MB a round | down MB a round | rounding up, down | seconds a round |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, overrides in ROWS.items():
        if sys.argv[1:] and not any(name.startswith(wanted) for wanted in sys.argv[1:]):
            continue
        found = [run(seed, overrides) for seed in SEEDS]
        accuracies = [summary["final"]["accuracy"] for summary in found]
        rows = [row for summary in found for row in summary["history"]]
        up, down = (mean(row[f"{way}load_bytes"] for row in rows) / 1e6 for way in ("up", "down"))
        train = [row.get("train", {}) for row in rows]
        errors = [
            f"{mean(t.get(key, 0.0) for t in train):.1e}"
            for key in ("activation_error", "gradient_error")
        ]
        each = " ".join(f"{accuracy:.1%}" for accuracy in accuracies)
        print(
            f"| {name} | {median(accuracies):.1%} | {each} | {up:.2f} | {down:.2f} |"
            f" {', '.join(errors)} | {median(row['seconds'] for row in rows):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
