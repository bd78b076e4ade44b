"""What a run shows while it runs: a live table on a terminal, one plain line a round anywhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

Row = Mapping[str, Any]
"""A row of the history, as in summary.json; None where a figure was not measured."""


class Outcome(Protocol):
    """What a console must know of a run that has ended."""

    @property
    def status(self) -> str:
        """`completed`, `failed` or `stopped`."""
        ...

    @property
    def reason(self) -> str:
        """Why, where it did not complete."""
        ...

    @property
    def summary_path(self) -> Path:
        """Absolute path of summary.json."""
        ...


class Console(Protocol):
    """Where a run tells how it goes."""

    def begin(self, title: str, rounds: int, facts: Mapping[str, Any]) -> None:
        """The run starts: what it is called, how many rounds it is to have, and what is worth knowing about it."""
        ...

    def round(self, row: Row, total: int) -> None:
        """A round is over."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line, at any time."""
        ...

    def end(self, result: Outcome) -> None:
        """The run is over; the last line is the path of its summary."""
        ...


@contextmanager
def open_console(stream: TextIO | None = None) -> Iterator[Console]:
    """The console that suits a stream, standard output by default; leaves a terminal as it was found."""
    out = sys.stdout if stream is None else stream
    if not out.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        yield PlainConsole(out)
        return
    console = RichConsole(out)
    try:
        yield console
    finally:
        console.close()


def human_bytes(count: float | None) -> str:
    """Bytes with three significant digits in decimal units: 999 B, 1.23 kB, 45.6 MB."""
    if count is None:
        return "-"
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    digits = 0 if unit == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _cells(row: Row, total: int) -> dict[str, str]:
    """The columns of a row, formatted."""
    people = [row.get("clients_sampled"), row.get("clients_failed"), row.get("updates_rejected")]
    cells = {
        "round": f"{row['round']}/{total}",
        "loss": _figure(row.get("loss"), 4),
        "accuracy": _figure(row.get("accuracy"), 4),
        "seconds": _figure(row.get("seconds"), 1),
        "up": human_bytes(row.get("upload_bytes")),
        "down": human_bytes(row.get("download_bytes")),
        "sampled/failed/rejected": "/".join(
            "-" if number is None else str(number) for number in people
        ),
    }
    for name in ("backdoor_success", "label_flip_success"):
        if name in row:
            cells[name.removesuffix("_success")] = _figure(row[name], 4)
    if row.get("epsilon") is not None:
        cells["epsilon"] = _figure(row["epsilon"], 3)
    return cells


def _ending(result: Outcome) -> str:
    return result.status + (f": {result.reason}" if result.reason else "")


class PlainConsole:
    """One line at a time, flushed, so that a log can be followed.

    Args:
        stream: standard output by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._out = sys.stdout if stream is None else stream

    def _print(self, text: str) -> None:
        # One write: Flower queues what a ServerApp writes piece by piece, and other programs' lines fall between.
        self._out.write(text + "\n")
        self._out.flush()

    def begin(self, title: str, rounds: int, facts: Mapping[str, Any]) -> None:
        """Title and facts on one line."""
        told = ", ".join(f"{name} {value}" for name, value in facts.items())
        self._print(f"{title}: {rounds} rounds" + (f", {told}" if told else ""))

    def round(self, row: Row, total: int) -> None:
        """Name and figure of each column."""
        widths = {"round": 2 * len(str(total)) + 1, "seconds": 6, "up": 7, "down": 7}
        self._print(
            "  ".join(
                f"{name} {text:>{widths.get(name, 0)}}" for name, text in _cells(row, total).items()
            )
        )

    def note(self, text: str) -> None:
        """The text, on a line of its own."""
        self._print(text)

    def end(self, result: Outcome) -> None:
        """How it ended, and where the summary lies."""
        self._print(_ending(result))
        self._print(str(result.summary_path))


class RichConsole:
    """A table that grows above a progress bar.

    Args:
        stream: a terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console as Terminal
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._out = stream
        self._terminal = Terminal(file=stream, highlight=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        # Drawn at each round, not by a thread: workers are forked while the bar stands, a thread's locks with them.
        self._progress = Progress(
            *columns, console=self._terminal, transient=True, auto_refresh=False
        )
        self._task = self._progress.add_task("rounds", total=None, start=False)
        self._heading = False

    def close(self) -> None:
        """Takes the bar away, if there still is one, and gives the cursor back."""
        self._progress.stop()

    def begin(self, title: str, rounds: int, facts: Mapping[str, Any]) -> None:
        """Title and facts, then the bar."""
        from rich.text import Text

        self._terminal.print(Text(title, style="bold"))
        for name, value in facts.items():
            self._terminal.print(Text(f"  {name:<12} {value}"))
        self._progress.update(self._task, total=rounds)
        self._progress.start_task(self._task)
        self._progress.start()

    def round(self, row: Row, total: int) -> None:
        """A row of the table, cut at the terminal's edge rather than broken."""
        from rich.text import Text

        cells = _cells(row, total)
        widths = {name: max(len(name), 9) for name in cells}
        if not self._heading:
            titles = "  ".join(f"{name:>{widths[name]}}" for name in cells)
            self._terminal.print(Text(titles, style="dim", no_wrap=True, overflow="ellipsis"))
            self._heading = True
        troubled = (row.get("clients_failed") or 0) + (row.get("updates_rejected") or 0) > 0
        line = Text(no_wrap=True, overflow="ellipsis")
        for position, (name, text) in enumerate(cells.items()):
            style = "yellow" if troubled and "/" in name else "bold" if name == "accuracy" else ""
            line.append(("  " if position else "") + f"{text:>{widths[name]}}", style=style)
        self._terminal.print(line)
        self._progress.update(self._task, total=total, completed=int(row["round"]), refresh=True)

    def note(self, text: str) -> None:
        """The text, above the bar."""
        from rich.text import Text

        self._terminal.print(Text(text, style="yellow"))

    def end(self, result: Outcome) -> None:
        """How it ended, and where the summary lies: printed past rich, which would wrap the path."""
        from rich.text import Text

        self.close()
        style = {"completed": "green", "stopped": "yellow"}.get(result.status, "red")
        self._terminal.print(Text(_ending(result), style=style))
        print(result.summary_path, file=self._out, flush=True)
