"""Checkpoints: everything that a later process needs to go on as if nothing had happened.

One safetensors file a version: arrays as tensors, everything else as JSON in the file's metadata, with a checksum over
both. Nothing is pickled. The newest whole file wins; a torn one is skipped with a warning.

Rounds between two checkpoints cost a killed process time, and, under a promise of privacy, budget: they are run again.
Whoever ends in order loses none: the newest state is held in memory until it is saved.

Knows neither what a state means nor when a run ends; `fl_app.run` does.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fl_app.services.files import write_atomically
from strategies import plain_json
from strategies.hooks import RoundView
from strategies.state import State, Value

log = logging.getLogger(__name__)

_FORMAT = "trellis-checkpoint-1"
_ARRAY = "@array"
_NAME: Final = re.compile(r"version-(\d{8,})\.safetensors")
_ROUND: Final = "round"
_NO_ROOM: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TORN: Final = (ValueError, OSError, SafetensorError)


class CheckpointError(OSError):
    """A checkpoint that could not be written; the message says how much room it takes and what to do."""


@dataclass(frozen=True)
class Found:
    """A whole checkpoint.

    Attributes:
        path: of its file.
        round: the model's version.
        state: what was saved.
        written: when, seconds since the epoch.
    """

    path: Path
    round: int
    state: State
    written: float

    @property
    def age(self) -> float:
        """Seconds since it was written; 0 where a clock was set back."""
        return max(0.0, time.time() - self.written)


@dataclass
class Checkpoints:
    """A folder of checkpoints, and the hook that adds to it.

    Attributes:
        folder: where they are.
        every: rounds between two; 0 for none before the last round.
        keep: how many of the newest whole ones are kept.
        last: the round that is saved whatever `every` says; None where none is known to be the last.
        state: what is to be saved, asked at each round.
        noted: what is to be known of each kept one, asked of its state.
        kept: by round, what was noted of the whole ones that are there and no newer than what this process has written.
    """

    folder: Path
    every: Annotated[int, Ge(0)] = 1
    keep: Annotated[int, Ge(1)] = 2
    last: int | None = None
    state: Callable[[], State] = dict
    noted: Callable[[State], Any] = lambda state: None
    kept: dict[int, Any] = field(default_factory=dict, init=False)
    _held: tuple[int, State] | None = field(default=None, init=False)

    def __call__(self, view: RoundView) -> None:
        """Saves this version where it is due, and prunes old ones; holds it where it is not.

        Raises:
            CheckpointError: there is no room; the older ones are whole.
        """
        state, number = self.state(), view.round
        if number == self.last or (self.every and number % self.every == 0):
            self._save(number, state)
        else:
            self._held = number, deepcopy(state)  # which the next round changes in place

    def settle(self) -> None:
        """Saves the newest state that is not on the disk, if there is one: no round will follow.

        Raises:
            CheckpointError: as of the hook.
        """
        if self._held is not None:
            self._save(*self._held)

    def newest(self) -> Found | None:
        """The newest whole checkpoint, None where there is none.

        Raises:
            PermissionError: one can't be looked at: it may be whole, and what an older one says out of date.
        """
        for number, path in self._files():
            try:
                found = self._read(number, path)
            except PermissionError:
                raise
            except _TORN as error:
                log.warning("checkpoint %s is skipped: %s", path.name, error)
            else:
                return found
        return None

    @property
    def names(self) -> list[str]:
        """Names of all files that should be checkpoints, the newest first."""
        return [path.name for _, path in self._files()]

    def take_up(self, newest: Found) -> None:
        """Goes on from a checkpoint; notes it, and the older ones that the run may be sent back to."""
        self.kept[newest.round] = self.noted(newest.state)
        self._look(self._files(), self.keep)

    def _look(self, files: Sequence[tuple[int, Path]], most: int) -> None:
        """Finds out which of the files are whole, the newest first, until as many as `most` are known."""
        for number, path in files:
            if sum(one >= number for one in self.kept) >= most:
                return
            if number not in self.kept:
                try:
                    self.kept[number] = self.noted(self._read(number, path).state)
                except _TORN as error:
                    log.info("checkpoint %s is not whole: %s", path.name, error)

    def _read(self, number: int, path: Path) -> Found:
        written = path.stat().st_mtime
        state = read(path)
        if state.get(_ROUND, number) != number:
            raise ValueError(f"it is of round {state[_ROUND]}, and its name says {number}")
        return Found(path, number, state, written)

    def _save(self, number: int, state: State) -> None:
        data = dump({**state, _ROUND: number})
        path = self.folder / f"version-{number:08d}.safetensors"
        try:
            self._write(path, data)
        except OSError as error:
            raise self._no_room(number, len(data), error) from error
        self._held = None
        self.kept[number] = self.noted(state)
        self._prune(number, self.keep)

    def _write(self, path: Path, data: bytes) -> None:
        """Writes one; where there is no room, once more without those that are older than the newest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            write_atomically(path, data)
        except OSError as error:
            newest = max(self.kept, default=None)
            if error.errno not in _NO_ROOM or len(self.kept) < 2 or newest is None:
                raise
            log.warning("no room for %s: older checkpoints than the newest go", path.name)
            self._prune(newest, 1)
            write_atomically(path, data)

    def _prune(self, newest: int, keep: int) -> None:
        """Removes what is older than the last `keep` whole ones, and what is torn among them.

        What is newer than `newest` is left: it is of a round that this process has not come to, or can't read.
        """
        files = [(number, path) for number, path in self._files() if number <= newest]
        self._look(files, keep)
        stay = set(sorted(self.kept)[-keep:])
        for number in self.kept.keys() - stay:
            del self.kept[number]
        for number, path in files:
            if number in stay:
                continue
            try:
                path.unlink()
            except OSError as error:
                log.warning("checkpoint %s can't be removed: %s", path.name, error.strerror)

    def _files(self) -> list[tuple[int, Path]]:
        """Files by their names' rounds, the newest first."""
        try:
            named = [(_NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        except FileNotFoundError:
            return []
        return sorted(((int(m[1]), path) for m, path in named if m), reverse=True)

    def _no_room(self, number: int, size: int, error: OSError) -> CheckpointError:
        told = (
            f"the checkpoint of round {number} can't be written to {self.folder}: {error.strerror}"
        )
        if error.errno in _NO_ROOM:
            free = shutil.disk_usage(self.folder).free
            told += f"; it takes {size / 1e6:.3g} MB, and {free / 1e6:.3g} MB are free there"
        before = max((one for one in self.kept if one < number), default=None)
        told += "; mend that, and the same command "
        told += "begins again" if before is None else f"goes on after round {before}"
        return CheckpointError(told)


def dump(state: State) -> bytes:
    """A state as the bytes of a safetensors file."""
    tensors: dict[str, NDArray[np.generic]] = {}
    text = json.dumps(_lift(state, "", tensors), allow_nan=False)
    metadata = {"format": _FORMAT, "state": text, "checksum": _checksum(text, tensors)}
    return save(tensors, metadata)


def read(path: Path) -> State:
    """The state in a file.

    Raises:
        ValueError: the file is not a checkpoint, or its checksum does not hold.
        SafetensorError: the file is torn.
    """
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping
    if metadata.get("format") != _FORMAT or "state" not in metadata:
        raise ValueError("it is not a checkpoint of this version of Trellis")
    if metadata.get("checksum") != _checksum(metadata["state"], tensors):
        raise ValueError("its checksum does not hold")
    lowered = _lower(plain_json.loads(metadata["state"]), tensors)
    if not isinstance(lowered, Mapping):
        raise ValueError("its state is not a mapping")
    return lowered


def _lift(value: Value, path: str, tensors: dict[str, NDArray[np.generic]]) -> Any:
    """The value with each array replaced by a reference to a tensor."""
    if isinstance(value, np.ndarray):
        tensors[path] = np.ascontiguousarray(value).reshape(value.shape)
        return {_ARRAY: path}
    if isinstance(value, Mapping):
        return {key: _lift(item, f"{path}/{key}", tensors) for key, item in value.items()}
    return value


def _lower(value: Any, tensors: Mapping[str, NDArray[np.generic]]) -> Value:
    if isinstance(value, dict):
        if set(value) == {_ARRAY}:
            if value[_ARRAY] not in tensors:
                raise ValueError(f"array {value[_ARRAY]!r} is missing")
            return tensors[value[_ARRAY]]
        return {str(key): _lower(item, tensors) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a state holds no {type(value).__name__}")


def _checksum(text: str, tensors: Mapping[str, NDArray[np.generic]]) -> str:
    digest = hashlib.sha256(text.encode())
    for key in sorted(tensors):
        digest.update(f"{key}{tensors[key].dtype}{tensors[key].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[key]).data if tensors[key].size else b"")
    return digest.hexdigest()
