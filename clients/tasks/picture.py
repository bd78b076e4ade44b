"""The picture of who holds which classes.

Drawn here rather than by flwr-datasets' `plot_label_distributions`: that one reports each call to a
telemetry server, keeps an identifier in the home directory, and its bars are no longer readable at
a few hundred clients.
"""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_MOST_BARS = 200
_MOST_CLASSES_NAMED = 20


def draw_label_counts(counts: np.ndarray, path: Path, title: str) -> None:
    """Write a PNG of label counts: bars up to 200 clients, a map of shares above.

    Args:
        counts: (num_clients, num_classes) int64.
        path: of the file; its folder is made where it is missing.
        title: the line above the picture.

    Raises:
        OSError: the file cannot be written.
    """
    figure = label_counts_figure(counts, title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)


def label_counts_figure(counts: np.ndarray, title: str) -> Figure:
    """The figure that `draw_label_counts` writes; not known to pyplot, so nothing has to close it."""
    num_clients = len(counts)
    figure = Figure(figsize=(float(np.clip(5 + 0.09 * num_clients, 7, 16)), 4.5))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    if num_clients <= _MOST_BARS:
        _draw_bars(axes, counts)
    else:
        _draw_map(figure, axes, counts)
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("client")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
    return figure


def _draw_bars(axes: Axes, counts: np.ndarray) -> None:
    num_clients, num_classes = counts.shape
    colors = colormaps["tab10" if num_classes <= 10 else "turbo"]
    left = np.arange(num_clients) - 0.43
    right = left + 0.86
    tops = np.cumsum(counts, axis=1)
    for label in range(num_classes):
        bottom, top = tops[:, label] - counts[:, label], tops[:, label]
        corners = [(left, bottom), (left, top), (right, top), (right, bottom)]
        # One artist for all clients: a thousand single bars take a second to lay out.
        bars = PolyCollection(
            list(np.array(corners).transpose(2, 0, 1)),
            facecolor=colors(label if num_classes <= 10 else label / (num_classes - 1)),
            label=str(label) if num_classes <= _MOST_CLASSES_NAMED else None,
        )
        axes.add_collection(bars)
    axes.set_ylim(0, 1.04 * tops.max())
    axes.set_xlim(-0.6, num_clients - 0.4)
    axes.set_ylabel("examples")
    if num_classes <= _MOST_CLASSES_NAMED:
        axes.legend(
            title="class", loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True, frameon=False
        )


def _draw_map(figure: Figure, axes: Axes, counts: np.ndarray) -> None:
    shares = counts / counts.sum(axis=1, keepdims=True)
    image = axes.imshow(shares.T, aspect="auto", interpolation="nearest", vmin=0, cmap="viridis")
    axes.set_ylabel("class")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    figure.colorbar(image, ax=axes, label="share of the client's examples")
