"""``python -m fl_app.flower``: one run on Flower, from SuperLink to summary.

What `make run` and `make demo-deployment` call. `trellis run backend=flower` does the same from
the command line of the project.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from fl_app.flower.bundle import BUNDLE
from fl_app.flower.certificates import make_missing
from fl_app.flower.deployment import Deployment
from fl_app.flower.link import SuperLink
from fl_app.flower.processes import FlowerError
from fl_app.flower.stream import run_command


def main(arguments: Sequence[str]) -> int:
    """Run the app of this checkout on Flower.

    Args:
        arguments: command line without the program's name.

    Returns:
        0 completed; 1 failed, stopped by the user, or Flower did not start; 3 stopped by a guard.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fl_app.flower", description="Run the app on Flower and end Flower with it."
    )
    parser.add_argument("--supernodes", type=int, default=10, help="how many (default: 10)")
    parser.add_argument(
        "--deployment",
        action="store_true",
        help="a flower-superlink and real flower-supernode processes instead of the simulation",
    )
    parser.add_argument(
        "--secure",
        action="store_true",
        help="with --deployment: TLS and node authentication, by keys that are made for this run",
    )
    parser.add_argument("overrides", nargs="*", help="such as strategy=fedadam rounds=5")
    chosen = parser.parse_args(arguments)
    if chosen.secure and not chosen.deployment:
        parser.error("--secure is for --deployment: a simulation has no connections to secure")

    simulated = None if chosen.deployment else chosen.supernodes
    try:
        with ExitStack() as stack:
            link = stack.enter_context(
                _deployment(chosen.supernodes, chosen.secure, stack)
                if chosen.deployment
                else SuperLink(BUNDLE, simulation=True)
            )
            _print(f"$ {shlex.join(run_command(chosen.overrides, simulated))}")
            return link.run(chosen.overrides, echo=_print, num_supernodes=simulated)
    except FlowerError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 1


def _deployment(supernodes: int, secure: bool, stack: ExitStack) -> Deployment:
    if not secure:
        return Deployment(BUNDLE, num_supernodes=supernodes)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trellis-certificates-")))
    make_missing(folder, [], [f"node-{number}" for number in range(supernodes)])
    return Deployment(BUNDLE, num_supernodes=supernodes, certificates=folder)


def _print(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
