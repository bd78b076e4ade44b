"""Evaluation keys of owners on the compute party's disk, so that a restart or a next run need not ask for them again.

There is a file a secret key, named by its fingerprint: safetensors with a checksum, written whole or not at all. A file
that is torn or altered is named in the log and counts as none: the owner is asked again, and what comes replaces it.
The folder is bounded, since strangers fill it: those used longest ago go first, which costs their owners one upload.

A fingerprint follows from the secret key, so only those who share the key, and the compute party, can name one. What
is read here goes through the same checks as what came by wire. Nothing here decrypts, and nothing is unpickled.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from clients.encrypted.key_frames import FINGERPRINT_BYTES, EvaluationKeys, evaluation_bytes
from clients.encrypted.keys import public_only
from clients.encrypted.ring import Ring
from strategies.ckks.streams import CiphertextError

log = logging.getLogger(__name__)

_FINGERPRINT: Final = re.compile(rf"[0-9a-f]{{{2 * FINGERPRINT_BYTES}}}")
_SUFFIX: Final = ".keys.safetensors"
_HEAD: Final = 4096
"""Bytes that names, shapes and checksum take in a file at most."""


class Keyring:
    """Evaluation keys by fingerprint.

    Args:
        folder: made when the first keys come, for this user only.
        most_bytes: of all keys together.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most = folder, most_bytes

    def load(
        self, fingerprint: str, ring: Ring, galois_elements: Sequence[int]
    ) -> EvaluationKeys | None:
        """The keys of a secret key for exactly these Galois elements; None where the owner must be asked for them.

        Raises:
            CiphertextError: that is no fingerprint.
        """
        path = self._path(fingerprint)
        try:
            keys = _read(path, ring, galois_elements)
            if keys.fingerprint != fingerprint:
                raise CiphertextError("they belong to another secret key")
            os.utime(path)
        except FileNotFoundError:
            return None
        except (CiphertextError, SafetensorError, OSError) as error:
            log.warning("the evaluation keys in %s are asked for again: %s", path, error)
            return None
        return keys

    def save(self, keys: EvaluationKeys) -> None:
        """Keeps keys that `EvaluationKeys.from_arrays` has checked, in place of others of the same secret key.

        Raises:
            CiphertextError: they are larger than all keys together may be.
            SecretKeyError: they are a secret key.
            OSError: the folder can't be written.
        """
        public_only(keys)
        arrays = keys.to_arrays()
        size = sum(array.nbytes for array in arrays.values()) + _HEAD
        if size > self._most:
            raise CiphertextError(
                f"evaluation keys of {size} bytes: the key ring holds {self._most} in all"
            )
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(keys.fingerprint)
        with FileLock(self._folder / ".lock", mode=0o600):
            self._make_room(path, size)
            part = self._folder / f".{secrets.token_hex(8)}.part"
            try:
                save_file(arrays, part, {"sha256": keys.digest})
                _sync(part)
                part.replace(path)
            except SafetensorError as error:  # how the library tells of a full disk
                raise OSError(errno.EIO, str(error)) from error
            finally:
                part.unlink(missing_ok=True)

    def forget(self, fingerprint: str) -> None:
        """Deletes the keys of a secret key, if they are there; raises `CiphertextError` for what is no fingerprint."""
        self._path(fingerprint).unlink(missing_ok=True)

    def _make_room(self, path: Path, size: int) -> None:
        """Removes what a killed process left, and what was used longest ago until `size` bytes more are allowed."""
        for part in self._folder.glob(".*.part"):
            part.unlink()
        others = [(one.stat(), one) for one in self._folder.glob(f"*{_SUFFIX}") if one != path]
        taken = size + sum(stat.st_size for stat, _ in others)
        for stat, one in sorted(others, key=lambda entry: entry[0].st_mtime_ns):
            if taken <= self._most:
                return
            log.info("the key ring is full: %s goes", one.name)
            one.unlink()
            taken -= stat.st_size

    def _path(self, fingerprint: str) -> Path:
        if not _FINGERPRINT.fullmatch(fingerprint):
            raise CiphertextError(f"{fingerprint[:40]!r} is no fingerprint of a key")
        return self._folder / f"{fingerprint}{_SUFFIX}"


def _read(path: Path, ring: Ring, galois_elements: Sequence[int]) -> EvaluationKeys:
    """Raises `CiphertextError`, `SafetensorError` or `OSError`."""
    size, most = path.stat().st_size, evaluation_bytes(ring, galois_elements) + _HEAD
    if size > most:
        raise CiphertextError(f"{size} bytes, where such keys take {most} at most")
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
        told = (file.metadata() or {}).get("sha256")
    keys = EvaluationKeys.from_arrays(arrays, ring, galois_elements)
    if keys.digest != told:
        raise CiphertextError("they were altered: their checksum is another")
    return keys


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
