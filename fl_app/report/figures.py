"""The figures of a report, drawn without a display: the metric by round, and two keys against each other."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fl_app.report.analysis import Report, Row
from fl_app.report.collect import canonical
from fl_app.report.statistics import estimate

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D")
"""Okabe and Ito's, which the colour-blind tell apart; without the yellow, too pale for a line."""
_DASHES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
"""With their markers."""
MOST_LINES = len(_COLOURS) * len(_DASHES)
_WIDEST_LABEL = 40
_MOST_BANDS = 7
"""Bands of more groups lie over each other until none can be seen."""
_MOST_WRITTEN = 400
"""Cells of a heat map that figures are written into."""

Curve = tuple[list[int], list[float], list[float]]
"""Rounds, means, deviations."""


def draw_curves(report: Report) -> bytes | None:
    """The metric by round, a line and a band of one standard deviation for each group; a PNG, or None of no curve."""
    drawn = [(row, curve) for row in report.rows if (curve := curve_of(row, report.metric))[0]]
    if not drawn:
        return None
    # The order of the legend is that of the lines' ends, or the eye has to search.
    drawn = sorted(drawn[:MOST_LINES], key=lambda item: -item[1][1][-1])
    styles = _styles(report)
    height = max(4.0, 0.6 + 0.22 * (len(drawn) + 1))
    figure = _figure(8.5, height)
    axes = figure.subplots()
    for row, (rounds, means, deviations) in drawn:
        colour, dash = styles[row.group.labels]
        (line, marker), few = _DASHES[dash], len(rounds) <= 30
        style: dict[str, Any] = {
            "color": _COLOURS[colour],
            "linestyle": line,
            "marker": marker if few else None,
        }
        label = f"{_label(' · '.join(row.group.labels))} (n = {row.metric.n})"
        axes.plot(rounds, means, markersize=4, label=label, **style)
        if any(deviations) and len(drawn) <= _MOST_BANDS:
            low, high = np.subtract(means, deviations), np.add(means, deviations)
            axes.fill_between(rounds, low, high, color=_COLOURS[colour], alpha=0.15, linewidth=0)
    axes.set(xlabel="round", ylabel=_with_unit(report.metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _plain_frame(axes)
    figure.legend(
        loc="outside right upper",
        title=_label(" · ".join(report.by)),
        frameon=False,
        fontsize=8,
        title_fontsize=8,
        alignment="left",
        handlelength=3.2,
    )
    return _png(figure)


def _styles(report: Report) -> dict[tuple[str, ...], tuple[int, int]]:
    """Colour and dash of each group, by its labels: of two keys one is the colour and one the dash, where they fit."""
    several = _several(report)
    if len(several) == 2:
        first, second = (list(several[place]) for place in several)
        if len(first) <= len(_COLOURS) and len(second) <= len(_DASHES):
            return {
                row.group.labels: (first.index(one), second.index(other))
                for row in report.rows
                for one, other in [[canonical(row.group.values[place]) for place in several]]
            }
    count = len(_COLOURS)
    return {
        row.group.labels: (place % count, place // count % len(_DASHES))
        for place, row in enumerate(report.rows)
    }


def _several(report: Report) -> dict[int, dict[str, str]]:
    """Canonical value to label of each key, by its place, that has more than one value."""
    values = {
        place: {canonical(row.group.values[place]): row.group.labels[place] for row in report.rows}
        for place in range(len(report.by))
    }
    return {place: known for place, known in values.items() if len(known) > 1}


def curves_caption(groups: int) -> str:
    """How the curves of so many groups are to be read."""
    told = "The mean of a group's runs in each round that all of them have a figure for"
    told += "; the band is one standard deviation either way." if groups <= _MOST_BANDS else "."
    return told + (
        f" The first {MOST_LINES} of {groups} groups are drawn." if groups > MOST_LINES else ""
    )


def curve_of(row: Row, metric: str) -> Curve:
    """Mean and deviation in each round that all of the group's runs have a figure for.

    In other rounds it would be a mean over fewer runs, and jump where one of them ends.
    """
    curves = [
        {number: figures[metric] for number, figures in run.history if metric in figures}
        for run in row.group.runs
    ]
    rounds = sorted(set(curves[0]).intersection(*curves[1:]))
    found = [estimate([curve[number] for curve in curves]) for number in rounds]
    return rounds, [item.mean or 0.0 for item in found], [item.deviation or 0.0 for item in found]


def draw_heat_map(report: Report) -> bytes | None:
    """The metric's mean over two keys; a PNG, or None where not exactly two of the keys have several values."""
    values = _several(report)
    if len(values) != 2:
        return None
    down, across = values
    table = np.full((len(values[down]), len(values[across])), np.nan)
    counts = np.zeros(table.shape, dtype=int)
    for row in report.rows:
        place = tuple(list(values[at]).index(canonical(row.group.values[at])) for at in values)
        table[place] = row.metric.mean
        counts[place] = row.metric.n
    lines, columns = table.shape
    width = max(5.0, 2.4 + 0.95 * min(columns, 20))
    figure = _figure(width, max(2.6, 1.4 + 0.5 * min(lines, 30)))
    axes = figure.subplots()
    colours = colormaps["cividis"].with_extremes(bad="#eeeeee")
    norm = Normalize(np.nanmin(table), np.nanmax(table))
    image = axes.imshow(np.ma.masked_invalid(table), cmap=colours, norm=norm, aspect="auto")
    axes.set_xticks(range(columns), [_label(label) for label in values[across].values()])
    axes.set_yticks(range(lines), [_label(label) for label in values[down].values()])
    if max(map(len, values[across].values())) > 10:
        axes.tick_params(axis="x", labelrotation=30)
    axes.set(xlabel=_label(report.by[across]), ylabel=_label(report.by[down]))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for edges, line in ((columns, axes.axvline), (lines, axes.axhline)):
        for edge in range(1, edges):
            line(edge - 0.5, color="white", linewidth=1.5)
    figure.colorbar(image, ax=axes, label=f"{_with_unit(report.metric)}, mean")
    if table.size <= _MOST_WRITTEN:
        _write_cells(axes, table, counts, norm)
    return _png(figure)


def _write_cells(
    axes: Axes, table: NDArray[np.float64], counts: NDArray[np.int_], norm: Normalize
) -> None:
    """Writes mean and number of runs into each cell."""
    for (line, column), value in np.ndenumerate(table):
        missing = np.isnan(value)
        text = "no run" if missing else f"{value:.4g}\nn = {counts[line, column]}"
        dark = not missing and norm(value) < 0.5
        colour = "white" if dark else "#222222"
        axes.text(column, line, text, ha="center", va="center", fontsize=8, color=colour)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, min(height, 40.0)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain_frame(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        # A name in letters that the font lacks is drawn as boxes, and that is all there is to say of it.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(out, format="png")
    return out.getvalue()


def _label(text: str) -> str:
    """A text for a figure: short, and no formula."""
    cut = text if len(text) <= _WIDEST_LABEL else f"{text[: _WIDEST_LABEL - 1]}…"
    return cut.replace("$", r"\$")


def _with_unit(metric: str) -> str:
    return "test accuracy (fraction)" if metric == "accuracy" else _label(f"test {metric}")
