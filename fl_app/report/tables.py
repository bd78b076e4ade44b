"""The report's figures as cells, and these as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fl_app.report.analysis import Report, Row
from fl_app.report.collect import Scalar
from fl_app.report.statistics import LEVEL, Difference, Estimate
from fl_app.report.text import one_line, said

_MARKDOWN = re.compile(r"([\\|`*\[\]<>&])")
_NAMED = 12
"""Keys that a note lists."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Signs at which a spreadsheet takes a cell for a formula."""


@dataclass(frozen=True)
class Table:
    """Text in columns.

    Attributes:
        columns: their headings.
        rows: a text for each column.
        texts: how many columns, from the left, hold texts; the others hold figures.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int


def groups_table(report: Report) -> Table:
    """One row a group."""
    columns = [*report.by, "n", f"{report.metric}, mean ± sd"]
    compared = any(row.difference for row in report.rows)
    if compared:
        columns += [f"difference from baseline [{LEVEL:.0%} interval]", "pairs"]
    if report.target is not None:
        columns += [f"rounds to {report.target:g}", "reached"]
    columns += ["up, MB", "down, MB", "wall time, s"]
    rows = [_group_cells(row, compared=compared) for row in report.rows]
    return Table(tuple(map(one_line, columns)), tuple(rows), len(report.by))


def _group_cells(row: Row, *, compared: bool) -> tuple[str, ...]:
    cells = [*row.group.labels, str(row.metric.n), _spread(row.metric, 4)]
    if compared:
        cells += [_difference(row), "" if row.difference is None else str(row.difference.pairs)]
    if row.rounds is not None:
        cells += [_spread(row.rounds, 2), f"{row.rounds.n} of {row.metric.n}"]
    megabytes = (_spread(found, 3, 1e-6) for found in (row.upload, row.download))
    return (*cells, *megabytes, _spread(row.seconds, 3))


def _decimals(value: float | None, digits: int) -> int:
    """Decimals that show a value with so many significant digits, at most two more."""
    if not value:
        return digits
    return min(max(0, digits - 1 - math.floor(math.log10(abs(value)))), digits + 2)


def _spread(found: Estimate, digits: int, scale: float = 1.0) -> str:
    """The mean with so many digits, and the deviation with as many decimals."""
    if found.mean is None:
        return "–"
    decimals = _decimals(found.mean * scale, digits)
    mean = f"{found.mean * scale:.{decimals}f}"
    return mean if found.deviation is None else f"{mean} ± {found.deviation * scale:.{decimals}f}"


def _difference(row: Row) -> str:
    found = row.difference
    if found is None:
        return "baseline" if row.baseline is None else "–"
    if found.mean is None:
        return "no pairs"
    decimals = _decimals(row.metric.mean, 4)
    mean = f"{found.mean:+.{decimals}f}"
    if found.low is None or found.high is None:
        return f"{mean} [1 pair: no interval]"
    return f"{mean} [{found.low:+.{decimals}f}, {found.high:+.{decimals}f}]"


def left_out_table(report: Report) -> Table:
    """One row a run that is not counted."""
    rows = (
        (one_line(run.name), run.status, one_line(run.reason)) for run in report.collection.left_out
    )
    return Table(("run", "status", "reason"), tuple(rows), 3)


def notes(report: Report) -> list[str]:
    """What a reader must know to read the groups' table aright."""
    counted, left = len(report.collection.runs), len(report.collection.left_out)
    told = [f"{counted} completed {_runs(counted)} in {len(report.rows)} groups; {left} left out."]
    if any(row.metric.n < 2 for row in report.rows):
        told.append("A group of one run has no standard deviation.")
    if any(row.difference for row in report.rows):
        told.append(
            f"The interval is the paired {LEVEL:.0%} interval of Student's t for the mean difference, over replicates "
            "that agree in seed, fold and all else that varies within the groups. It takes the pairs for independent; "
            "folds share training data, so over folds it is too narrow."
        )
    for row in report.rows:
        told += [f"{_pair(row)}: {row.unmatched}."] if row.unmatched else []
        found = row.difference
        if (
            found is not None
            and found.low is not None
            and found.high is not None
            and math.isclose(found.low, found.high, rel_tol=1e-4, abs_tol=1e-12)
        ):
            told.append(
                f"{_pair(row)}: all {found.pairs} pairs differ by the same figure, so the interval has no width; of "
                "few pairs that says little."
            )
        if found is not None and 0 < found.pairs < row.metric.n:
            told.append(f"{_pair(row)}: {found.pairs} of {row.metric.n} runs have a partner.")
    if report.within:
        told.append(
            f"Within groups these differ too, and are averaged over: {_some(report.within)}."
        )
    if report.along:
        told.append(
            f"These differ along with the groups, so that the two can't be told apart: {_some(report.along)}."
        )
    if report.target is not None:
        way = "≤" if report.lower_is_better else "≥"
        told.append(
            f"Rounds to {report.target:g}: the first round with {report.metric} {way} {report.target:g}, "
            "over the runs that reached it."
        )
    return [_printable(text) for text in told]


def _printable(text: str) -> str:
    """The whole text on one printable line."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more


def _runs(count: int) -> str:
    return "run" if count == 1 else "runs"


def _pair(row: Row) -> str:
    against = " ".join(row.baseline.labels) if row.baseline else ""
    return f"{' '.join(row.group.labels)} against {against}"


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown, figures to the right."""
    rule = ["---"] * table.texts + ["---:"] * (len(table.columns) - table.texts)
    lines = [
        [escaped(cell) for cell in table.columns],
        rule,
        *([escaped(cell) for cell in row] for row in table.rows),
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def escaped(text: str) -> str:
    """A text that Markdown shows as it is."""
    return _MARKDOWN.sub(r"\\\1", text)


def report_csv(report: Report) -> str:
    """One row a group, figures unrounded."""
    heads = [*report.by, "n", f"{report.metric}_mean", f"{report.metric}_sd"]
    heads += ["baseline", "pairs", "difference", "interval_low", "interval_high"]
    heads += ["target", "reached", "rounds_to_target_mean", "rounds_to_target_sd"]
    for name in ("upload_bytes", "download_bytes", "wall_seconds"):
        heads += [f"{name}_mean", f"{name}_sd"]
    rows = []
    for row in report.rows:
        found = row.difference or Difference(0, None, None, None)
        against = " ".join(row.baseline.labels) if row.baseline else None
        rounds = row.rounds or Estimate(0, None, None)
        rows.append(
            [
                *row.group.values, row.metric.n, row.metric.mean, row.metric.deviation,
                against, found.pairs if row.baseline else None, found.mean, found.low, found.high,
                report.target, rounds.n if row.rounds else None, rounds.mean, rounds.deviation,
                row.upload.mean, row.upload.deviation, row.download.mean, row.download.deviation,
                row.seconds.mean, row.seconds.deviation,
            ]
        )  # fmt: skip
    return _csv(heads, rows)


def runs_csv(report: Report) -> str:
    """One row a run, those left out too."""
    runs = report.collection.runs
    keys = [*dict.fromkeys([*report.by, *report.along, *report.within, "seed", "task.fold"])]
    keys = [key for key in keys if any(key in run.config for run in runs)]
    metrics = sorted({name for run in runs for name in run.final})
    heads = ["run", "status", "reason", *keys, *metrics]
    heads += ["rounds", "upload_bytes", "download_bytes", "wall_seconds"]
    rows: list[list[Scalar]] = [
        [
            run.name,
            "completed",
            None,
            *(run.config.get(key) for key in keys),
            *(run.final.get(name) for name in metrics),
            run.history[-1][0] if run.history else None,
            run.upload_bytes,
            run.download_bytes,
            run.seconds,
        ]
        for run in runs
    ]
    blank = [None] * (len(heads) - 3)
    rows += [[run.name, run.status, run.reason, *blank] for run in report.collection.left_out]
    return _csv(heads, rows)


def _csv(heads: Sequence[str], rows: Sequence[Sequence[Scalar]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([guarded(head) for head in heads])
    writer.writerows([[guarded(cell) for cell in row] for row in rows])
    return out.getvalue()


def guarded(cell: Scalar) -> Scalar:
    """A cell that no spreadsheet takes for a formula: texts that look like one get an apostrophe before them."""
    if cell is None or (isinstance(cell, int | float) and not isinstance(cell, bool)):
        return cell
    text = said(cell) if isinstance(cell, bool) else one_line(cell)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text
