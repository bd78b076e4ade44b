"""Files that are either whole or not there, whoever is killed and whenever the power goes.

The order is what makes it so (Pillai et al. 2014, "All File Systems Are Not Created Equal", §4.4): the new content is
on the disk before it has the file's name, and the name is on the disk before anybody is told that it was written.

Knows nothing of what is written, nor of who may write where: a run's folder is locked by `fl_app.folder`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Final

_LEFTOVERS: Final = ".*.part"
_UNABLE: Final = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}
"""What file systems say that have no folders to be synced, some of those on a network."""


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file under another name in the same folder, makes it durable, and gives it its name.

    Raises:
        OSError: the disk is full, or the folder can't be written; an older file is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Removes what writers that were killed have left; for whoever alone writes in the folder."""
    for path in folder.glob(_LEFTOVERS):
        with contextlib.suppress(OSError):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Makes names in a folder durable: what was renamed, made or removed there.

    Raises:
        OSError: the disk has failed.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
    finally:
        os.close(handle)
