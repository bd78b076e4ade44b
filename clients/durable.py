"""Files that are replaced as a whole, and stay so behind a power cut."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def replace_durably(path: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Puts a new file in the place of one: whoever dies meanwhile leaves the old one or the new one.

    Args:
        path: of the file; its folder is made, for this user only.
        write: writes the new content to the path that it is given.
        durable: waits until file and name are on the disk, so that a power cut leaves one of the two as well.

    Raises:
        OSError: it could not be written; the old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)
    try:
        # Made before it is written: for others it must not be there to open meanwhile.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        write(temporary)
        temporary.chmod(0o600)
        if durable:
            _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
