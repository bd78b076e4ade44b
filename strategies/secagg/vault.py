"""What a client keeps of its sessions, on its own disk: secrets until a session is over, and a ledger that stays.

    <folder>/client-3/<session>.json     keys, seed, shares held for others: gone when the session is over
    <folder>/client-3/<session>.upload   the masked upload, before it is sent
    <folder>/client-3/ledger             one line for each thing that may be done once: never deleted

Folders have mode 0700, whatever they had before, and files 0600. A deleted file is no longer there to be read by name;
that its bytes are gone from the disk is not claimed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from strategies import plain_json
from strategies.wire import Refused

_LEDGER = "ledger"
_LOCK = "lock"


class Ledger:
    """What is never forgotten: one line for each thing that may be done once, or so many times.

    Args:
        folder: its own; it is made when something is first kept, and closed to others where it is open to them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone with the files: two requests at once must not both find that a thing was not yet done."""
        for folder in (self._folder.parent, self._folder):  # `mode` is of the last folder only
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_mode & 0o077:
                folder.chmod(0o700)
        with FileLock(self._folder / _LOCK, mode=0o600):
            yield

    def record(self, *entry: str) -> None:
        """Adds a line to the ledger and waits until it is on the disk.

        Raises:
            OSError: it could not be written; what it is for must then not be done.
        """
        # The line break stands first: a line that was cut off by a full disk does not spoil the next one.
        line = f"\n{' '.join(entry)}".encode()
        handle = os.open(self._folder / _LEDGER, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            if os.write(handle, line) < len(line):
                raise OSError(f"{self._folder / _LEDGER} could not be written in full")
            os.fsync(handle)
        finally:
            os.close(handle)

    def recorded(self) -> Iterator[tuple[str, ...]]:
        """The ledger's entries, each as its words."""
        try:
            text = (self._folder / _LEDGER).read_text()
        except FileNotFoundError:
            return
        for line in text.splitlines():
            if words := tuple(line.split()):
                yield words


class Vault(Ledger):
    """One client's own folder: its ledger, and its sessions' secrets.

    Args:
        folder: of all clients of this process.
        client: logical id.
    """

    def __init__(self, folder: Path, client: int) -> None:
        super().__init__(folder / f"client-{int(client)}")

    def keep(self, session: bytes, state: dict[str, Any], *, durable: bool = True) -> None:
        """Writes a session's state; bytes are kept as they are.

        Args:
            session: its id.
            state: plain data.
            durable: the state must not fall back behind a power cut either, or a key would be used for a second
                message; where nothing of the kind depends on it, there is no need to wait for the disk.
        """
        data = json.dumps(state, default=_hexadecimal).encode()
        _write(self._path(session, "json"), data, durable=durable)

    def recall(self, session: bytes) -> dict[str, Any]:
        """A session's state as it was kept, bytes as `bytes`.

        Raises:
            Refused: `session`, when there is no such session, or no longer.
        """
        try:
            text = self._path(session, "json").read_text()
        except FileNotFoundError:
            raise Refused(
                "session", f"session {session.hex()[:8]} is over, or never began here"
            ) from None
        state: dict[str, Any] = plain_json.loads(text, object_hook=_from_hexadecimal)
        return state

    def keep_upload(self, session: bytes, upload: bytes) -> None:
        """Writes what is about to be sent; if a power cut takes it, this client has dropped out."""
        _write(self._path(session, "upload"), upload, durable=False)

    def upload(self, session: bytes) -> bytes | None:
        """What was sent, byte for byte; None where nothing was."""
        path = self._path(session, "upload")
        return path.read_bytes() if path.exists() else None

    def forget(self) -> None:
        """Deletes all sessions' secrets and uploads; the ledger stays."""
        _forget(self._folder)

    def _path(self, session: bytes, ending: str) -> Path:
        return self._folder / f"{session.hex()}.{ending}"


def forget_all(folder: Path) -> None:
    """Deletes every client's secrets under a folder, for a machine that plays all clients of a run."""
    for path in folder.glob("client-*"):
        _forget(path)


def _forget(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix in {".json", ".upload", ".part"}:
            path.unlink()


def _write(path: Path, data: bytes, *, durable: bool) -> None:
    """Atomically: a process that dies leaves the old file or the new one; durably, so does a power cut."""
    temporary = path.with_suffix(f".{os.getpid()}.part")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    temporary.replace(path)
    if durable:
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _hexadecimal(value: object) -> dict[str, str]:
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    raise TypeError(f"{type(value).__name__} cannot be kept")


def _from_hexadecimal(value: dict[str, Any]) -> Any:
    return bytes.fromhex(value["bytes"]) if set(value) == {"bytes"} else value
