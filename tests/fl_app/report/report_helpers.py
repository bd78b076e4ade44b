"""Run folders as a run leaves them, without the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def write_run(
    folder: Path,
    accuracies: Sequence[float | None] = (0.5, 0.9),
    *,
    status: str = "completed",
    reason: str = "",
    strategy: str = "fedavg",
    seed: int = 0,
    **config: Any,
) -> Path:
    """A folder with summary.json and config.yaml; keywords are keys of the configuration, `__` for a dot."""
    folder.mkdir(parents=True)
    rows = [
        {
            "round": number, "loss": None if value is None else 1 - value, "accuracy": value,
            "seconds": 0.1, "upload_bytes": 1000, "download_bytes": 2000, "void": False,
        }
        for number, value in enumerate(accuracies, 1)
    ]  # fmt: skip
    measured = [row for row in rows if row["loss"] is not None]
    final = {"loss": measured[-1]["loss"], "accuracy": measured[-1]["accuracy"]} if measured else {}
    summary = {
        "run_id": "0", "status": status, "reason": reason, "strategy": strategy, "task": "digits", "seed": seed,
        "config_hash": "0", "rounds_completed": len(rows), "num_clients": 2, "final": final, "history": rows,
        "totals": {
            "upload_bytes": 1000 * len(rows), "download_bytes": 2000 * len(rows), "wall_seconds": 1.5,
            "virtual_seconds": None, "peak_rss_bytes": 1,
        },
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    tree: dict[str, Any] = {
        "strategy": strategy, "task": {"_target_": "clients.tasks.Digits", "fold": 0, "alpha": 0.5},
        "client": {"_target_": "clients.trainers.SGD", "lr": 0.1}, "attack": None, "seed": seed,
        "output_dir": "runs", "run_name": folder.name, "travel": ["*"], "rounds": len(rows),
    }  # fmt: skip
    for path, value in config.items():
        *parents, leaf = path.split("__")
        node = tree
        for name in parents:
            node = node[name]
        node[leaf] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder
