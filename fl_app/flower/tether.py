"""A process that keeps another one, and everything that one starts, on a tether.

``python tether.py GRACE PROGRAM ARGUMENT …`` starts PROGRAM and holds it until standard input closes,
SIGTERM arrives or PROGRAM ends by itself; then it ends PROGRAM and all of its descendants, and
only those, by their process ids. The caller keeps the write end of the pipe, so the operating
system lets go of the tether for it however the caller ends: by itself, by Ctrl-C or by SIGKILL.

Why this is needed: Flower's SuperLink starts a SuperExec in a session of its own, which starts the
ServerApp, which starts Ray's servers and workers, each in a process group of its own. No signal to
one group or session reaches all of them, and a SuperLink outlives the command that started it.

The file runs as a script and imports nothing of Trellis, so that a tether starts at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import psutil

LOOK_EVERY = 0.5  # seconds between two looks at the process table
GRACE = 8.0  # Flower forces an exit that hangs after 5 s
PATIENCE = 2.0  # seconds from SIGTERM to SIGKILL for what is still there after the grace


class Family:
    """A process and every descendant of it that was ever seen.

    Descendants are remembered because a process whose parent has died can no longer be found by
    walking down from the root. ``psutil.Process`` compares process ids together with start times,
    so an id that the system has given to a stranger since is never taken for one of the family.

    Args:
        root: the first member, a child of this process that was just started.
    """

    def __init__(self, root: subprocess.Popen[bytes]) -> None:
        self._root = root
        self._members: set[psutil.Process] = {psutil.Process(root.pid)}

    def look(self) -> None:
        """Add the children, grandchildren, … that the known members have now."""
        parents: dict[int, list[psutil.Process]] = {}
        for process in psutil.process_iter():
            try:
                parents.setdefault(process.ppid(), []).append(process)
            except psutil.Error:
                continue  # ended between the listing and the question
        pending = list(self.alive())
        while pending:
            for child in parents.get(pending.pop().pid, ()):
                if child not in self._members:
                    self._members.add(child)
                    pending.append(child)

    def alive(self) -> list[psutil.Process]:
        """Members that still run; a zombie has ended and only waits to be collected."""
        return [member for member in self._members if _runs(member)]

    def end(self, grace: float = GRACE, patience: float = PATIENCE) -> None:
        """End all members: ask the root, wait, ask the rest, wait, kill.

        The root is asked alone first, because each of Flower's programs ends its own children in
        order when it is told to stop (a ServerApp saves its state and uploads its last log lines).

        Args:
            grace: seconds the family has to end after the root was asked, where it still runs.
            patience: seconds that the remaining members have after each of them was asked.
        """
        self.look()
        if self._root.poll() is None:
            self._root.terminate()
            self._wait(grace)
        for member in self.alive():
            _signal(member, signal.SIGTERM)
        self._wait(patience)
        for member in self.alive():
            _signal(member, signal.SIGKILL)
        self._wait(patience)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.05)
            # Flower's programs watch their parents' ids, and an uncollected zombie keeps its id.
            self._root.poll()
            self.look()


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.Error:
        return  # it has ended meanwhile, which is what was wanted


def hold(command: Sequence[str], release: threading.Event, grace: float = GRACE) -> int:
    """Run a command until it ends or is released, then end its whole family.

    Args:
        command: program and arguments.
        release: set by the caller when the command is to end.
        grace: seconds that the command then has to end in order.

    Returns:
        The command's exit code, negative for the signal that ended it.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    family = Family(process)
    while process.poll() is None and not release.wait(LOOK_EVERY):
        family.look()
    family.end(grace)
    return process.wait()


def main(grace: float, command: Sequence[str]) -> int:
    """Hold ``command`` until standard input closes or SIGTERM arrives."""
    release = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, which then lets go
    # Not set by the handler itself: it may interrupt the very wait that holds the event's lock.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=release.set).start())

    def watch() -> None:
        while os.read(0, 4096):  # nothing is ever written; it returns b"" when the pipe closes
            continue
        release.set()

    threading.Thread(target=watch, daemon=True).start()
    return hold(command, release, grace)


if __name__ == "__main__":
    raise SystemExit(abs(main(float(sys.argv[1]), sys.argv[2:])))
