"""How checks are shown: a table on a terminal, plain lines elsewhere, JSON for programs.

A line comes as soon as its check is over: some take seconds. The last line says go or no-go, and the exit code says the
same.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import TextIO

from fl_app.checks.check import Checked, State, passed

_STYLES: dict[State, str] = {
    "ok": "green",
    "warning": "yellow",
    "failed": "bold red",
    "skipped": "dim",
}
_WIDEST = 8
"""Letters of the longest state."""


class Report:
    """Shows findings on a stream as they come.

    Args:
        title: what is checked.
        names: of all checks that will be told of, for the width of their column.
        stream: where to.
        as_json: nothing but one JSON object, at the end.
    """

    def __init__(
        self, title: str, names: Sequence[str], stream: TextIO, *, as_json: bool = False
    ) -> None:
        self._title, self._out, self._json = title, stream, as_json
        self._width = max(map(len, names), default=0)
        plain = not stream.isatty() or os.environ.get("TERM") in ("dumb", "unknown")
        self._rich = None if plain or as_json else _rich_console(stream)
        if not as_json:
            self._line(title)

    def tell(self, checked: Checked) -> None:
        """Shows one finding."""
        if self._json:
            return
        finding = checked.finding
        head = f"{finding.state:<{_WIDEST}}  {checked.name:<{self._width}}  "
        if self._rich is None:
            margin = "\n" + " " * len(head)
            self._line(head + finding.said.replace("\n", margin))
            if finding.mend:
                self._line(margin[1:] + f"→ {finding.mend}")
            return
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=_WIDEST)
        table.add_column(width=self._width)
        table.add_column(ratio=1)
        state = Text(finding.state, style=_STYLES[finding.state])
        table.add_row(state, Text(checked.name, style="bold"), Text(finding.said))
        if finding.mend:
            table.add_row("", "", Text(f"→ {finding.mend}", style=_STYLES[finding.state]))
        self._rich.print(table)

    def end(self, checked: Sequence[Checked]) -> None:
        """Says what it all comes to."""
        if self._json:
            json.dump(document(self._title, checked), self._out, indent=2, ensure_ascii=False)
            self._out.write("\n")
            self._out.flush()
            return
        counts = Counter(one.finding.state for one in checked)
        told = ", ".join(f"{counts[state]} {state}" for state in _STYLES if counts[state])
        verdict = "go" if passed(checked) else "no-go"
        if self._rich is None:
            self._line(f"{verdict}: {told}")
            return
        style = "bold green" if passed(checked) else "bold red"
        self._rich.print(f"{verdict}: {told}", style=style)

    def _line(self, text: str) -> None:
        if self._rich is not None:
            self._rich.print(text, style="bold")
            return
        self._out.write(text + "\n")
        self._out.flush()


def document(title: str, checked: Sequence[Checked]) -> dict[str, object]:
    """What `--json` prints: `title`, `go`, and of each check its `name`, `state`, `said` and `mend`."""
    checks = [
        {
            "name": one.name,
            "state": one.finding.state,
            "said": one.finding.said,
            "mend": one.finding.mend,
        }
        for one in checked
    ]
    return {"title": title, "go": passed(checked), "checks": checks}


def _rich_console(stream: TextIO):  # type: ignore[no-untyped-def]  # rich is imported where there is a terminal only
    from rich.console import Console

    return Console(file=stream, highlight=False)
