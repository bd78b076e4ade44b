"""`trellis list`: the choices of each group of conf/, each with its own one line."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

from fl_app.cli.main import Parser
from fl_app.cli.own_choices import add_choices
from fl_app.config import catalogue
from fl_app.config.faults import nearest

_EXAMPLES = """examples:
  trellis list               every group
  trellis list strategies    one of them
  trellis list tasks models

A choice is taken with group=choice: trellis run strategy=fedadam model=mlp
"""


def main(arguments: Sequence[str]) -> int:
    """Prints the groups that are named, or all of them."""
    parser = Parser(
        "trellis list",
        description="Shows what there is to choose from; (default) marks what a run takes unasked.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "groups", nargs="*", metavar="GROUP", help="a group, in the singular or the plural"
    )
    parser.add_argument(
        "--config-dir", metavar="DIR", help="a folder with choices of your own, listed too"
    )
    options = parser.read(arguments)
    add_choices(options.config_dir)
    known = catalogue.groups()
    chosen = []
    for word in options.groups:
        group = _group(word, known)
        if group is None:
            guess = nearest(word, [*known, *map(_plural, known)])
            hint = f"; did you mean {guess}?" if guess else ""
            parser.error(f"unknown group {word}{hint} (groups: {', '.join(known)})")
        chosen.append(group)
    print("\n\n".join(_section(group) for group in chosen or known))
    return 0


def _plural(group: str) -> str:
    return f"{group[:-1]}ies" if group.endswith("y") else f"{group}s"


def _group(word: str, known: Sequence[str]) -> str | None:
    return next((group for group in known if word in (group, _plural(group))), None)


def _section(group: str) -> str:
    default = catalogue.defaults().get(group)
    choices = catalogue.choices(group)
    width = max(len(choice.name) for choice in choices)
    rows = []
    for choice in choices:
        text = choice.description + (" (default)" if choice.name == default else "")
        # A pipe gets a line for each choice, so that it can be searched.
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6
        lines = textwrap.wrap(text, max(columns - width - 4, 24)) or [""]
        rows += [
            f"  {choice.name:<{width}}  {lines[0]}",
            *(f"{'':<{width + 4}}{line}" for line in lines[1:]),
        ]
    return "\n".join([f"{group}=", *rows])
