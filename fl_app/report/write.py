"""A report's files: Markdown, CSV, figures, and one page that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment

from fl_app.report.analysis import Report
from fl_app.report.figures import curves_caption, draw_curves, draw_heat_map
from fl_app.report.tables import (
    escaped,
    groups_table,
    left_out_table,
    markdown,
    notes,
    report_csv,
    runs_csv,
)
from fl_app.report.text import one_line
from fl_app.services.files import write_atomically

PAGE = "index.html"
_CURVES, _HEAT_MAP = "curves.png", "heat_map.png"
_FIGURES = {_CURVES, _HEAT_MAP}


def write_report(report: Report, output: Path) -> Path:
    """Writes everything into a folder, which is made where it is missing; files of an earlier report are replaced.

    Returns:
        The page, absolute.

    Raises:
        OSError: the folder can't be written.
    """
    output = output.expanduser().resolve()
    output.mkdir(parents=True, exist_ok=True)
    images = _images(report)
    for image in images:
        write_atomically(output / image.file, image.png)
    for file in _FIGURES - {image.file for image in images}:
        (output / file).unlink(missing_ok=True)
    for name, text in (
        ("report.md", _markdown(report, images)),
        ("report.csv", report_csv(report)),
        ("runs.csv", runs_csv(report)),
        (PAGE, _page(report, images)),
    ):
        write_atomically(output / name, text.encode(errors="backslashreplace"))
    return output / PAGE


@dataclass(frozen=True)
class _Image:
    file: str
    title: str
    caption: str
    png: bytes


def _images(report: Report) -> list[_Image]:
    metric = one_line(report.metric)
    drawn = (
        (_CURVES, f"{metric} by round", curves_caption(len(report.rows)), draw_curves(report)),
        (_HEAT_MAP, f"{metric} over two keys", "Means of the groups.", draw_heat_map(report)),
    )
    return [_Image(file, title, said, png) for file, title, said, png in drawn if png is not None]


def _title(report: Report) -> str:
    return one_line(
        f"{report.metric} by {', '.join(report.by)}: runs in {report.collection.root.name}"
    )


def _markdown(report: Report, images: Sequence[_Image]) -> str:
    parts = [f"# {escaped(_title(report))}\n", markdown(groups_table(report))]
    parts.append("".join(f"* {escaped(note)}\n" for note in notes(report)))
    parts += [
        f"![{escaped(image.title)}]({image.file})\n\n{escaped(image.caption)}\n" for image in images
    ]
    left = left_out_table(report)
    return "\n".join([*parts, "## Left out\n", markdown(left)] if left.rows else parts)


def _page(report: Report, images: Sequence[_Image]) -> str:
    template = files("fl_app.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True)
    return environment.from_string(template).render(
        title=_title(report),
        groups=groups_table(report),
        notes=notes(report),
        images=[
            (image.title, image.caption, base64.b64encode(image.png).decode()) for image in images
        ],
        left_out=left_out_table(report),
    )
