"""Ranks that budgets of memory give MiniLM's layers, and what a process of its own really takes at these ranks.

    python benchmarks/lora_ranks.py [--budgets 150 200 260 340 420] [--batch 16] [--length 128]

Importance comes of real local training on docstrings at rank 8 (two rounds of four clients); each budget's ranks are
then trained for three steps of AdamW in a process of its own. Its peak is the resident set's, over what it was with all
libraries imported. Prints a table, and writes docs/figures/lora_ranks.json with --write.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import FIGURES, versions

MODEL = Path(__file__).resolve().parent.parent / "models" / "minilm"
RANK, CLASSES = 64, 5
CLIENTS, ROUNDS, EXAMPLES, IMPORTANCE_LENGTH = 4, 2, 64, 32
"""Of the training that tells importance."""
VOCABULARY, FIRST = 30522, 1000
"""Of MiniLM's tokenizer; ids from `FIRST` are words."""


def cell(batch: int, length: int, ranks: Mapping[str, int], *, returns: bool) -> dict[str, Any]:
    """Peak bytes of this process over its imports while it trains at these ranks, and the estimate.

    Args:
        batch: examples a step.
        length: tokens of each.
        ranks: by layer.
        returns: whether memory that is freed goes back to the system.
    """
    import peft  # noqa: F401 - part of the baseline, as are transformers' own modules
    import torch
    from transformers import AutoTokenizer, BertModel  # noqa: F401

    from clients.lora.profile import measure, memory_of, return_freed_memory
    from clients.resident import ResidentModel, arrays_of
    from clients.tasks import Examples
    from clients.trainers import FitJob
    from clients.trainers.adamw import AdamW

    torch.set_num_threads(1)
    if returns:
        return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    baseline = _resident("VmRSS")
    model = _model(length, ranks=ranks)
    arrays = arrays_of(model)
    inputs = torch.randint(FIRST, VOCABULARY, (3 * batch, length))
    examples = Examples(inputs, torch.zeros(3 * batch, dtype=torch.long))
    job = FitJob(0, arrays, {}, examples, 1, {}, {})
    resident = ResidentModel(model, arrays)
    began = time.monotonic()
    AdamW(batch_size=batch).fit_one(job, resident, _Task())  # type: ignore[arg-type]
    seconds = time.monotonic() - began
    peak = _resident("VmHWM") - baseline
    predicted = memory_of(measure(_model(length), inputs[:batch]), ranks)
    return {"peak_bytes": peak, "predicted_bytes": predicted, "seconds": seconds}


class _Task:
    def loss(self, output: Any, targets: Any) -> Any:
        import torch.nn.functional as F

        return F.cross_entropy(output, targets)


def _model(length: int, **settings: Any) -> Any:
    from clients.lora import LoraClassifier

    classes = settings.pop("classes", CLASSES)
    given = {"pretrained": str(MODEL), "rank": RANK, **settings}
    return LoraClassifier((length,), classes, VOCABULARY, **given)


def _resident(kind: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(kind))
    return int(line.split()[1]) * 1024


def own_process(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A cell in a process of its own."""
    command = [sys.executable, __file__, "--cell", json.dumps(asked)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def importance(length: int) -> tuple[dict[str, float], list[float]]:
    """What layers are worth after two rounds of four clients, and the mean loss of each round."""
    import numpy as np
    import torch

    from clients.lora.importance import Importance
    from clients.resident import ResidentModel, arrays_of
    from clients.tasks import Docstrings, FederatedData
    from clients.trainers import FitJob
    from clients.trainers.adamw import AdamW
    from strategies.update import DELTA, Section

    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = Docstrings(tokenizer=str(MODEL), max_length=length)
    data = FederatedData(task=task, num_clients=CLIENTS, seed=0)
    model = _model(length, rank=8, alpha=16.0, classes=task.num_classes)
    arrays = {name: array.astype(np.float32) for name, array in arrays_of(model).items()}
    resident, seen, losses = ResidentModel(model, arrays), Importance(), []
    trainer = AdamW(batch_size=16, lr=1e-3)
    for number in range(ROUNDS):
        jobs = [
            FitJob(client, arrays, {}, _some(data.train(client)), number, {}, {})
            for client in range(CLIENTS)
        ]
        fits = [trainer.fit_one(job, resident, task) for job in jobs]
        change = np.mean([fit.sections[DELTA].vector for fit in fits], axis=0)
        layout = fits[0].sections[DELTA].layout
        sent = layout.flatten(arrays)
        seen.observe_change(Section(change, layout), sent)
        arrays = {
            name: view.astype(np.float32) for name, view in layout.views(sent + change).items()
        }
        losses.append(float(np.mean([fit.metrics["train_loss"] for fit in fits])))
    return seen.means, losses


def _some(examples: Any) -> Any:
    from clients.tasks import Examples

    return Examples(examples.inputs[:EXAMPLES], examples.targets[:EXAMPLES])


def compare(budgets: list[float], batch: int, length: int) -> dict[str, Any]:
    """Each budget's ranks, with the estimate and the real peak."""
    import torch

    from clients.lora.allocation import BudgetError, allocate
    from clients.lora.profile import measure, memory_of

    worth, losses = importance(IMPORTANCE_LENGTH)
    inputs = torch.randint(FIRST, VOCABULARY, (batch, length))
    profile = measure(_model(length), inputs)
    rows = []
    for budget in budgets:
        try:
            ranks = allocate(worth, lambda given: memory_of(profile, given), int(budget * 1e6))
        except BudgetError as error:
            rows.append({"budget_mb": budget, "refused": str(error)})
            continue
        asked = {"batch": batch, "length": length, "ranks": ranks}
        row = {"budget_mb": budget, "ranks": ranks, **own_process({**asked, "returns": True})}
        kept = own_process({**asked, "returns": False})
        rows.append({**row, "kept_peak_bytes": kept["peak_bytes"], "kept_seconds": kept["seconds"]})
    return {
        "batch": batch,
        "length": length,
        "importance": worth,
        "losses": losses,
        "rows": rows,
        "versions": versions(),
    }


def printed(found: Mapping[str, Any]) -> str:
    """The table, in Markdown."""
    layers = list(found["importance"])
    worth = ", ".join(f"{found['importance'][name]:.2f}" for name in layers)
    lines = [
        f"{found['versions']} batches of {found['batch']} x {found['length']}; MB are 10^6 bytes.",
        f"Importance, from the lowest layer up (query, value of each block): {worth}.",
        "",
        "| budget | ranks from the lowest layer up | estimate | real peak | peak where glibc keeps what is freed |",
        "|---:|---|---:|---:|---:|",
    ]
    for row in found["rows"]:
        budget = f"{row['budget_mb']:g} MB"
        if "refused" in row:
            lines.append(f"| {budget} | refused: {row['refused']} | | | |")
            continue
        ranks = " ".join(str(row["ranks"][name]) for name in layers)
        sizes = (row["predicted_bytes"], row["peak_bytes"], row["kept_peak_bytes"])
        lines.append(
            f"| {budget} | {ranks} | " + " | ".join(f"{s / 1e6:.0f} MB" for s in sizes) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the table, or one cell's figures."""
    parser = argparse.ArgumentParser(description="Ranks by budgets of memory, and real peaks.")
    parser.add_argument("--budgets", type=float, nargs="+", default=[150, 200, 260, 340, 420])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cell is not None:
        print(json.dumps(cell(**{"returns": True, **given.cell})))
        return
    found = compare(given.budgets, given.batch, given.length)
    print(printed(found))
    if given.write:
        (FIGURES / "lora_ranks.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
