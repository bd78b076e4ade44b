"""Lines of JSON that are only ever added to a file, each on the disk before what it stands for happens.

The first line says what the file is. A line counts once it is whole and synced: the rest of one that was cut off, by a
kill or a full disk, is dropped, since what it was for had then not begun. Other damage is refused, never read as less.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from strategies import plain_json

Entry = dict[str, Any]


class Journal:
    """One file of entries. Whoever may meet others at it holds a lock from `read` to `add`.

    Args:
        path: of the file, in a folder that is there; made with the first entry.
        header: what the file is, as plain JSON: one with another header is refused.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path, self._header = path, dict(header)
        self._whole = 0

    def read(self) -> list[Entry]:
        """All whole entries, in their order.

        Raises:
            ValueError: the file is another, or damaged.
            OSError: it can't be read.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            content = b""
        self._whole = content.rfind(b"\n") + 1
        lines = content[: self._whole].splitlines()
        entries = [self._entry(line, number) for number, line in enumerate(lines, start=1)]
        if entries and entries[0] != self._header:
            raise ValueError(f"{self.path} is another file: {self._difference(entries[0])}")
        return entries[1:]

    def add(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Adds entries after the last whole line that `read` or `add` saw, and returns once they are on the disk.

        Raises:
            OSError: they could not be written: what they stand for must not happen.
        """
        fresh = not self._whole
        lines = [*([self._header] if fresh else []), *entries]
        content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.ftruncate(handle, self._whole)
            try:
                written = os.pwrite(handle, content, self._whole)
                if written < len(content):
                    raise OSError(
                        f"{self.path}: {written} of {len(content)} bytes could be written"
                    )
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, self._whole)  # a piece of a line would spoil the next one
                raise
        finally:
            os.close(handle)
        self._whole += len(content)
        if fresh:
            _sync(self.path.parent)

    def _entry(self, line: bytes, number: int) -> Entry:
        try:
            entry = plain_json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {self.path} is no JSON: {error}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"line {number} of {self.path} is no JSON object")
        return entry

    def _difference(self, found: Entry) -> str:
        differing = [
            key
            for key in sorted(found.keys() | self._header.keys())
            if found.get(key) != self._header.get(key)
        ]
        told = (
            f"its {key} is {found.get(key)!r}, not {self._header.get(key)!r}" for key in differing
        )
        return "; ".join(told)


def _sync(folder: Path) -> None:
    """A new file's name must outlive a power cut too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
