"""`trellis superlink`: Flower's SuperLink for a network that others are on."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fl_app.cli.main import DONE, REFUSED

_HELP = """usage: trellis superlink [-h] OPTION …

Runs flower-superlink with the options given. It is the same program with one door more: other
machines reach what SuperNodes need, and nothing else. `flwr run` and `flwr supernode register`,
for which Flower asks nobody who they are, work on this machine, or through an SSH tunnel to it.

examples:
  trellis superlink --ssl-ca-certfile certs/ca.pem --ssl-certfile certs/server.pem \\
      --ssl-keyfile certs/server.key --enable-supernode-auth \\
      --host 0.0.0.0 --port 9092 --database superlink.db

`flower-superlink --help` lists the options; docs/deployment.md has the whole way.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the SuperLink until it is told to stop."""
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(_HELP, end="", file=sys.stdout if arguments else sys.stderr)
        return DONE if arguments else REFUSED
    from fl_app.flower import own_machine

    own_machine.main(arguments)
    return DONE
