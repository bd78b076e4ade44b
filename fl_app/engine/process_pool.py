"""Client code in worker processes that live as long as the pool."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any, Final, Literal, Self

from flwr.app import Message

from fl_app.engine.flwr_internals import ErrorCode, error_reply
from fl_app.engine.pool import Factory, InProcessPool
from fl_app.engine.worker import Worker, WorkerError

log = logging.getLogger(__name__)

_GRACE: Final = 2.0
"""Seconds that idle workers have to end by themselves."""
_AHEAD: Final = 4
"""Chunks a worker that may wait for their turn to be taken."""
_LIFE_CHECK: Final = 1.0
"""Seconds between looks at whether silent workers live: a dead one's pipe may be held open by a child of its own."""


class ProcessPool:
    """Answers chunks in `workers` processes, each with client code and a resident model of its own.

    Chunks are handed out as workers become free and the results put back in order; with chunks cut without regard to
    the number of workers, the results do not depend on it. A worker that dies costs error replies for the chunk that it
    held (`CLIENT_APP_CRASHED`), and another takes its place.

    Workers are forked on Linux, so `factory` may be any callable; elsewhere they are spawned and it must be importable.
    They ignore Ctrl-C, which is the parent's to handle, and end when the parent ends, however that happens. They are
    daemonic: client code in them cannot start `multiprocessing` children.

    Args:
        factory: builds the client code in each worker.
        workers: how many processes, at least 1.
        start_method: "fork", "spawn" or "forkserver", if not the platform's choice.
    """

    def __init__(self, factory: Factory, workers: int, *, start_method: str | None = None) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}: at least 1 is needed")
        self._factory = factory
        self._count = workers
        method = start_method or ("fork" if sys.platform == "linux" else "spawn")
        self._context: Any = multiprocessing.get_context(method)
        self._workers: list[Worker] = []
        self._closed = False

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that there are now."""
        return [worker.pid for worker in self._workers]

    def start(self) -> None:
        """Starts the workers and waits until each has built the client code.

        Raises:
            WorkerError: one could not.
            RuntimeError: the pool is closed.
        """
        if self._closed:
            raise RuntimeError("the pool is closed")
        if self._workers:
            return
        try:
            for _ in range(self._count):
                self._launch()
            starting = list(self._workers)
            while starting:
                for worker in _stirring(starting):
                    worker.take()
                    starting.remove(worker)
        except BaseException as error:
            self._end_all(grace=0.0)
            if isinstance(error, WorkerError):
                raise WorkerError(f"a worker did not start: {error}") from error
            raise

    def stream(self, chunks: Sequence[Sequence[Message]]) -> Iterator[list[Message]]:
        """See `ClientPool.stream`."""
        self.start()
        results = {index: list[Message]() for index, chunk in enumerate(chunks) if not chunk}
        todo = deque(item for item in enumerate(chunks) if item[1])
        try:
            for index in range(len(chunks)):
                while index not in results:
                    for worker in _stirring(self._hand_out(todo, index)):
                        self._take(worker, results)
                self._hand_out(todo, index)  # the workers go on while the caller looks at these
                yield results.pop(index)
        finally:
            # Replies to chunks that nobody waits for any more must not be taken for those of the next call.
            for worker in [worker for worker in self._workers if worker.chunk is not None]:
                self._discard(worker)

    def close(self) -> None:
        """Ends all workers: idle ones by asking, busy ones by killing them."""
        self._closed = True
        self._end_all(grace=_GRACE)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _launch(self) -> Worker:
        worker = Worker(self._context, self._factory)
        self._workers.append(worker)
        return worker

    def _hand_out(self, todo: deque[tuple[int, Sequence[Message]]], taken: int) -> list[Worker]:
        """Gives idle workers what is to be done, not far ahead of what is taken; the workers that are busy then."""
        end = taken + _AHEAD * self._count
        while todo and todo[0][0] <= end and (worker := self._idle_worker()) is not None:
            worker.give(*todo.popleft())
        return [worker for worker in self._workers if worker.chunk is not None]

    def _idle_worker(self) -> Worker | None:
        """A living worker without a chunk, a new one if one is missing; None when all are busy."""
        for worker in [worker for worker in self._workers if worker.chunk is None]:
            if worker.usable:
                return worker
            log.warning("a worker is lost while idle: %s; another takes its place", worker.ending())
            self._discard(worker)
        return self._launch() if len(self._workers) < self._count else None

    def _take(self, worker: Worker, results: dict[int, list[Message]]) -> None:
        """Takes what a busy worker has to give; if it is lost, that is error replies."""
        assert worker.chunk is not None
        index, requests = worker.chunk
        try:
            replies = worker.take()
        except WorkerError as error:
            self._discard(worker)
            reason = f"the worker that held this request is lost: {error}"
            log.warning(
                "a worker is lost with %d requests: %s",
                len(requests),
                str(error).partition("\n")[0],
            )
            replies = [
                error_reply(request, ErrorCode.CLIENT_APP_CRASHED, reason) for request in requests
            ]
        if replies is not None:
            results[index] = replies

    def _discard(self, worker: Worker) -> None:
        self._workers.remove(worker)
        worker.kill()

    def _end_all(self, *, grace: float) -> None:
        workers, self._workers = self._workers, []
        try:
            for worker in workers:
                worker.dismiss()
            deadline = time.monotonic() + grace
            for worker in workers:
                worker.join(deadline - time.monotonic())
        finally:
            for worker in workers:
                worker.kill()


def make_pool(factory: Factory, workers: int | Literal["auto"]) -> InProcessPool | ProcessPool:
    """A pool of so many workers; one worker is this process itself.

    Raises:
        ValueError: as `resolve_workers`.
    """
    count = resolve_workers(workers)
    return InProcessPool(factory) if count == 1 else ProcessPool(factory, count)


def resolve_workers(workers: int | Literal["auto"]) -> int:
    """The number of worker processes meant by `runtime.workers`; "auto": as many as there are usable CPUs.

    Raises:
        ValueError: neither "auto" nor a whole number of at least 1.
    """
    if workers == "auto":
        return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(
            f'runtime.workers={workers!r}: a whole number of at least 1 is needed, or "auto"'
        )
    return workers


def _stirring(workers: Sequence[Worker]) -> list[Worker]:
    """Those of some workers that have something to say or have died; waits for at least one."""
    while True:
        readable = wait([worker.channel.connection for worker in workers], timeout=_LIFE_CHECK)
        if found := [w for w in workers if w.channel.connection in readable or not w.alive]:
            return found
