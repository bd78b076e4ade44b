"""Plain values over the pipe between the engine and one of its own workers.

What travels is a pickle of plain values only (numbers, strings, bytes, lists, tuples, dicts, None), and it is read by
an unpickler that refuses to name any class or function: it can carry data and nothing else. Large bytes objects are
written from where they are and read to where they stay, with no copy between.
"""

from __future__ import annotations

import os
import pickle
from multiprocessing.connection import Connection
from typing import Any, NoReturn


class Channel:
    """One end of a duplex pipe; each value that one side sends is received whole by the other.

    Args:
        connection: from `multiprocessing.Pipe()`; closed with the channel.

    Attributes:
        connection: the same, to wait on; nothing else may read from it or write to it.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._writer = _Writer(connection.fileno())
        self._reader = open(connection.fileno(), "rb", closefd=False)  # noqa: SIM115 - lives as long as this

    def poll(self) -> bool:
        """Whether the other side has sent something or is gone."""
        return self.connection.poll()

    def send(self, value: object) -> None:
        """Sends plain values; returns when the pipe has taken all of them.

        Raises:
            OSError: the other side is gone.
        """
        pickle.Pickler(self._writer, protocol=5).dump(value)

    def receive(self) -> Any:
        """The next value; waits for it.

        Raises:
            EOFError: the other side is gone.
            pickle.UnpicklingError: it sent something other than plain values, or went away before it had sent all.
        """
        return _PlainUnpickler(self._reader).load()

    def close(self) -> None:
        """Closes this end."""
        self.connection.close()


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"only plain values may be sent, not {module}.{name}")


class _Writer:
    """What a pickler writes to: everything goes to the pipe at once, so nothing is left behind when it breaks."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes | memoryview) -> int:
        left = memoryview(data)
        size = len(left)
        while left:
            left = left[os.write(self._descriptor, left) :]
        return size
