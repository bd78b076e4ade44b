"""`trellis doctor`: looks a node over before it joins a federation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fl_app.cli.main import DONE, FAILED, REFUSED, Parser
from fl_app.cli.own_choices import add_choices, find_own_classes

_EXAMPLES = """examples:
  trellis doctor
      the machine alone: versions, disks, memory for the default run, leftovers
  trellis doctor --superlink fl.example.org:9092 --ca ca.pem --key nodes/hospital-a \\
      --node-config 'partition-id=3 num-partitions=10' task=csv task.path=/data/patients.csv task.target=outcome
      a node as it will be started: with the options of flower-supernode, and the run's overrides
  trellis doctor --superlink 10.0.0.5:9092 --json
      for programs: {"go": …, "checks": [{"name", "state", "said", "mend"}, …]}

It sends the SuperLink one question for its health, and registers nothing.

exit codes: 0 go, warnings or not; 1 no-go, or stopped by hand; 2 the command or the configuration can't be read
"""


def main(arguments: Sequence[str]) -> int:
    """Checks one node and returns the exit code.

    Raises:
        ConfigError: the overrides make no configuration.
    """
    options = _parser().read(arguments)
    add_choices(options.config_dir)
    find_own_classes()
    from fl_app.compose import compose

    config = compose(options.overrides)
    from clients.threads import one_thread
    from fl_app.checks.check import conduct, passed
    from fl_app.checks.device import NodeConfigError, parsed
    from fl_app.checks.doctor import Patient, examination
    from fl_app.checks.link import AddressError, Link
    from fl_app.checks.show import Report

    try:
        patient = Patient(
            config,
            None if options.node_config is None else parsed(options.node_config),
            None if options.superlink is None else Link(options.superlink, options.ca),
            options.ca,
            options.key,
            options.port,
        )
    except (AddressError, NodeConfigError) as error:
        print(f"trellis doctor: {error}", file=sys.stderr)
        return REFUSED
    with one_thread(), examination(patient) as checks:  # one: a process is forked from this one
        names = [check.name for check in checks]
        report = Report("doctor", names, sys.stdout, as_json=options.json)
        checked = conduct(checks, report.tell)
        report.end(checked)
    return DONE if passed(checked) else FAILED


def _parser() -> Parser:
    parser = Parser(
        "trellis doctor",
        usage="trellis doctor [-h] [--superlink HOST:PORT] [--ca FILE] [--key FILE] [--node-config 'K=V …']\n"
        "                      [--port N] [--json] [--config-dir DIR] [KEY=VALUE …]",
        description="Looks a node over: versions, processors, disks, certificates, the way to the SuperLink, clocks,"
        "\nnode config, data, a training step, memory.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="of the run that it will take part in"
    )
    parser.add_argument("--superlink", metavar="HOST:PORT", help="of its Fleet API")
    parser.add_argument(
        "--ca", type=Path, metavar="FILE", help="flower-supernode's --root-certificates"
    )
    parser.add_argument(
        "--key", type=Path, metavar="FILE", help="flower-supernode's --auth-supernode-private-key"
    )
    parser.add_argument(
        "--node-config",
        metavar="'K=V …'",
        help="flower-supernode's: pairs, or a file that ends in .toml",
    )
    parser.add_argument(
        "--port", type=int, default=9094, metavar="N", help="of the SuperNode (9094)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--config-dir", metavar="DIR", help="as of `trellis run`")
    return parser
