"""The state of parts, as plain data that a checkpoint can hold without pickling: numbers, strings, arrays, mappings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Value: TypeAlias = "bool | int | float | str | NDArray[np.generic] | Mapping[str, Value] | None"
State: TypeAlias = "Mapping[str, Value]"


def array_in(state: State, key: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """A float64 array of a state, copied.

    Raises:
        ValueError: it is missing or has another shape.
    """
    value = state.get(key)
    if not isinstance(value, np.ndarray) or value.shape != shape:
        found = value.shape if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"the state's {key!r} should be an array of shape {shape}, not {found}")
    return value.astype(np.float64)


def array_like(state: State, key: str, like: NDArray[np.generic]) -> NDArray[np.generic]:
    """An array of a state with the shape and dtype of `like`, copied bit for bit.

    Raises:
        ValueError: it is missing or has another shape or dtype.
    """
    value = state.get(key)
    if not isinstance(value, np.ndarray) or (value.shape, value.dtype) != (like.shape, like.dtype):
        raise ValueError(
            f"the state's {key!r} should be an array of {like.dtype} with shape {like.shape}"
        )
    return value.copy()


def mapping_in(state: State, key: str) -> State:
    """A nested state.

    Raises:
        ValueError: it is missing or not a mapping.
    """
    value = state.get(key)
    if not isinstance(value, Mapping):
        raise ValueError(f"the state's {key!r} should be a mapping, not {type(value).__name__}")
    return value


def integer_in(state: State, key: str) -> int:
    """A whole number of a state.

    Raises:
        ValueError: it is missing or not one.
    """
    value = state.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"the state's {key!r} should be a whole number, not {value!r}")
    return value
