"""The compute party's workers, as one: a call goes to all of them, and their shares come back in order."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from clients.encrypted.linear import WeightRangeError
from clients.encrypted.memory import BatchMissingError
from clients.encrypted.plan import Plan
from clients.encrypted.worker import KeysMissingError, Setup
from strategies.ckks.streams import CiphertextError

_PATIENCE: Final = 10.0
"""Seconds that a worker is given to end when it is told to."""


_TOLD: Final = (BatchMissingError, KeysMissingError, CiphertextError, WeightRangeError)
"""What goes wrong in a worker by what it is handed."""


class WorkerError(RuntimeError):
    """A worker has ended, can't be started, or has failed at its work."""


def _failed(error: Exception) -> WorkerError:
    failure = WorkerError(f"a worker of the compute party failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


class _Process:
    """A worker and the socket to it."""

    def __init__(self, setup: Setup) -> None:
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",  # one thread works
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "clients.encrypted.start_worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        try:
            self.send(setup)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except (ConnectionError, OSError) as error:
            raise self._ended() from error

    def receive(self) -> Any:
        try:
            good, answer = self._connection.recv()
        except (EOFError, ConnectionError, OSError) as error:
            raise self._ended() from error
        if not good:
            raise answer if isinstance(answer, _TOLD) else _failed(answer)
        return answer

    def _ended(self) -> WorkerError:
        code = self._process.poll()
        told = "its connection broke" if code is None else f"it ended with code {code}"
        if code == -9:
            told += ": killed, perhaps for memory; lower memory.limit_mb to make the governor act earlier"
        return WorkerError(f"a worker of the compute party is gone (pid {self.pid}): {told}")

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()

    def close(self) -> None:
        """Ends it: it keeps nothing that would be lost."""
        self._connection.close()
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Crew:
    """Workers that share the units of each layer; started when the first call comes, and again after one has died.

    Args:
        plan: of the steps.
        keys: folder of the owners' evaluation keys.
        ciphertexts: folder of their mini-batches.
        size: how many.
        chunk: leaves of one tree.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, plan: Plan, keys: Path, ciphertexts: Path, size: int, chunk: int) -> None:
        if size < 1:
            raise ValueError(f"a crew of {size} workers does no work")
        self._plan, self._keys, self._ciphertexts = plan, keys, ciphertexts
        # A worker without a pair of units of any layer would have nothing to do.
        self._most = max(1, max(plan.spec.sizes[1:]) // 2)
        self.size, self.chunk = min(size, self._most), chunk
        self._processes: list[_Process] = []
        self._finalizer: Any = None

    def share(self, layer: int) -> list[range]:
        """The units of a layer, worker by worker."""
        return self._plan.spec.share(layer, self.size)

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        return [process.pid for process in self._processes]

    def start(self) -> None:
        """Starts them, if they do not run: all or none.

        Raises:
            WorkerError: one can't be started.
        """
        if self._processes:
            return
        setup, started = (
            Setup(self._plan, self._keys, self._ciphertexts, self.chunk),
            list[_Process](),
        )
        try:
            for _ in range(self.size):
                started.append(_Process(setup))
        except BaseException as error:
            _close(started)
            if isinstance(error, OSError):
                raise WorkerError(f"a worker of the compute party can't start: {error}") from error
            raise
        self._processes = started
        self._finalizer = weakref.finalize(self, _close, list(started))

    def resize(self, size: int) -> None:
        """So many from the next step on."""
        size = min(size, self._most)
        if size != self.size:
            self.close()
            self.size = size

    def rest(self, chunk: int) -> None:
        """Leaves of one tree, from the next step on; what waits in the workers is let go."""
        self.chunk = chunk
        if self._processes:
            with suppress(WorkerError):  # all are ended then, and start with it
                self.each("rest", chunk)

    def trim(self) -> None:
        """Has them give back what they have freed, where they run; steps that wait stay."""
        if self._processes:
            with suppress(WorkerError):
                self.each("trim")

    def interrupt(self) -> None:
        """Kills them, from any thread: the call that waits for them raises `WorkerError`."""
        for process in list(self._processes):
            process.kill()

    def all(self, name: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """A call with each worker's own arguments.

        Raises:
            WorkerError: one is gone or has failed; all are ended, and started again by the next call.
            Exception: what a worker raised, when all have answered.
        """
        self.start()
        failure: Exception | None = None
        answers = []
        try:
            for process, own in zip(self._processes, arguments, strict=True):
                process.send((name, tuple(own)))
            for process in self._processes:
                try:
                    answers.append(process.receive())
                except _TOLD as error:
                    failure = failure or error
        except BaseException:  # an answer that nobody has taken would be the next call's
            self.close()
            raise
        if failure is not None:
            raise failure
        return answers

    def each(self, name: str, *arguments: Any) -> list[Any]:
        """A call with the same arguments for all."""
        return self.all(name, [arguments] * self.size)

    def one(self, name: str, *arguments: Any) -> Any:
        """A call of the first worker alone."""
        self.start()
        first = self._processes[0]
        try:
            first.send((name, arguments))
            return first.receive()
        except _TOLD:
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends them."""
        if self._finalizer is not None:
            self._finalizer()
        self._processes.clear()


def _close(processes: Sequence[_Process]) -> None:
    for process in processes:
        process.close()
