"""What a gradient inversion found, side by side with what was there."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fl_app.audit.inversion import Inversion


def draw(inversion: Inversion, path: Path) -> None:
    """Writes a PNG: a row for each picture; the original, then what was made of each view, with the median PSNR.

    Raises:
        OSError: the file can't be written.
    """
    views = {"original": inversion.originals, **inversion.found}
    rows, columns = len(inversion.originals), len(views)
    figure = Figure(figsize=(1.35 * columns, 1.3 * rows + 0.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for column, (name, pictures) in enumerate(views.items()):
        title = name
        if name in inversion.found:
            title += f"\n{median(inversion.likeness(name)['psnr']):.1f} dB"
        grid[0][column].set_title(title, fontsize=9)
        for row, picture in enumerate(pictures):
            axes = grid[row][column]
            shown = picture.permute(1, 2, 0).clamp(0, 1).numpy()
            axes.imshow(
                shown if shown.shape[2] == 3 else shown[:, :, 0], cmap="gray", vmin=0, vmax=1
            )
            axes.set_axis_off()
    figure.savefig(path)
