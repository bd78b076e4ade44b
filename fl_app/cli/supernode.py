"""`trellis supernode`: Flower's SuperNode for a machine that nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fl_app.cli.main import DONE, REFUSED

_HELP = """usage: trellis supernode [-h] OPTION …

Runs flower-supernode with the options given. It is the same program, but ends with exit code 1
once it has lost its SuperLink for good, where Flower's lives on without being asked anything: so
a service manager starts it again.

examples:
  trellis supernode --superlink fl.example.org:9092 --root-certificates ca.pem \\
      --auth-supernode-private-key nodes/hospital-a --node-config 'partition-id=0 num-partitions=3'

`flower-supernode --help` lists the options; docs/deployment.md has the whole way.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the SuperNode until it is told to stop."""
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(_HELP, end="", file=sys.stdout if arguments else sys.stderr)
        return DONE if arguments else REFUSED
    from fl_app.flower import own_node

    own_node.main(arguments)
