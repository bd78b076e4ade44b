"""The scores of a split run's audit at a glance: tokens by defence and by depth of the cut, and all other attacks.

Each point has its interval and, as a hollow mark, what a guess would get. Drawn without a display, of the document's
plain data.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLOURS = {"learned inverter": "#0072B2", "dictionary": "#D55E00"}
"""Okabe and Ito's, which the colour-blind tell apart."""
_MARKS = {"learned inverter": "o", "dictionary": "s"}
_OTHER = "#009E73"

Scores = Sequence[Mapping[str, Any]]


def draw(document: Mapping[str, Any]) -> bytes:
    """A PNG of split.json's content."""
    scores: Scores = document["scores"]
    tokens = [one for one in scores if one["attack"] in _COLOURS]
    others = [one for one in scores if one["attack"] not in _COLOURS]
    figure = Figure(
        figsize=(10.5, max(6.5, 3.6 + 0.24 * len(others))), dpi=110, layout="constrained"
    )
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1, height_ratios=(3.2, max(2.5, 0.24 * len(others))))
    above, below = halves
    first, second = above.subplots(1, 2)
    at, own = document["cut"], document["wire"]
    here = [one for one in tokens if one["cut"] == at]
    _tokens(first, here, "setting", f"defence, cut at {at} of {document['blocks']}")
    deep = sorted((one for one in tokens if one["setting"] == own), key=lambda one: one["cut"])
    _tokens(second, deep, "cut", f"blocks below the cut, defence: {own}")
    _points(below.subplots(), others)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _tokens(axes: Axes, scores: Scores, key: str, label: str) -> None:
    """Accuracy on tokens over a setting; settings of a kind have no order that a line would mean."""
    places = {
        str(value): place for place, value in enumerate(dict.fromkeys(one[key] for one in scores))
    }
    for attack, colour in _COLOURS.items():
        mine = [one for one in scores if one["attack"] == attack]
        if mine:
            xs = [places[str(one[key])] for one in mine]
            _errors(axes, xs, mine, colour, _MARKS[attack], attack)
    baselines = {one["baseline"] for one in scores}
    for baseline in sorted(baselines)[:1]:
        axes.axhline(baseline, color="#4D4D4D", linestyle=":", label="most frequent token")
    axes.set_xticks(range(len(places)), list(places), rotation=20 if key == "setting" else 0)
    axes.set(xlabel=label, ylabel="tokens named right (fraction)", ylim=(-0.03, 1.03))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if scores:
        axes.legend(frameon=False, fontsize=8)


def _errors(
    axes: Axes, xs: Sequence[int], scores: Scores, colour: str, mark: str, label: str
) -> None:
    values = [one["value"] for one in scores]
    reach = [
        [max(0.0, one["value"] - one["interval"][0]) for one in scores],
        [max(0.0, one["interval"][1] - one["value"]) for one in scores],
    ]
    axes.errorbar(xs, values, reach, color=colour, fmt=mark, markersize=5, capsize=3, label=label)


def _points(axes: Axes, scores: Scores) -> None:
    """All other attacks, a row each."""
    for place, one in enumerate(scores):
        low, high = one["interval"]
        axes.plot([low, high], [place, place], color=_OTHER, linewidth=2)
        axes.plot(one["value"], place, "o", color=_OTHER, label="attack" if not place else None)
        told = "guess" if not place else None
        axes.plot(one["baseline"], place, "o", color="#4D4D4D", fillstyle="none", label=told)
    names = [f"{one['attack']}, {one['measure']} ({one['setting']})" for one in scores]
    axes.set_yticks(range(len(scores)), names, fontsize=7)
    axes.set(xlim=(-0.03, 1.03), xlabel="accuracy, precision, recall or AUC, and its interval")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, axis="x")
    if scores:
        axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
