"""Text that came from files, made fit for a line. What it may mean to Markdown, HTML or a spreadsheet is theirs."""

from __future__ import annotations

from typing import Any

from fl_app.config.faults import shown

_LONGEST = 300


def said(value: Any) -> str:
    """A value of a configuration in a few printable letters, `none` where there is none."""
    return "none" if value is None else one_line(shown(value))


def one_line(text: str) -> str:
    """The text on one line, what can't be printed written out, cut after 300 characters."""
    flat = " ".join(text.split())
    clean = "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in flat
    )
    return clean if len(clean) <= _LONGEST else f"{clean[:_LONGEST]}…"
