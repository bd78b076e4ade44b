"""Checkpoints: everything that a later process needs to go on as if nothing had happened.

One safetensors file a version: arrays as tensors, everything else as JSON in the file's metadata, with a checksum over
both. Nothing is pickled. The newest whole file wins; a torn one is skipped with a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fl_app.services.files import write_atomically
from strategies.hooks import RoundView
from strategies.state import State, Value

log = logging.getLogger(__name__)

_FORMAT = "trellis-checkpoint-1"
_ARRAY = "@array"


@dataclass
class Checkpoints:
    """A folder of checkpoints, and the hook that adds to it.

    Attributes:
        folder: where they are.
        keep: how many of the newest are kept.
        state: what is to be saved, asked at each round.
    """

    folder: Path
    keep: Annotated[int, Ge(1)] = 2
    state: Callable[[], State] = dict

    def __call__(self, view: RoundView) -> None:
        """Saves this version and prunes old ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / f"version-{view.round:08d}.safetensors", dump(self.state()))
        for path in sorted(self.folder.glob("version-*.safetensors"))[: -self.keep]:
            path.unlink()

    def newest(self) -> State | None:
        """The state of the newest whole checkpoint, None where there is none."""
        for path in sorted(self.folder.glob("version-*.safetensors"), reverse=True):
            try:
                return read(path)
            except (ValueError, OSError, SafetensorError) as error:
                log.warning("checkpoint %s is skipped: %s", path.name, error)
        return None


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
    lowered = _lower(json.loads(metadata["state"]), tensors)
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
