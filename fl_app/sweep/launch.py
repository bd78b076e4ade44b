"""Jobs in processes of their own, some at a time, each ended with all that it started.

Every job is a fork of the process that has composed and checked them all: what that has imported and loaded is there
at once and its pages are shared, so importing is paid for once a sweep, and a job leaves nothing behind in the next.
(Where forks are not safe, off Linux, a job is spawned, and imports for itself.)

joblib and `concurrent.futures` are not used, since a process that dies breaks their whole pool: every job under way
fails with it, and none is named as the cause. Here one process is one job, so that its death is that job's ending.
The processes are not daemonic, or the engine's workers could not be their children.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, Literal

from fl_app.config.faults import ConfigError
from fl_app.engine.worker import interrupts_held
from fl_app.run import INTERRUPTED
from fl_app.sweep.plan import Job

Status = Literal["completed", "failed", "stopped"]
Work = Callable[[Job], tuple[Status, str]]
"""Runs a job in the process that calls it; how it ended, and why where it did not complete. Importable by its name."""

LOG: Final = "output.log"
"""In a job's folder: what it would have printed."""

_LOOK: Final = 1.0
"""Seconds between looks at whether silent jobs live."""
_PATIENCE: Final = 30.0
"""Seconds that a job has to write down where it was stopped."""
_LONGEST: Final = 4000
"""Characters of a reason; it must fit into a pipe that nobody reads before the job has ended."""
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True)
class Ending:
    """How a job ended.

    Attributes:
        status: as in a summary.
        reason: why, where it did not complete.
        seconds: that its process took, None where there was none.
    """

    status: Status
    reason: str
    seconds: float | None


class Launcher:
    """Runs jobs.

    Args:
        work: what a job is.
        at_once: how many run at a time, at least 1.
        started: told of each job before it starts.
        ended: told of each job that has ended.
    """

    def __init__(
        self,
        work: Work,
        at_once: int,
        *,
        started: Callable[[Job], None],
        ended: Callable[[Job, Ending], None],
    ) -> None:
        self._work, self._at_once = work, at_once
        self._started, self._ended = started, ended
        self._running: list[_Process] = []

    def run(self, jobs: Iterable[Job]) -> None:
        """Runs them all in order, each taken from the iterable when it can start.

        When it returns or raises, none of their processes is left.

        Raises:
            KeyboardInterrupt: the user stopped it; the jobs under way have been told so, and were given the time to
                write down how far they are.
        """
        todo, more = iter(jobs), True
        try:
            while more or self._running:
                while more and len(self._running) < self._at_once:
                    job = next(todo, None)
                    if job is None:
                        more = False
                        break
                    self._started(job)
                    with interrupts_held():  # so that none starts that this list does not know
                        self._running.append(_Process(job, self._work))
                self._settle()
        except BaseException:
            self._stop()
            raise

    def _settle(self) -> None:
        """Waits until something has happened, and lets go of the jobs that have ended."""
        if self._running:
            wait([process.sentinel for process in self._running], timeout=_LOOK)
        for process in [process for process in self._running if process.over]:
            with interrupts_held():
                self._running.remove(process)
                ending = process.end()
            self._ended(process.job, ending)

    def _stop(self) -> None:
        """Interrupts what runs, waits for it, and kills what has not ended in time."""
        try:
            for process in self._running:
                process.interrupt()
            deadline = time.monotonic() + _PATIENCE
            while self._running and time.monotonic() < deadline:
                self._settle()
        finally:
            with interrupts_held():
                for process in self._running:
                    process.end()


class _Process:
    """The parent's handle on a job's process, which is started at once, with interrupts held back.

    Args:
        job: what it runs.
        work: how.
    """

    def __init__(self, job: Job, work: Work) -> None:
        self.job = job
        self._began = time.monotonic()
        self._reaped = False
        method = "fork" if sys.platform == "linux" else "spawn"
        context: Any = multiprocessing.get_context(method)
        self._report, theirs = context.Pipe(duplex=False)
        self._process: BaseProcess = context.Process(
            target=_live, args=(job, work, theirs), name=f"job {job.number}", daemon=False
        )
        with theirs:
            self._process.start()

    @property
    def sentinel(self) -> int:
        """Readable when the process, and those that it forked, have ended."""
        return self._process.sentinel

    @property
    def over(self) -> bool:
        """Whether the process has ended; its id stays taken until `end`."""
        assert self._process.pid is not None
        try:
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except (
            ChildProcessError
        ):  # multiprocessing reaps what it finds ended when it starts another
            self._reaped = True
        return self._reaped or ended is not None

    def interrupt(self) -> None:
        """Asks it to stop, as Ctrl-C would."""
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGINT)

    def end(self) -> Ending:
        """How it ended; what is left of it and of the processes that it started is killed."""
        assert self._process.pid is not None
        if not self.over:
            self._process.kill()  # it may not lead a group of its own yet
        if not self._reaped:  # or its id could be another's by now
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()
        code = self._process.exitcode
        self._process.close()
        seconds = time.monotonic() - self._began
        with self._report, contextlib.suppress(EOFError, OSError):
            if self._report.poll():
                told = json.loads(self._report.recv_bytes())
                return Ending(told["status"], told["reason"], seconds)
        return Ending("failed", _how(code), seconds)


def _how(code: int | None) -> str:
    """The ending of a process that left no word."""
    if code is None or code >= 0:
        return f"its process ended with exit code {code}"
    hint = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
    return f"its process was killed by signal {-code} ({signal.strsignal(-code)}){hint}"


def _live(job: Job, work: Work, report: Connection) -> None:
    """A job's process."""
    # A group of its own: Ctrl-C at the terminal is for the sweep, which passes it on once; and all of it can be killed.
    os.setsid()
    _stop_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        status, reason = _redirected(job, work)
    except KeyboardInterrupt:
        status, reason = "stopped", INTERRUPTED
    report.send_bytes(json.dumps({"status": status, "reason": reason[:_LONGEST]}).encode())


def _redirected(job: Job, work: Work) -> tuple[Status, str]:
    """Does the work, with all that it prints in a file."""
    log: Path = job.config.run_dir / LOG
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        out = log.open("a", encoding="utf-8", errors="replace", buffering=1)
    except OSError as error:
        return "failed", f"its folder can't be written ({error.strerror})"
    for descriptor in (1, 2):
        os.dup2(out.fileno(), descriptor)
    sys.stdout = sys.stderr = out
    try:
        return work(job)
    except ConfigError as error:
        print(error)
        return "failed", "; ".join(f"{fault.place}: {fault.message}" for fault in error.faults)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever it is, it is the end of this job alone
        traceback.print_exc()
        return "failed", f"{type(error).__name__}: {error}"


def _stop_with_parent() -> None:
    """Has the kernel interrupt this process when the sweep's is gone, however that happens (on Linux).

    A thread that waits for it would do so anywhere, but a process with threads should not be forked, as the engine
    forks this one.
    """
    if sys.platform != "linux":
        return
    parent = multiprocessing.parent_process()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
    if parent is not None and os.getppid() != parent.pid:  # it went before the kernel was asked
        os.kill(os.getpid(), signal.SIGINT)
