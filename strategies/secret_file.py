"""A secret's own file: whole or not at all, never over another, and nobody else's to read.

Whoever makes a secret must neither lose one that other data depends on nor leave half of one behind: a file is written
under another name, synced, and linked to its own. Whoever reads one refuses a file that others can read: a secret that
has been readable is none any more, and its owner must know. What the bytes mean is the caller's affair.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


class ReadableError(ValueError):
    """Others than the owner can read a secret's file."""


def save(path: Path, data: bytes) -> None:
    """Writes a secret's file with mode 0600; folders that lack are made with mode 0700.

    Raises:
        FileExistsError: there is such a file.
        OSError: the folder can't be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(part, path)  # unlike a rename, this refuses to replace a secret
    finally:
        part.unlink(missing_ok=True)


def load(path: Path, most: int) -> bytes:
    """A secret's bytes, and of a file longer than `most` the first `most` + 1.

    Raises:
        ReadableError: others can read it.
        OSError: there is none, or it can't be read.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_mode & 0o077:  # of the file that is read, whatever is renamed
            raise ReadableError(f"others can read {path}: chmod 600 {path}")
        return file.read(most + 1)


def make_once(path: Path, make: Callable[[], None]) -> None:
    """Calls `make`, which writes `path`, where there is no such file: once, whoever else asks at the same time."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock"), mode=0o600):
        if not path.exists():
            make()
