"""One worker process: its life, and the parent's handle on it.

The protocol is strict: a worker says that it is ready, then reads a chunk, writes the replies, reads the next. The
parent writes only to a worker that reads, so a pipe can never be full both ways.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final

import torch
from flwr.app import Message

from fl_app.engine.answering import answer_chunk, describe
from fl_app.engine.channel import Channel
from fl_app.engine.packing import pack_replies, pack_requests, unpack_replies, unpack_requests
from fl_app.engine.pool import Factory

_READY: Final = "ready"
_FAILED: Final = "failed"
_REPLIES: Final = "replies"
_LAST_BREATH: Final = 0.5
"""Seconds that a process whose pipe is closed may need until it is gone."""


_parents_ends: weakref.WeakSet[Connection] = weakref.WeakSet()
"""The parent's ends of all pipes to workers. A forked worker inherits them, and must close them lest the others' pipes,
and its own, stay open when the parent is gone."""


class WorkerError(RuntimeError):
    """A worker is lost, or could not build the client code; the message says how, with a traceback if there is one."""


class Worker:
    """The parent's handle on a worker process, which is started at once.

    Args:
        context: of `multiprocessing`.
        factory: builds the client code in the worker.

    Attributes:
        channel: values from and to the worker.
        chunk: index and requests of the chunk that it holds, None when it is idle.
    """

    def __init__(self, context: Any, factory: Factory) -> None:
        ours, theirs = context.Pipe()
        _parents_ends.add(ours)
        self._process: BaseProcess = context.Process(
            target=_serve, args=(theirs, factory), name="client worker", daemon=True
        )
        self._ready = False
        self.channel = Channel(ours)
        self.chunk: tuple[int, Sequence[Message]] | None = None
        with interrupts_held(), theirs:
            self._process.start()

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.is_alive()

    @property
    def usable(self) -> bool:
        """Whether it can be given a chunk: it lives, holds none, and has not closed its pipe."""
        return self.chunk is None and self.alive and not self.channel.poll()

    def give(self, index: int, requests: Sequence[Message]) -> None:
        """Gives an idle worker a chunk, which it gets as soon as it is ready."""
        self.chunk = index, requests
        if self._ready:
            self._send_chunk()

    def take(self) -> list[Message] | None:
        """The replies to its chunk, after which it is idle; None if it only said that it is ready.

        To be called when its channel is readable or its process is not alive.

        Raises:
            WorkerError: it died, could not build the client code, or wrote something else than replies.
        """
        try:
            if not self.channel.poll():
                raise EOFError
            tag, value = self.channel.receive()
            if tag == _READY:
                self._ready = True
                if self.chunk is not None:
                    self._send_chunk()
                return None
            if tag == _REPLIES and self.chunk is not None:
                replies = unpack_replies(value, self.chunk[1])
                self.chunk = None
                return replies
        except Exception as error:
            raise WorkerError(
                self.ending() or f"it wrote something unreadable: {describe(error)}"
            ) from error
        raise WorkerError(f"it could not build the client code: {value}")

    def ending(self) -> str | None:
        """How its process ended; None if it still runs."""
        self._process.join(_LAST_BREATH)
        code = self._process.exitcode
        if code is None:
            return None
        if code < 0:
            return f"it was killed by signal {-code} ({signal.strsignal(-code)})"
        return f"it ended with exit code {code}"

    def dismiss(self) -> None:
        """Asks an idle worker to end; kills a busy one."""
        if self.chunk is not None:
            self._process.kill()
            return
        with contextlib.suppress(OSError):  # it is gone already
            self.channel.send(None)

    def join(self, seconds: float) -> None:
        """Waits until the process has ended, for so long at most."""
        self._process.join(max(0.0, seconds))

    def kill(self) -> None:
        """Ends the process whatever it does, and lets go of it."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self.channel.close()

    def _send_chunk(self) -> None:
        assert self.chunk is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # take() sees that it died
            self.channel.send(pack_requests(self.chunk[1]))


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Keeps Ctrl-C back while a worker is started, so that none is hit before it ignores it."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, factory: Factory) -> None:
    """A worker's life."""
    for end in list(_parents_ends):
        end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    torch.set_num_threads(1)
    channel = Channel(connection)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        try:
            answer = factory()
        except (Exception, SystemExit) as error:
            channel.send((_FAILED, describe(error)))
            return
        channel.send((_READY, None))
        while (packed := channel.receive()) is not None:
            replies = answer_chunk(answer, unpack_requests(packed))
            channel.send((_REPLIES, pack_replies(replies)))


def _end_with_parent() -> None:
    """Ends this process, in the middle of its work if need be, as soon as its parent is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
