"""What a device was in the middle of and is never asked for again: removed once nobody has touched it for some days.

    <folder>/runs/<run>/half-done/client-3.half-done      local training (`clients.half_done`)
    <folder>/client-3.turn.safetensors                    a split client's turn (`clients.split.half_done`)
    <folder>/encrypted/client-3/turn-<session>.json       an owner's turn (`clients.encrypted.half_done`)
    <folder>/encrypted/client-3/<data>/                   its mini-batches' ciphertexts, which can be made again

A server does not say that a run is over, so age decides: of the file, as it was last written or taken up. Whoever takes
one up touches it first, under a lock that whoever removes it holds as well: nothing goes that a process works on. No
ledger, key, state or model that a client holds is looked at here: these may be needed after any time.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

DAYS = 7.0
"""For which what is half done is kept, where nobody says otherwise."""
_DAY = 86_400.0
LOCK = ".leftovers.lock"
"""In each folder, held while something in it is taken up or removed."""
_LONGEST = 10.0
"""Seconds that a lock is waited for; it is held for as long as a folder takes to be listed."""
_PLACES = (
    ("runs/*/half-done", "client-*.half-done*"),
    (".", "client-*.turn.*"),
    ("encrypted/client-*", "turn-*"),
)
"""Folders under a device's own, and what in them is half done; the parts of a write that was cut off, too."""
_DATA = "encrypted/client-*"


def take_up(path: Path) -> None:
    """Says that a file or folder is in use, before it is read; nothing happens where it is not there."""
    if not path.exists():
        return
    with suppress(OSError, Timeout), _locked(path.parent, _LONGEST):
        os.utime(path)


def remove_leftovers(folder: Path, days: float = DAYS, now: float | None = None) -> list[Path]:
    """Removes what is half done under a device's folder and was not touched for so long.

    A folder in which another process takes something up at the moment is left for the next time, as is what can't be
    removed.

    Args:
        folder: of the device's clients, in all runs.
        days: how long it is kept.
        now: seconds since the epoch; the system's time where None.

    Returns:
        What was removed.
    """
    before = (time.time() if now is None else now) - days * _DAY
    removed: list[Path] = []
    for place, names in _places(folder):
        try:
            found = sorted(path for path in place.iterdir() if names(path))
        except FileNotFoundError:  # another process tidies up as well, or there is nothing yet
            continue
        except OSError as error:
            log.warning("%s is not looked through for what is left over: %s", place, error)
            continue
        if not any(_old(path, before) for path in found):
            continue  # no lock is made where there is nothing to do
        with suppress(OSError, Timeout), _locked(place, 0.0):
            removed += [path for path in found if _old(path, before) and _remove(path)]
    if removed:
        log.info(
            "%d half-done pieces of work were older than %g days and are gone", len(removed), days
        )
    return removed


def _places(folder: Path) -> Iterator[tuple[Path, Callable[[Path], bool]]]:
    """Each folder in which something half done may lie, and what tells that it is."""
    for places, names in _PLACES:
        for place in sorted(folder.glob(places)) if places != "." else [folder]:
            yield place, partial(_is_named, names)
    for place in sorted(folder.glob(_DATA)):
        yield place, _is_data


def _is_named(names: str, path: Path) -> bool:
    return fnmatchcase(path.name, names) and path.is_file()


def _is_data(path: Path) -> bool:
    """Whether a folder holds mini-batches and nothing else."""
    return path.is_dir() and all(one.name.startswith("batch-") for one in path.iterdir())


def _old(path: Path, before: float) -> bool:
    try:
        return path.stat().st_mtime < before
    except OSError:
        return False


def _remove(path: Path) -> bool:
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        log.warning("%s is old and can't be removed: %s", path, error)
        return False
    return True


def _locked(folder: Path, seconds: float) -> FileLock:
    return FileLock(folder / LOCK, timeout=seconds, mode=0o600)
