"""What of owners' mini-batches stays on the compute party's disk: so much an owner, so much in all.

Owners are strangers and name what they send as they like, so that without bounds one of them fills the disk. An owner
has one set of mini-batches at a time: with the first one of another set, or under another key, the one before is
forgotten, unless another owner has the same. An owner who is at its bound loses what it used longest ago. Where all
together are at theirs, what belongs to nobody goes first, then the oldest of who has most: nobody can push out those
who have less. What has gone is asked for again.

Whose a set is stands in a file, so that a party that is started again knows. One that can't be read counts as none.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from clients.encrypted.memory import BatchKey, CiphertextCache
from strategies import plain_json

log = logging.getLogger(__name__)


class Held(NamedTuple):
    """What an owner has here.

    Attributes:
        fingerprint: of its key.
        folders: of its ciphertexts, as `BatchKey.owner`.
    """

    fingerprint: str
    folders: tuple[str, ...]


class Stock:
    """Bounds what a cache has on the disk; for one thread.

    Args:
        cache: that stores; nothing else may put into it.
        path: of the file that says whose what is.
        most: bytes in all; and no more than half of what is free, with what lies there, when it begins.
        most_each: bytes of one owner.
    """

    def __init__(self, cache: CiphertextCache, path: Path, most: int, most_each: int) -> None:
        self._cache, self._path, self._most_each = cache, path, most_each
        self._sizes = _found(cache.folder)
        room = shutil.disk_usage(cache.folder).free + sum(self._sizes.values())
        self._most = min(most, room // 2)
        self._held = _read(path)

    def assign(self, client: int, now: Held) -> str | None:
        """Says what an owner has from here on, and forgets what it had before.

        Args:
            client: its logical id, by which the server knows it.
            now: key and folders.

        Returns:
            The fingerprint of a key that was this owner's, and is nobody's any more; None for none.

        Raises:
            OSError: the disk can't be written.
        """
        before = self._held.get(client)
        if before == now:
            return None
        self._held[client] = now
        write = {str(one): [held.fingerprint, *held.folders] for one, held in self._held.items()}
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(write))
        part.replace(self._path)
        if before is None:
            return None
        kept = {folder for held in self._held.values() for folder in held.folders}
        for folder in before.folders:
            if folder not in kept:
                self._cache.forget(folder)
                for key in self._of([folder]):
                    del self._sizes[key]
        known = {held.fingerprint for held in self._held.values()}
        return None if before.fingerprint in known else before.fingerprint

    def reserve(self, client: int, sizes: Mapping[BatchKey, int]) -> None:
        """Makes room for what is about to be stored, in place of what is there under the same keys.

        Args:
            client: whose it is; `assign` was called for it.
            sizes: bytes by key.

        Raises:
            OSError: no room can be made (ENOSPC), or the disk can't be written.
        """
        for key in sizes:
            self._sizes.pop(key, None)
        new, folders = sum(sizes.values()), self._held[client].folders
        if new > min(self._most, self._most_each):
            told = f"no room for a mini-batch of {new} bytes: raise disk_mb and owner_disk_mb"
            raise OSError(errno.ENOSPC, told)
        while self._bytes(own := self._of(folders)) + new > self._most_each:
            self._drop(own[0])
        while sum(self._sizes.values()) + new > self._most:
            self._drop(self._first_to_go())
        self._sizes.update(sizes)

    def used(self, keys: Iterable[BatchKey]) -> None:
        """Says that these are in use: they go last."""
        for key in keys:
            if key in self._sizes:
                self._sizes.move_to_end(key)

    def _first_to_go(self) -> BatchKey:
        owned = {folder for held in self._held.values() for folder in held.folders}
        for key in self._sizes:
            if key.owner not in owned:
                return key
        largest = max((self._of(held.folders) for held in self._held.values()), key=self._bytes)
        return largest[0]

    def _of(self, folders: Iterable[str]) -> list[BatchKey]:
        """What lies in folders, used longest ago first."""
        wanted = frozenset(folders)
        return [key for key in self._sizes if key.owner in wanted]

    def _bytes(self, keys: Iterable[BatchKey]) -> int:
        return sum(self._sizes[key] for key in keys)

    def _drop(self, key: BatchKey) -> None:
        log.info("no more room for ciphertexts: mini-batch %d of %s goes", key.number, key.owner)
        self._cache.remove(key)
        del self._sizes[key]


def _found(folder: Path) -> OrderedDict[BatchKey, int]:
    """What lies on the disk, and its size; written longest ago first."""
    files = [(path, path.stat()) for path in folder.glob("*/*.npy") if path.stem.isdecimal()]
    files.sort(key=lambda entry: entry[1].st_mtime_ns)
    return OrderedDict(
        (BatchKey(path.parent.name, int(path.stem)), state.st_size) for path, state in files
    )


def _read(path: Path) -> dict[int, Held]:
    try:
        told = plain_json.loads(path.read_text())
        return {
            int(client): Held(str(held[0]), tuple(map(str, held[1:])))
            for client, held in told.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        log.warning("%s: what owners have is not known any more: %s", os.fspath(path), error)
        return {}
