"""`curves.png`: a run at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_INK, _ACCENT = "#1f3a5f", "#c8553d"


def draw_curves(history: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Test accuracy and loss by round, and megabytes moved; rounds without evaluation are left out of the first two."""
    measured = [row for row in history if row["loss"] is not None]
    figure = Figure(figsize=(9, 3.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    figure.suptitle(title, fontsize=10)
    marker = "o" if len(measured) <= 30 else None
    for axes, key, color in ((left, "accuracy", _INK), (middle, "loss", _ACCENT)):
        points = [(row["round"], row[key]) for row in measured if row.get(key) is not None]
        axes.plot(
            [x for x, _ in points], [y for _, y in points], color=color, marker=marker, markersize=3
        )
        axes.set(title=f"test {key}", xlabel="round")
    total_up = total_down = 0.0
    up, down = [], []
    for row in history:
        total_up, total_down = (
            total_up + row["upload_bytes"] / 1e6,
            total_down + row["download_bytes"] / 1e6,
        )
        up.append(total_up)
        down.append(total_down)
    rounds = [row["round"] for row in history]
    right.plot(rounds, up, color=_INK, label="up")
    right.plot(rounds, down, color=_ACCENT, linestyle="--", label="down")
    right.set(title="traffic, MB in all", xlabel="round")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
