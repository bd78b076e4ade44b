"""What a run shows: a table on a terminal, plain lines elsewhere, the summary's path last and whole."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_app.cli.console import PlainConsole, human_bytes, open_console

LONG = Path("/somewhere") / ("a-folder-with-a-long-name/" * 8) / "summary.json"
ROW: dict[str, Any] = {
    "round": 3, "loss": 0.43216, "accuracy": 0.93125, "seconds": 2.06, "upload_bytes": 1_234_567,
    "download_bytes": 89_000, "clients_sampled": 10, "clients_failed": 1, "updates_rejected": 0,
    "epsilon": None, "virtual_seconds": 33.0,
}  # fmt: skip


@dataclass
class Result:
    status: str = "completed"
    reason: str = ""
    summary_path: Path = LONG


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


def show(stream: io.StringIO, *rows: dict[str, Any], result: Result | None = None) -> str:
    with open_console(stream) as console:
        console.begin("fedavg on mnist", 10, {"clients": 10, "seed": 0})
        for row in rows:
            console.round(row, 10)
        console.note("two clients are slow")
        console.end(result or Result())
    return stream.getvalue()


def bare(text: str) -> str:
    """What stays on the screen, a line for each time that the bar was wiped away."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.replace("\r\x1b[2K", "\n"))


def test_a_pipe_gets_one_line_a_round() -> None:
    lines = show(io.StringIO(), ROW, ROW | {"round": 10}).splitlines()
    assert lines[0] == "fedavg on mnist: 10 rounds, clients 10, seed 0"
    assert re.sub(" +", " ", lines[1]) == (
        "round 3/10 loss 0.4322 accuracy 0.9313 seconds 2.1 up 1.23 MB down 89.0 kB sampled/failed/rejected 10/1/0"
    )
    assert len(lines[1]) == len(lines[2])
    assert lines[3:] == ["two clients are slow", "completed", str(LONG)]


def test_a_pipe_gets_no_escape_sequences() -> None:
    assert "\x1b" not in show(io.StringIO(), ROW)


def test_a_terminal_gets_a_table_with_a_heading_once() -> None:
    text = bare(show(Terminal(), ROW, ROW | {"round": 4}))
    assert text.count("accuracy") == 1
    assert [line.split()[0] for line in text.splitlines() if re.match(r" +[34]/10", line)] == [
        "3/10",
        "4/10",
    ]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_the_last_line_is_the_whole_path_however_narrow_the_terminal(
    stream: type[io.StringIO],
) -> None:
    text = show(stream(), ROW)
    assert text.splitlines()[-1] == str(LONG)
    assert text.endswith(f"{LONG}\n")


def test_no_color_is_honoured_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    colour = re.compile(r"\x1b\[[0-9;]*3[0-7][;m]|\x1b\[38;")
    assert colour.search(show(Terminal(), ROW))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour.search(show(Terminal(), ROW))


def test_a_dumb_terminal_is_treated_like_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with open_console(Terminal()) as console:
        assert isinstance(console, PlainConsole)


def test_a_terminal_gets_its_cursor_back_when_a_run_breaks() -> None:
    stream = Terminal()

    def break_down() -> None:
        with open_console(stream) as console:
            console.begin("a run", 3, {})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_down()
    text = stream.getvalue()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") > 0


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_what_was_not_measured_is_a_dash_and_epsilon_shows_where_there_is_one(
    stream: type[io.StringIO],
) -> None:
    unknown = {"round": 1, "loss": None, "accuracy": None, "seconds": 0.5, "clients_sampled": 4}
    text = bare(show(stream(), unknown))
    assert "4/-/-" in text
    assert "nan" not in text.lower()
    assert "epsilon" not in text
    assert "1.250" in bare(show(stream(), ROW | {"epsilon": 1.25, "loss": None, "accuracy": None}))


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_run_that_did_not_complete_says_why(stream: type[io.StringIO]) -> None:
    text = bare(show(stream(), result=Result("stopped", "interrupted")))
    assert "stopped: interrupted" in text


def test_marks_of_the_table_in_a_text_are_text() -> None:
    stream = Terminal()
    with open_console(stream) as console:
        console.begin("[red]x[/red]", 1, {"task": "[bold]"})
        console.note("[/nonsense]")
        console.end(Result(reason="[x]", status="failed"))
    assert "[red]x[/red]" in bare(stream.getvalue())
    assert "[/nonsense]" in bare(stream.getvalue())


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9_994, "9.99 kB"), (9_999, "10.0 kB"),
        (99_960, "100 kB"), (999_499, "999 kB"), (999_600, "1.00 MB"), (123_456_789, "123 MB"), (5e15, "5.00 PB"),
    ],
)  # fmt: skip
def test_bytes_are_told_in_three_digits(count: float | None, text: str) -> None:
    assert human_bytes(count) == text


@given(st.integers(0, 10**17))
def test_bytes_told_are_right_to_half_a_percent(count: int) -> None:
    number, unit = human_bytes(count).split()
    factor = 1000 ** ["B", "kB", "MB", "GB", "TB", "PB"].index(unit)
    assert abs(float(number) * factor - count) <= 0.0051 * count
