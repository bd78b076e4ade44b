"""What the benchmarks share: where figures go, the versions that each prints, and a command's seconds and memory."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"


def versions() -> str:
    """One line that says what ran and on what."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "flwr", "numpy"))
    return f"Python {platform.python_version()}, {packages}, {os.cpu_count()} cores;"


@dataclass(frozen=True)
class Measured:
    """A command that has ended.

    Attributes:
        output: its standard output, by lines.
        seconds: from its start to its end.
        peak_bytes: the most that its processes held at once, as proportional set size: a page that several share
            counts once.
    """

    output: list[str]
    seconds: float
    peak_bytes: int


def measured(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Measured:
    """Runs a command to its end.

    Raises:
        RuntimeError: it failed; the message holds what it wrote last.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    peak = _Peak(process.pid)
    peak.start()
    output, errors = process.communicate()
    seconds = time.monotonic() - began
    peak.done.set()
    peak.join()
    if process.returncode:
        raise RuntimeError(f"{command[0]} ended with {process.returncode}: {errors[-2_000:]}")
    return Measured(output.splitlines(), seconds, peak.bytes)


def trellis(folder: Path, *overrides: str) -> tuple[dict[str, Any], Measured]:
    """One `trellis run` in a process of its own: its summary, and what the command took."""
    command = [sys.executable, "-m", "fl_app.cli", "run", f"output_dir={folder}", *overrides]
    path = os.pathsep.join([str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")])
    done = measured(command, {"PYTHONPATH": path})
    summary: dict[str, Any] = json.loads(Path(done.output[-1]).read_text())
    return summary, done


class _Peak(threading.Thread):
    """Looks at the memory of a process and all below it, five times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self.bytes = 0
        self.done = threading.Event()

    def run(self) -> None:
        """Samples until `done` is set."""
        while not self.done.wait(0.2):
            with suppress(psutil.Error):
                tree = [self._root, *self._root.children(recursive=True)]
                self.bytes = max(self.bytes, sum(map(_proportional, tree)))


def _proportional(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        held: int = process.memory_full_info().pss
        return held
    return 0
