"""`summary.json`: what a run did, round by round, in the words that tools rely on. Written atomically each round."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fl_app.services.files import write_atomically
from strategies import plain_json
from strategies.admission import Admission
from strategies.breaker import CircuitBreaker
from strategies.clustering import TaskClusters
from strategies.detection import Quarantine
from strategies.hooks import RoundView
from strategies.protocols import Promise
from strategies.samplers import jain_index
from strategies.timings import Timings

Status = Literal["running", "completed", "failed", "stopped"]
Row = dict[str, Any]

NAME = "summary.json"


@dataclass
class Summary:
    """A run's record and its file.

    Attributes:
        path: of the file.
        header: `run_id`, `strategy`, `task`, `seed`, `config_hash`, `num_clients`.
        admission: whose counts of refusals and strikes are written along.
        peak_memory: bytes, asked at each write.
        virtual: whether the run's clock is a virtual one that is worth reporting.
        quarantine: whose records are written along, where there is one.
        breaker: whose open circuits are written along, where there is one.
        clusters: whose groups are written along, where anybody looks for them.
        privacy: whose report is written along, where any is promised.
        timings: whose counts of who was asked are written along; None where a promise rests on their being secret.
        on_row: told of every new row.
        history: one row per model version.
        earlier_seconds: wall time of the run's earlier processes.
    """

    path: Path
    header: Mapping[str, Any]
    admission: Admission
    peak_memory: Callable[[], int]
    virtual: bool
    quarantine: Quarantine | None = None
    breaker: CircuitBreaker | None = None
    clusters: TaskClusters | None = None
    privacy: Promise | None = None
    timings: Timings | None = None
    on_row: Callable[[Row], None] = lambda row: None
    history: list[Row] = field(default_factory=list)
    earlier_seconds: float = 0.0
    _pending: list[Row] = field(default_factory=list, init=False)
    _began: float = field(default_factory=time.monotonic, init=False)

    def record(self, view: RoundView) -> None:
        """Makes a round's row, for the checkpoint that follows; it is not told of before that is on the disk."""
        self._pending = [self._row(view)]

    def publish(self, view: RoundView) -> None:
        """Tells of the row: a round that the file has is never one that a resumed run would not have."""
        self.history = self.rows
        self._pending = []
        self.write("running", "")
        self.on_row(self.history[-1])

    @property
    def rows(self) -> list[Row]:
        """The history with the row that is not told of yet."""
        return self.history + self._pending

    @property
    def wall_seconds(self) -> float:
        """Of this process and those before it."""
        return self.earlier_seconds + time.monotonic() - self._began

    def write(self, status: Status, reason: str) -> None:
        """Writes the file with this status."""
        text = json.dumps(self.document(status, reason), indent=2, allow_nan=False)
        write_atomically(self.path, text.encode() + b"\n")

    def document(self, status: Status, reason: str) -> dict[str, Any]:
        """The file's content."""
        return {
            "run_id": self.header["run_id"],
            "status": status,
            "reason": reason,
            **{key: self.header[key] for key in ("strategy", "task", "seed", "config_hash")},
            "rounds_completed": self.history[-1]["round"] if self.history else 0,
            "num_clients": self.header["num_clients"],
            "final": self._final(),
            "history": self.history,
            "privacy": None if self.privacy is None else self.privacy.report(),
            "rejections": dict(sorted(self.admission.refusals.items())),
            "strikes": {
                str(client): count for client, count in sorted(self.admission.strikes.items())
            },
            **({} if self.quarantine is None else {"quarantine": self.quarantine.summary()}),
            **({} if self.breaker is None else {"breaker": self.breaker.report()}),
            **({} if self.clusters is None else {"task_groups": dict(self.clusters.report())}),
            **(
                {} if self.timings is None else {"participation": self._participation(self.timings)}
            ),
            "totals": {
                "upload_bytes": sum(row["upload_bytes"] for row in self.history),
                "download_bytes": sum(row["download_bytes"] for row in self.history),
                "wall_seconds": round(self.wall_seconds, 3),
                "virtual_seconds": self.history[-1]["virtual_seconds"] if self.history else None,
                "peak_rss_bytes": self.peak_memory(),
            },
        }

    def _participation(self, timings: Timings) -> dict[str, float]:
        """How evenly clients were asked: Jain's index, and the least and most often that one was."""
        counts = timings.asks()
        never = self.header["num_clients"] - len(counts)
        counts = np.pad(counts, (0, max(0, never)))
        return {
            "jain_index": round(jain_index(counts.astype(np.float64)), 6),
            "least": int(counts.min(initial=counts.max(initial=0))),
            "most": int(counts.max(initial=0)),
        }

    def _row(self, view: RoundView) -> Row:
        evaluation = {name: _number(value) for name, value in view.evaluation.items()}
        row: Row = {
            "round": view.round,
            "loss": evaluation.pop("loss", None),
            "accuracy": evaluation.pop("accuracy", None),
            **evaluation,
            "seconds": round(view.seconds, 6),
            "upload_bytes": view.upload_bytes,
            "download_bytes": view.download_bytes,
            "clients_sampled": view.sampled,
            "clients_failed": view.failed,
            "updates_rejected": view.rejected,
            "epsilon": view.epsilon,
            "virtual_seconds": view.clock if self.virtual else None,
            "void": view.void,
        }
        if view.void:
            row["void_reason"] = view.void_reason
        if view.flagged is not None:
            row["clients_flagged"] = list(view.flagged)
        if view.staleness:
            mean = sum(view.staleness) / len(view.staleness)
            row["staleness"] = {"mean": round(mean, 4), "max": max(view.staleness)}
        if view.train_metrics:
            row["train"] = {name: _number(value) for name, value in view.train_metrics.items()}
        if view.federated:
            row["federated"] = {name: _number(value) for name, value in view.federated.items()}
        return row

    def _final(self) -> dict[str, Any]:
        """The metrics of the last row that was evaluated."""
        fixed = _COUNTS | {
            "round",
            "epsilon",
            "virtual_seconds",
            "void",
            "void_reason",
            "seconds",
            "staleness",
            "train",
            "federated",
        }
        for row in reversed(self.history):
            if row["loss"] is not None:
                return {key: value for key, value in row.items() if key not in fixed}
        return {}


_COUNTS = {
    "upload_bytes",
    "download_bytes",
    "clients_sampled",
    "clients_failed",
    "updates_rejected",
    "clients_flagged",
}


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity: null stands for them."""
    return value if math.isfinite(value) else None


def read_summary(path: Path) -> dict[str, Any] | None:
    """The content of a summary; None where there is no whole one."""
    try:
        content = plain_json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
