"""What a client's examples have been charged, on its own disk, before anything is made of them.

A privacy loss is a fact from the moment at which training starts: whether the update arrives, is taken or is asked for
again changes nothing. So a charge depends on no server, unlike a client's other state (`clients.store`), and each
attempt is one. The loss of all of them together is an accountant's to say; releases with other settings compose.

    <folder>/client-3.spent        a line of JSON for what the file is, then one for each charge; lines are only added
    <folder>/client-3.spent.lock   held while the file is read and a line is added

A line counts once it is whole and on the disk, and training starts after that: the rest of a line that was cut off,
by a kill or a full disk, belongs to no training and is dropped. Any other damage is refused, never read as less.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from strategies.privacy.events import GaussianRelease

Charge = tuple[GaussianRelease, int]
"""A release, and how many of its kind."""

_HEADER = {
    "format": "trellis-client-ledger-1",
    "unit": "example",
    "relation": "add_or_remove_one",
}


class ClientLedger:
    """One logical client's charges.

    Args:
        folder: of all clients of this process; it is made when something is first charged.
        client: logical id.
    """

    def __init__(self, folder: Path, client: int) -> None:
        self._folder = folder
        self.path = folder / f"client-{int(client)}.spent"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone with the file: two requests at once must not both find room for one."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            yield

    def charges(self) -> list[Charge]:
        """All charges, in their order.

        Raises:
            ValueError: the file is another mechanism's, or damaged.
        """
        lines = self._whole().splitlines()
        if not lines:
            return []
        header = self._parsed(lines[0])
        if header != _HEADER:
            raise ValueError(
                f"{self.path} is no ledger of client=dp_sgd: it begins with {header}, not {_HEADER}."
                " Keep it, and give this client another folder"
            )
        return [self._charge(line) for line in lines[1:]]

    def add(self, release: GaussianRelease, count: int) -> None:
        """Adds a charge, and returns once it is on the disk.

        Args:
            release: of each.
            count: how many.

        Raises:
            OSError: it could not be written; nothing may then be released.
        """
        whole = self._whole()
        entries: list[dict[str, Any]] = [] if whole else [dict(_HEADER)]
        entries.append({**asdict(release), "count": count})
        data = "".join(f"{json.dumps(entry)}\n" for entry in entries).encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.ftruncate(handle, len(whole))
            if os.pwrite(handle, data, len(whole)) < len(data):
                raise OSError(f"{self.path} could not be written in full")
            os.fsync(handle)
        finally:
            os.close(handle)
        if not whole:
            _sync_folder(self._folder)

    def _whole(self) -> bytes:
        """The file up to its last whole line."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return b""
        return data[: data.rfind(b"\n") + 1]

    def _charge(self, line: bytes) -> Charge:
        entry = self._parsed(line)
        try:
            count = int(entry.pop("count"))
            return GaussianRelease(**entry), count
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged at {line!r}: {error}") from error

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged at {line!r}: {error}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{self.path} is damaged at {line!r}: no JSON object")
        return entry


def _sync_folder(folder: Path) -> None:
    """A new file's name must outlive a power cut too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
