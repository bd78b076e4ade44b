"""A SuperNode that ends when it has lost its SuperLink, so that whoever looks after it starts it again.

Flower's SuperNode waits out a SuperLink that is away. But an answer that it has not foreseen, such as one HTTP 500 from
a SuperLink whose database was busy, ends its loop and not its process: the server of its own ClientApps runs on in a
thread, and the node looks alive for ever without being asked anything. Here the process ends with the loop, with exit
code 1, which is what systemd and the like look at.

``python -m fl_app.flower.own_node ARGUMENTS`` is ``flower-supernode ARGUMENTS`` with that end.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str]) -> NoReturn:
    """Run ``flower-supernode`` until it is told to stop or has lost its SuperLink.

    Args:
        arguments: of ``flower-supernode``.
    """
    from flwr.supercore.exit import ExitCode, flwr_exit
    from flwr.supernode.cli import flower_supernode

    sys.argv = ["flower-supernode", *arguments]
    flower_supernode()
    flwr_exit(  # it runs the handlers that end the server, and forces the exit after some seconds
        ExitCode.SUPERNODE_CONNECTION_ERROR,
        "The SuperLink gave an answer that ended the connection; the line before says which.",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
