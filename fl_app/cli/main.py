"""`trellis`: finds the command, and turns what went wrong into an exit code and a line that helps.

Nothing heavy is imported before a command needs it, so that help and lists come at once.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from fl_app.config.faults import ConfigError, nearest

DONE, FAILED, REFUSED, GUARDED = 0, 1, 2, 3
"""Exit codes: done; failed, or stopped by hand; configuration, contract or command wrong; stopped by a guard."""

_COMMANDS = {
    "run": "run one federated training",
    "report": "compare the runs below a folder: table, curves, paired intervals",
    "preflight": "go or no-go before a run: data, model, memory, disk, privacy, time",
    "doctor": "look a node over: versions, certificates, clock, link, data, memory, disk",
    "list": "what there is to choose from: strategies, tasks, models, …",
    "privacy-audit": "attack a run, and hold what it leaks against what it promises",
    "keys": "make identity keys and rosters for secure aggregation",
    "serve-encrypted": "serve a trained model's predictions on encrypted inputs, without any key",
    "predict-encrypted": "encrypt data, have them predicted by such a service, decrypt the answers",
    "certs": "make and renew the keys and certificates of a deployment",
    "deploy": "a secured SuperLink and SuperNodes on this machine: up, run, status, down",
    "supernode": "Flower's SuperNode, which ends when it has lost its SuperLink",
    "superlink": "Flower's SuperLink, which takes commands from its own machine only",
    "make-base-model": "train a small language model from nothing, as a base for adapters",
}

_EPILOG = """commands:
{commands}

examples:
  trellis run
  trellis run strategy=fedadam task.partition=iid num_clients=50 rounds=20 seed=3
  trellis run -m strategy=fedavg,fedprox seed=1,2,3 output_dir=runs/compare
  trellis report runs/compare
  trellis list strategies

`trellis COMMAND --help` says more.
"""


class Parser(argparse.ArgumentParser):
    """Help as it is written, no abbreviations."""

    def __init__(self, prog: str, **keywords: str) -> None:
        super().__init__(
            prog=prog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **keywords,  # type: ignore[arg-type]
        )

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Positionals and options in any order; ends the process with code 2 for what it doesn't know."""
        found, rest = self.parse_known_intermixed_args(arguments)
        for word in rest:
            bare = word.lstrip("-")
            hint = f"; values are written without dashes: {bare}" if "=" in bare else ""
            self.error(f"unknown option {word}{hint}")
        return found


def _installed_version() -> str:
    try:
        return version("trellis-fl")
    except PackageNotFoundError:
        return "(not installed: run from its sources)"


def _parser() -> Parser:
    commands = "\n".join(f"  {name:<17} {what}" for name, what in _COMMANDS.items())
    parser = Parser(
        "trellis",
        usage="trellis [-h] [--version] COMMAND …",
        description="Federated learning on Flower: pipelines composed by configuration, refused when unsound.",
        epilog=_EPILOG.format(commands=commands),
    )
    parser.add_argument("--version", action="version", version=f"trellis {_installed_version()}")
    return parser


def _dispatch(arguments: Sequence[str]) -> int:
    parser = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return REFUSED
    if arguments[0].startswith("-"):
        parser.read(arguments[:1])
        return DONE
    command, *rest = arguments
    if command not in _COMMANDS:
        guess = nearest(command, _COMMANDS)
        meant = f"; did you mean trellis {guess}?" if guess else ""
        if not guess and "=" in command:
            meant = f"; did you mean trellis run {command}?"
        parser.error(f"unknown command {command}{meant} (commands: {', '.join(_COMMANDS)})")
    code: int = importlib.import_module(f"fl_app.cli.{command.replace('-', '_')}").main(rest)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: those of the process by default.

    Returns:
        The exit code: 0 done, 1 the run failed or was stopped by hand, 2 configuration, contract or command wrong,
        3 stopped by a guard.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="replace"
            )  # a terminal without letters for ≥ or ü shall still show the rest
    try:
        return _dispatch(sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        # Whoever read our output has gone (`trellis list | head`); the interpreter must not try to flush it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE


def _script() -> NoReturn:
    sys.exit(main())


if __name__ == "__main__":
    _script()
