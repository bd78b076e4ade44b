"""A TCP proxy on the loopback that can be told to lose the network: what stands between a device and its server.

It forwards bytes and can stop doing so in the ways in which networks fail: `hold` (nothing gets through, nothing is
lost: a partition that heals in time), `drop` (a black hole: bytes vanish, nobody is told), `reset` (connections are
torn down and refused), `slow`. A mode may also be set off by the bytes that pass, so that a failure comes in the
middle of an upload and not somewhere near it. It knows nothing of HTTP, of Flower or of rounds.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Literal, Self

Mode = Literal["forward", "hold", "drop", "reset", "slow"]
Way = Literal["up", "down"]

_CHUNK: Final = 1 << 16
_TAIL: Final = 256  # bytes of the chunk before, so that a pattern that is cut in two is seen
_LOOK: Final = 0.05  # seconds between two looks at the mode


class _Catch:
    """A pattern that is waited for in one direction, and what is done when it passes."""

    def __init__(self, pattern: bytes, way: Way, then: Callable[[], None]) -> None:
        self.pattern, self.way, self.then = re.compile(pattern, re.DOTALL), way, then
        self.seen = threading.Event()


class Proxy:
    """Between whoever connects to `address` and `target`.

    Args:
        target: host and port that connections are handed on to.
        host: where it listens: the loopback, or this end of a cable.
        rate: bytes a second and direction in the mode `slow`.

    Attributes:
        address: `<host>:<port>` where it listens.
        passed: bytes handed on, by direction.
    """

    def __init__(
        self, target: tuple[str, int], *, host: str = "127.0.0.1", rate: int = 1 << 16
    ) -> None:
        self._target, self._rate = target, rate
        self._mode: Mode = "forward"
        self._lock = threading.Lock()
        self._catches: list[_Catch] = []
        self._pairs: set[_Pair] = set()
        self._ended = threading.Event()
        self.passed: dict[Way, int] = {"up": 0, "down": 0}
        self._door = socket.create_server((host, 0))
        self._door.settimeout(_LOOK)
        port = self._door.getsockname()[1]
        self.address = f"{host}:{port}"
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    @property
    def mode(self) -> Mode:
        """What is done with bytes now."""
        return self._mode

    def set(self, mode: Mode) -> None:
        """Another mode from now on. Connections that lost bytes to `drop` are torn down: TCP would have resent them."""
        with self._lock:
            self._mode = mode
            pairs = list(self._pairs)
        for pair in pairs:
            if mode == "reset" or (mode != "drop" and pair.lossy):
                pair.reset()

    def catch(self, pattern: bytes, way: Way, then: Callable[[], None]) -> threading.Event:
        """Calls `then`, once, before the first bytes that match are handed on.

        Args:
            pattern: a regular expression over the raw bytes.
            way: `up` towards the target, `down` from it.
            then: called in the thread that holds the bytes; they go on by the mode that it leaves.

        Returns:
            Set once `then` has returned.
        """
        caught = _Catch(pattern, way, then)
        with self._lock:
            self._catches.append(caught)
        return caught.seen

    def close(self) -> None:
        """Tears everything down."""
        self._ended.set()
        self._accepting.join()
        self._door.close()
        for pair in list(self._pairs):
            pair.reset()
            pair.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                near, _ = self._door.accept()
            except TimeoutError:
                continue
            if self._mode == "reset":
                _reset(near)
                continue
            _Pair(self, near).start()

    def _looked(self, way: Way, tail: bytes, data: bytes) -> bytes:
        """Sets off what waits for these bytes; what is to be looked at again with the next ones."""
        window = tail + data
        with self._lock:
            caught = [one for one in self._catches if one.way == way and one.pattern.search(window)]
            self._catches = [one for one in self._catches if one not in caught]
        for one in caught:
            one.then()
            one.seen.set()
        return window[-_TAIL:]

    def _passes(self, pair: _Pair, size: int) -> bool:
        """Waits until bytes may go on; False where they are lost."""
        while self._mode == "hold" and not self._ended.is_set() and not pair.closed:
            time.sleep(_LOOK)
        if self._mode == "drop":
            pair.lossy = True
        if self._mode == "slow":
            self._ended.wait(size / self._rate)
        return self._mode in ("forward", "slow") and not self._ended.is_set()


class _Pair:
    """One connection: two sockets and a thread for each direction."""

    def __init__(self, proxy: Proxy, near: socket.socket) -> None:
        self._proxy, self._near, self._far = proxy, near, socket.socket()
        self.lossy, self.closed = False, False
        self._threads = [threading.Thread(target=self._up, daemon=True)]

    def start(self) -> None:
        with self._proxy._lock:
            self._proxy._pairs.add(self)
        self._threads[0].start()

    def join(self) -> None:
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5)

    def reset(self) -> None:
        """Ends both halves at once, unsent bytes or not."""
        self.closed = True
        for end in (self._near, self._far):
            _reset(end)

    def _up(self) -> None:
        if not self._proxy._passes(self, 0) and self._proxy.mode != "drop":
            self.reset()
            return
        try:
            self._far.connect(self._proxy._target)
        except OSError:
            self.reset()
            return
        down = threading.Thread(
            target=self._pump, args=(self._far, self._near, "down"), daemon=True
        )
        self._threads.append(down)
        down.start()
        self._pump(self._near, self._far, "up")
        down.join()
        with self._proxy._lock:
            self._proxy._pairs.discard(self)
        for end in (self._near, self._far):
            end.close()

    def _pump(self, source: socket.socket, sink: socket.socket, way: Way) -> None:
        tail = b""
        step = self._proxy._rate // 10 if self._proxy.mode == "slow" else _CHUNK
        with contextlib.suppress(OSError):
            while data := source.recv(step):
                tail = self._proxy._looked(way, tail, data)
                if self._proxy._passes(self, len(data)):
                    sink.sendall(data)
                    self._proxy.passed[way] += len(data)
            while self._proxy.mode in ("hold", "drop") and not self._proxy._ended.is_set():
                time.sleep(_LOOK)  # that a peer is gone is not seen through a partition either
        if not self.closed:  # a reset is no orderly end
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RD)  # wakes a thread that reads, and tells the peer nothing yet
    with contextlib.suppress(OSError):
        end.close()
