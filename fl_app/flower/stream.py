"""What a run of Flower prints, and how a run is written on Flower's command line."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_CHATTER = re.compile(
    r"(DEBUG|INFO|WARNING) *:( |$)"  # Flower's logger; its errors are let through
    r"|\(\w+ pid=\d+[^)]*\) "  # what Ray's workers print
    r"|Successfully (started run|installed) "
    r"|Using SuperLink: "
    r"|\S+\.py:\d+: \w*Warning: "  # a Python warning, which the next pattern completes
    r"|  (warnings\.)?warn\("
)
_RUN_ID = re.compile(r"Successfully started run (\d+)")


def run_config(overrides: Sequence[str]) -> str:
    r"""Write overrides as the one ``key="value"`` pair that ``flwr run --run-config`` takes.

    Flower finds the pair by a pattern that ends a value at the next quotation mark, escaped or
    not, and then reads it as TOML. So everything that may not stand there, quotation marks too,
    is written as ``\uXXXX``, which TOML turns back.

    Args:
        overrides: Hydra overrides, one each; any characters that UTF-8 can hold.

    Returns:
        ``overrides="…"``; :func:`shlex.split` of the value that the app receives gives
        ``overrides`` back.
    """
    text = shlex.join(overrides)
    escaped = (
        f"\\u{ord(sign):04X}" if sign in '"\\' or ord(sign) < 0x20 or sign == "\x7f" else sign
        for sign in text
    )
    return f'overrides="{"".join(escaped)}"'


def run_command(overrides: Sequence[str], num_supernodes: int | None) -> list[str]:
    """The ``flwr run`` command line for the app in the working directory.

    Args:
        overrides: Hydra overrides, one each.
        num_supernodes: number of simulated SuperNodes, each with one CPU at a time; ``None``
            leaves both to Flower (or to the deployment).
    """
    command = ["flwr", "run", ".", "--stream"]
    if overrides:
        command += ["--run-config", run_config(overrides)]
    if num_supernodes is not None:
        nodes = f"num-supernodes={num_supernodes} client-resources-num-cpus=1"
        command += ["--federation-config", nodes]
    return command


class Transcript:
    """Passes a run's own lines on, and keeps what tells how the run ended.

    Args:
        echo: receives each line that the app printed, without its line end.

    Attributes:
        run_id: Flower's id of the run, once it was started.
        summary: path of the run's summary.json, which the app prints last; ``None`` until then.
    """

    def __init__(self, echo: Callable[[str], None]) -> None:
        self._echo = echo
        self.run_id: str | None = None
        self.summary: Path | None = None

    def take(self, line: str) -> None:
        """Take the next line of what ``flwr run --stream`` prints."""
        line = _ANSI.sub("", line).rstrip()
        if started := _RUN_ID.match(line):
            self.run_id = started.group(1)
        if _CHATTER.match(line):
            return
        if line.startswith("/") and line.endswith("/summary.json"):
            self.summary = Path(line)
        self._echo(line)

    def exit_code(self) -> int | None:
        """Exit code by the run's own summary.json; ``None`` where there is none to be read.

        0 completed; 3 stopped by a guard; 1 failed, or stopped by the user.
        """
        if self.summary is None or not self.summary.is_file():
            return None
        summary = json.loads(self.summary.read_text(encoding="utf-8"))
        if summary["status"] == "completed":
            return 0
        by_guard = summary["status"] == "stopped" and summary["reason"] != "interrupted"
        return 3 if by_guard else 1
