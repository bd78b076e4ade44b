"""Work that may fail, hang or be killed for want of memory, tried in a process of its own.

The child is forked from the process that has read the data, and takes one thread, as the engine's workers do
(`clients.threads` says why); it answers with plain JSON. It ignores Ctrl-C, which is the parent's, and is killed by the
parent when that goes on without it, by the kernel when the parent is gone. What is tried is not known here.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import psutil
import torch

_PR_SET_PDEATHSIG: Final = 1


class TrialError(RuntimeError):
    """What was tried failed, or its process was killed; the message says how.

    Attributes:
        memory: whether memory was what it lacked.
    """

    def __init__(self, said: str, *, memory: bool = False) -> None:
        super().__init__(said)
        self.memory = memory


def tried(work: Callable[[], dict[str, Any]], *, seconds: float) -> dict[str, Any]:
    """What `work` gives, in a process of its own.

    Args:
        work: gives plain JSON; where processes are spawned, not forked, it must be importable.
        seconds: that it may take.

    Raises:
        TrialError: it raised, was killed, or took too long.
    """
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(work, theirs, os.getpid()), daemon=True)
    try:
        child.start()
        theirs.close()
        answer = _answer(ours, child, seconds)
    finally:
        if child.pid is not None:
            child.kill()
            child.join()
            child.close()
        ours.close()
    if "error" in answer:
        raise TrialError(answer["error"], memory=answer["memory"])
    found: dict[str, Any] = answer["found"]
    return found


def _answer(pipe: Connection, child: Any, seconds: float) -> dict[str, Any]:
    if not pipe.poll(seconds):
        raise TrialError(f"it took longer than {seconds:.0f} s")
    try:
        answer: dict[str, Any] = json.loads(pipe.recv_bytes())
    except EOFError:
        child.join()
        code = child.exitcode
        if code == -signal.SIGKILL:
            said = "its process was killed, as the kernel does where memory is out"
            raise TrialError(said, memory=True) from None
        raise TrialError(f"its process died with exit code {code}") from None
    return answer


def _work(work: Callable[[], dict[str, Any]], pipe: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with suppress(OSError):  # of two that must die for want of memory, the one that only tries
            Path("/proc/self/oom_score_adj").write_text("1000")
        if os.getppid() != parent:  # it went before the kernel was asked
            return
    torch.set_num_threads(1)
    try:
        answer: dict[str, Any] = {"found": work()}
    except MemoryError as error:
        answer = {"error": f"out of memory {error}".rstrip(), "memory": True}
    except Exception as error:  # of a task, model or trainer of the user's own
        lacks = isinstance(error, RuntimeError) and "allocate memory" in str(error)
        said = f"{type(error).__name__}: {error}"
        answer = {"error": said, "memory": lacks}
    pipe.send_bytes(json.dumps(answer).encode())


class Peak:
    """The most memory of this process that was resident at once since `begin`, in bytes beyond what was then."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = 0

    def begin(self) -> None:
        """Forgets what was before: where the kernel can (Linux), past peaks too."""
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = self._process.memory_info().rss

    def bytes(self) -> int:
        """Where the kernel keeps no peak, what is resident now."""
        now: int = self._process.memory_info().rss
        return max(0, max(_high_water(), now) - self._before)


def _high_water() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
