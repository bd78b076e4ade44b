"""The figures of a report, drawn without a display: the metric by round, and two keys against each other."""

from __future__ import annotations

import io
import warnings

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fl_app.report.analysis import Report, Row
from fl_app.report.grouping import canonical
from fl_app.report.statistics import estimate

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D")
"""Okabe and Ito's, which the colour-blind tell apart; without the yellow, too pale for a line."""
_DASHES = ("-", "--", ":", "-.")
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
    styles = {id(row): place for place, row in enumerate(report.rows)}
    height = max(4.0, 0.6 + 0.22 * (len(drawn) + 1))
    figure = _figure(8.5, height)
    axes = figure.subplots()
    for row, (rounds, means, deviations) in drawn:
        place = styles[id(row)]
        colour = _COLOURS[place % len(_COLOURS)]
        dash = _DASHES[place // len(_COLOURS) % len(_DASHES)]
        marker = "o" if len(rounds) <= 30 else None
        label = f"{_label(' · '.join(row.group.labels))} (n = {row.metric.n})"
        axes.plot(
            rounds, means, color=colour, linestyle=dash, marker=marker, markersize=3, label=label
        )
        if any(deviations) and len(drawn) <= _MOST_BANDS:
            low = np.subtract(means, deviations)
            axes.fill_between(
                rounds, low, np.add(means, deviations), color=colour, alpha=0.15, linewidth=0
            )
    axes.set(xlabel="round", ylabel=_with_unit(report.metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain_frame(axes)
    figure.legend(
        loc="outside right upper",
        title=_label(" · ".join(report.by)),
        frameon=False,
        fontsize=8,
        title_fontsize=8,
        alignment="left",
    )
    return _png(figure)


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
    values = [
        {canonical(row.group.values[place]): row.group.labels[place] for row in report.rows}
        for place in range(len(report.by))
    ]
    several = [place for place, known in enumerate(values) if len(known) > 1]
    if len(several) != 2:
        return None
    down, across = several
    table = np.full((len(values[down]), len(values[across])), np.nan)
    counts = np.zeros(table.shape, dtype=int)
    for row in report.rows:
        place = tuple(list(values[at]).index(canonical(row.group.values[at])) for at in several)
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
    return "test accuracy (share of 1)" if metric == "accuracy" else _label(f"test {metric}")
