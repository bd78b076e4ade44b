"""`trellis preflight`: go or no-go before an expensive run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fl_app.cli.main import DONE, FAILED, Parser
from fl_app.cli.own_choices import add_choices, find_own_classes

_EXAMPLES = """examples:
  trellis preflight strategy=secure num_clients=50 rounds=200
      with the very overrides of `trellis run`
  trellis preflight experiment=docstrings rounds=100 && trellis run experiment=docstrings rounds=100
      a run that begins only on a go
  trellis preflight task=csv task.path=patients.csv task.target=outcome --json
      for programs: {"go": …, "checks": [{"name", "state", "said", "mend"}, …]}

It trains a few steps and writes nothing into the run's folder.

exit codes: 0 go, warnings or not; 1 no-go, or stopped by hand; 2 the command or the configuration can't be read
"""


def main(arguments: Sequence[str]) -> int:
    """Checks one run and returns the exit code.

    Raises:
        ConfigError: the overrides make no configuration.
    """
    parser = Parser(
        "trellis preflight",
        usage="trellis preflight [-h] [--json] [--config-dir DIR] [KEY=VALUE …]",
        description="Looks at everything that could spoil a run, before it begins: configuration, contract, data,"
        " model,\na few steps of training, memory, disk, privacy, time.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="those of `trellis run`, in Hydra's syntax",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--config-dir", metavar="DIR", help="as of `trellis run`")
    options = parser.read(arguments)
    add_choices(options.config_dir)
    find_own_classes()
    from fl_app.compose import compose

    config = compose(options.overrides)
    from clients.threads import one_thread
    from fl_app.checks.check import conduct, passed
    from fl_app.checks.preflight import prepared
    from fl_app.checks.show import Report

    with one_thread(), prepared(config) as checks:  # one: processes are forked from this one
        title = f"preflight of {config.folder_name}"
        report = Report(title, [check.name for check in checks], sys.stdout, as_json=options.json)
        checked = conduct(checks, report.tell)
        report.end(checked)
    return DONE if passed(checked) else FAILED
