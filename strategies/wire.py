"""What messages are made of: the names of their records and settings, arrays as bytes, and why something is refused.

Arrays go as `.npy` bytes in Flower's own `Array`, so that any Flower tool can read them; they are read without a copy
and without numpy's general loader. Every byte of a peer is taken for hostile until checked, and none is ever unpickled.

What an update is, and what it is held against, is not known here (`strategies.replies`).
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.lib import format as npy
from numpy.typing import NDArray

from strategies.records import record_in

ARRAYS: Final = "arrays"
"""The model, as a vanilla Flower app expects it."""
CONFIG: Final = "config"
METRICS: Final = "metrics"
UPDATE: Final = "update"
RECEIPT: Final = "receipt"
NUM_EXAMPLES: Final = "num-examples"
TRAINS: Final = "trains"
"""The setting that is false in a training request that has nothing trained: a further phase of the collector's."""
LOCAL_STEPS: Final = "local-steps"
"""The setting by which a client is told how many local steps to take; absent where that is its own affair."""
REPLY_BYTES: Final = "reply-bytes"
"""The setting that tells an engine how long a reply's vectors are at most, where they are shorter than the model."""
SENT: Final = "sent"
"""The setting that tells an engine when a request that is sent again was first sent, in seconds of its clock."""

PAUSED: Final = "paused"
"""The reason of a device that waits for power: it has done nothing wrong, and its update may come another time."""

_HEADER_LIMIT: Final = 4096
"""A longer `.npy` header is not ours: numpy writes 128 bytes for any array of fewer than 32 dimensions."""

_PREAMBLE: Final = npy.magic(1, 0)
_NUMBER: Final = re.compile(r"[<>=|]?[fiub]\d{1,2}")
"""Type descriptions of plain numbers: no other ever reaches `np.dtype`, which knows many a surprise."""


class Refused(Exception):  # noqa: N818 - an outcome that is counted, not a programming error
    """A reply or an update that is not taken.

    Attributes:
        reason: one of a small fixed set of words, by which refusals are counted.
        detail: what exactly was wrong, for the log.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    @property
    def told(self) -> str:
        """What a client says to a server of its own refusal: the detail may tell of its files or its update."""
        return f"{self.reason}: this client takes no part, and its own log says why"


def failure_of(error: str | None) -> Refused:
    """Why a client that answered with an error takes no part: `paused` where it says so, else `client_error`."""
    reason = PAUSED if error is not None and error.startswith(f"{PAUSED}:") else "client_error"
    return Refused(reason, error or "the client gave no reason")


def config_of(request: RecordDict) -> ConfigRecord:
    """A request's configuration; raises `Refused` (`malformed`) where it has none."""
    record = record_in(request, CONFIG, ConfigRecord)
    if record is None:
        raise Refused("malformed", f"the request has no ConfigRecord {CONFIG!r}")
    return record


def integer_in(config: ConfigRecord, key: str) -> int:
    """A whole number of a request's configuration; raises `Refused` (`malformed`) where it is none."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise Refused("malformed", f"the request's {key!r} should be a whole number, not {value!r}")
    return value


def pack(array: NDArray[np.generic]) -> Array:
    """An array as Flower's `Array`, copied once (Flower's own conversion copies three times)."""
    array = np.asarray(array, order="C")
    header, dtype = _npy_header(array.dtype, array.shape)
    return Array(
        dtype=dtype,
        shape=array.shape,
        stype="numpy.ndarray",
        data=b"".join((header, array.data if array.size else b"")),
    )


@lru_cache(maxsize=1024)  # the same few for every message
def _npy_header(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> tuple[bytes, str]:
    """The header of the .npy format 1.0 of a C-contiguous array, and the name of its type."""
    header = BytesIO()
    described = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(header, described)
    return header.getvalue(), str(dtype)


def unpack(array: Array, what: str = "array") -> NDArray[np.generic]:
    """A read-only view of an `Array`'s bytes, without a copy.

    Only the bytes are believed, never the dtype and shape that the record states beside them.

    Raises:
        Refused: `malformed`, when the bytes are not one whole `.npy` array; `dtype`, when not of native numbers.
    """
    data = array.data
    start, shape, fortran, dtype = _header(data, what)
    if not dtype.isnative:
        raise Refused("dtype", f"{what} holds {dtype}, which is not a plain native number")
    count = math.prod(shape)
    if len(data) - start != count * dtype.itemsize:
        raise Refused("malformed", f"{what} of shape {shape} does not fill its {len(data)} bytes")
    try:
        flat = np.frombuffer(data, dtype, count, start)
        return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    except ValueError as error:  # more axes than numpy has, or an empty array that is too wide
        raise Refused("malformed", f"{what} cannot have its shape: {error}") from error


def _header(data: bytes, what: str) -> tuple[int, tuple[int, ...], bool, np.dtype[np.generic]]:
    """Where the elements begin, their shape, whether in Fortran order, and their type."""
    begin = len(_PREAMBLE) + 2
    end = begin + int.from_bytes(data[begin - 2 : begin], "little")
    if not data.startswith(_PREAMBLE) or not begin < end <= min(len(data), _HEADER_LIMIT):
        raise Refused("malformed", f"{what} has no whole header of the .npy format 1.0")
    try:
        return end, *_described(data[begin:end])
    except Refused as refusal:
        raise Refused(refusal.reason, f"{what} {refusal.detail}") from refusal


@lru_cache(maxsize=1024)  # a cohort's replies repeat the model's few headers, and parsing is slow
def _described(text: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, order and type by a `.npy` header's text.

    numpy's own reader takes descriptions of any type and falls back on a tokenizer for headers of Python 2: hostile
    bytes make it raise what it doesn't document, and warn.
    """
    try:
        header = ast.literal_eval(text.decode("ascii"))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise Refused("malformed", f"has no readable .npy header: {error}") from error
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise Refused("malformed", "has a .npy header with other keys than the format's")
    shape, fortran, descr = header["shape"], header["fortran_order"], header["descr"]
    if (
        not isinstance(shape, tuple)
        or not all(type(length) is int and 0 <= length < 1 << 63 for length in shape)
        or not isinstance(fortran, bool)
    ):
        raise Refused("malformed", "has a .npy header with an impossible shape or order")
    if not isinstance(descr, str):
        raise Refused("dtype", "holds a structure, which is not a plain native number")
    if not _NUMBER.fullmatch(descr):
        raise Refused("dtype", f"holds {descr[:40]!r}, which is not a plain native number")
    try:
        return shape, fortran, np.dtype(descr)
    except TypeError as error:
        raise Refused("dtype", f"holds {descr!r}, which numpy does not know") from error


def pack_model(arrays: Mapping[str, NDArray[np.generic]]) -> ArrayRecord:
    """Named arrays as a record, in order."""
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = pack(array)
    return record


def unpack_model(record: ArrayRecord) -> dict[str, NDArray[np.generic]]:
    """Named arrays of a record, in order, without a copy.

    Raises:
        Refused: `malformed` or `dtype`, for an array that is not one.
    """
    return {name: unpack(array, f"array {name!r}") for name, array in record.items()}
