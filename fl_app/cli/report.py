"""`trellis report`: the command line of `fl_app.report`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fl_app.cli.main import DONE, REFUSED, Parser
from fl_app.config.faults import ConfigError, Fault

if TYPE_CHECKING:
    from fl_app.report.tables import Table

_EXAMPLES = """examples:
  trellis report runs
      every completed run below runs/, grouped by what they differ in
  trellis report runs/compare --by strategy --baseline fedavg
      differences from FedAvg, over the same seeds and folds
  trellis report runs/compare --by strategy,task.alpha --baseline strategy=fedavg
      from FedAvg with the same alpha, and a heat map
  trellis report runs --metric loss --target 0.5 --output /tmp/report
      another figure of the summaries; rounds until it is at most 0.5

Keys are the configuration's, as in config.yaml of a run (task.alpha, client.lr, attack), strategy, task and seed.
Runs that failed, were stopped or can't be read are listed with the reason. The last line printed is the path of
index.html; beside it lie report.md, report.csv, runs.csv and the figures.

exit codes: 0 done; 2 there is nothing to report, or no run has what was asked for
"""


def main(arguments: Sequence[str]) -> int:
    """Writes a report and returns the exit code.

    Raises:
        ConfigError: there is nothing to report, no run has what was asked for, or the output can't be written.
    """
    parser = Parser(
        "trellis report",
        usage="trellis report [-h] DIR [--by KEY,…] [--metric NAME] [--baseline [KEY=]VALUE,…] [--target X] "
        "[--output DIR]",
        description="Compares the runs below a folder.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("directory", metavar="DIR", help="an output_dir of runs or sweeps")
    parser.add_argument(
        "--by", metavar="KEY,…", help="what makes a group (default: the keys that tell runs apart)"
    )
    parser.add_argument(
        "--metric",
        default="accuracy",
        metavar="NAME",
        help="the figure compared (default accuracy)",
    )
    parser.add_argument(
        "--baseline", metavar="[KEY=]VALUE,…", help="the group to compare with (default the first)"
    )
    parser.add_argument("--target", type=float, metavar="X", help="count the rounds to this value")
    parser.add_argument("--output", metavar="DIR", help="where to write (default DIR/report)")
    options = parser.read(arguments)
    if options.target is not None and not math.isfinite(options.target):
        raise ConfigError([Fault("--target", "must be a finite number", options.target)])

    from fl_app.report.analysis import analyse
    from fl_app.report.collect import collect
    from fl_app.report.tables import groups_table, left_out_table, notes
    from fl_app.report.write import write_report

    collection = collect(Path(options.directory))
    report = analyse(
        collection,
        by=_listed(options.by),
        metric=options.metric,
        baseline=_listed(options.baseline),
        target=options.target,
    )
    output = Path(options.output) if options.output else collection.root / "report"
    try:
        page = write_report(report, output)
    except OSError as error:
        raise ConfigError(
            [Fault("--output", f"can't be written ({error.strerror})", output)]
        ) from error
    _show(groups_table(report))
    print("\n".join(notes(report)))
    if report.collection.left_out:
        _show(left_out_table(report))
    print(page)
    return DONE if report.rows else REFUSED


def _listed(text: str | None) -> list[str]:
    return [item.strip() for item in (text or "").split(",") if item.strip()]


def _show(table: Table) -> None:
    """The table as Markdown, fitted to a terminal, whole in a pipe."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=box.MARKDOWN)
    for place, column in enumerate(table.columns):
        grid.add_column(Text(column), justify="left" if place < table.texts else "right")
    for row in table.rows:
        grid.add_row(*map(Text, row))
    terminal = sys.stdout.isatty()
    Console(file=sys.stdout, highlight=False, width=None if terminal else 1000).print(grid)
