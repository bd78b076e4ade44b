"""How updates travel: an `Update` to Flower records and back, every byte of a peer taken for hostile until checked.

Vectors go as `.npy` bytes in Flower's own `Array`, so that any Flower tool can read them; they are read without a copy
and without numpy's general loader. Nothing is ever unpickled.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.lib import format as npy
from numpy.typing import NDArray

from strategies.records import bundle, extended, record_in, records_in
from strategies.update import Layout, Section, Update, Vector

if TYPE_CHECKING:
    from strategies.protocols import Job, Packing

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

_NO_ARRAYS: Final = ArrayRecord()
_NO_METRICS: Final = MetricRecord()
_NO_RECEIPT: Final = ConfigRecord()

_METRIC_LIMIT: Final = 64
_NAME: Final = re.compile(r"[\w.-]{1,64}")


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


@dataclass(frozen=True)
class Expected:
    """What the server asked for, against which a reply is held.

    Attributes:
        sections: layout by name of every section that must come, and no other may.
        client: logical id of the client that was asked.
        round: the round's number, from 1.
        version: the model version that was sent.
        packing: what unpacks sections, where some come packed.
    """

    sections: Mapping[str, Layout]
    client: int
    round: int
    version: int
    packing: Packing | None = None

    @classmethod
    def of(cls, job: Job, client: int) -> Expected:
        """What a job asks of a client."""
        return cls(job.wire, client, job.round, job.version, job.packing)


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


def write_update(update: Update, *, client: int, round_number: int) -> RecordDict:
    """The reply that carries one client's update: of each section its bytes, or (d,) float32 where it is not packed."""
    vectors = {name: pack(_travelling(section)) for name, section in update.sections.items()}
    receipt: dict[str, object] = {
        "client": client,
        "round": round_number,
        "version": update.version,
        "layouts": [section.layout.digest for section in update.sections.values()],
    }
    return bundle(
        {
            UPDATE: extended(_NO_ARRAYS, vectors),
            METRICS: _metrics({NUM_EXAMPLES: update.weight, **update.metrics}),
            RECEIPT: extended(_NO_RECEIPT, receipt),
        }
    )


def _travelling(section: Section) -> NDArray[np.generic]:
    """What travels for a section: its vector, or the bytes that stand for it."""
    return section.vector if section.packed is None else np.frombuffer(section.packed, np.uint8)


def _metrics(values: dict[str, float]) -> MetricRecord:
    if all(type(key) is str and type(value) is float for key, value in values.items()):
        return extended(_NO_METRICS, values)
    return MetricRecord(
        dict(values)
    )  # Flower says what a trainer of the user's own gave that it can't carry


def read_update(content: RecordDict, expected: Expected) -> Update:
    """The update in a reply, its vectors still the reply's own bytes.

    Raises:
        Refused: `missing`, `round`, `version`, `impostor`, `malformed`, `dtype`, `shape` or `num_examples`.
    """
    receipt = record_in(content, RECEIPT, ConfigRecord)
    vectors = record_in(content, UPDATE, ArrayRecord)
    if receipt is None or vectors is None:
        raise Refused(
            "missing",
            f"the reply has neither {UPDATE!r} with {RECEIPT!r}, only {sorted(map(str, content))}",
        )
    told = dict(receipt.items())
    for key, wanted, reason in (
        ("client", expected.client, "impostor"),
        ("round", expected.round, "round"),
        ("version", expected.version, "version"),
    ):
        if told.get(key) != wanted:
            raise Refused(reason, f"asked for {key} {wanted}, the receipt says {told.get(key)!r}")
    arrays = dict(vectors.items())  # Flower's records check every look at them
    if arrays.keys() != expected.sections.keys():
        raise Refused(
            "missing",
            f"sections {sorted(arrays)} came, {sorted(expected.sections)} were asked for",
        )
    digests = told.get("layouts")
    wanted_digests = [expected.sections[name].digest for name in arrays]
    if digests != wanted_digests:
        raise Refused(
            "shape",
            "the client laid its parameters out otherwise: its model differs from the server's",
        )
    sections = {
        name: Section(_section(arrays[name], layout, name, expected.packing), layout)
        for name, layout in expected.sections.items()
    }
    weight, metrics = read_metrics(content)
    return Update(sections, weight, (expected.client,), expected.version, metrics)


def _section(array: Array, layout: Layout, name: str, packing: Packing | None) -> Vector:
    if packing is None or name not in packing.sections:
        return _vector(array, layout, name)
    data, most = unpack(array, f"section {name!r}"), packing.most_bytes(layout)
    if data.dtype != np.uint8 or data.ndim != 1:
        raise Refused("dtype", f"section {name!r} holds {data.dtype}, packed bytes were asked for")
    if data.size > most:
        raise Refused("too_large", f"section {name!r} has {data.size} bytes, {most} at most")
    return packing.unpack(name, data.data, layout)


def read_weights(
    content: RecordDict,
    expected: Expected,
    sent: Mapping[str, NDArray[np.generic]],
    kinds: Mapping[str, str],
) -> Update:
    """The update of a vanilla client, which returns weights: they minus what it was sent.

    Args:
        content: a reply with exactly one ArrayRecord of named arrays and one MetricRecord with `num-examples`.
        expected: what was asked for.
        sent: the arrays that the client was sent.
        kinds: for each array the section that its change belongs to.

    Raises:
        Refused: as `read_update`.
    """
    beyond = sorted(set(expected.sections) - set(kinds.values()))
    if beyond:
        raise Refused("missing", f"weights alone do not make sections {beyond}")
    records = list(records_in(content, ArrayRecord).values())
    if len(records) != 1:
        raise Refused(
            "missing", f"a vanilla reply holds one ArrayRecord, this one holds {len(records)}"
        )
    record = records[0]
    if set(record) != set(sent):
        raise Refused(
            "shape", f"arrays {sorted(set(record) ^ set(sent))[:4]} are missing or unknown"
        )
    vectors = {
        name: np.empty(layout.size, np.float32) for name, layout in expected.sections.items()
    }
    views = {name: layout.views(vectors[name]) for name, layout in expected.sections.items()}
    for name, before in sent.items():
        after = unpack(record[name], f"array {name!r}")
        if after.dtype != before.dtype:
            raise Refused("dtype", f"array {name!r} holds {after.dtype}, {before.dtype} was sent")
        if after.shape != before.shape:
            raise Refused(
                "shape", f"array {name!r} has shape {after.shape}, {before.shape} was sent"
            )
        with np.errstate(
            invalid="ignore", over="ignore"
        ):  # admission refuses what is not finite, with its reason
            np.subtract(
                after,
                before,
                out=views[kinds[name]][name],
                dtype=_wide(before.dtype),
                casting="unsafe",
            )
    sections = {name: Section(vectors[name], layout) for name, layout in expected.sections.items()}
    weight, metrics = read_metrics(content)
    return Update(sections, weight, (expected.client,), expected.version, metrics)


def _wide(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """The type to subtract in: bool has no difference, unsigned ones wrap round, and float16 overflows."""
    return dtype if dtype.kind == "f" and dtype.itemsize >= 4 else np.dtype(np.float64)


def _vector(array: Array, layout: Layout, name: str) -> Vector:
    vector = unpack(array, f"section {name!r}")
    if vector.dtype != np.float32:
        raise Refused("dtype", f"section {name!r} holds {vector.dtype}, float32 was asked for")
    if vector.shape != (layout.size,):
        raise Refused(
            "shape", f"section {name!r} has shape {vector.shape}, ({layout.size},) was asked for"
        )
    return vector  # type: ignore[return-value]


def read_metrics(content: RecordDict) -> tuple[float, dict[str, float]]:
    """The number of examples and the other numbers of a reply; lists are left out.

    Raises:
        Refused: `missing`, `malformed` or `num_examples`.
    """
    records = list(records_in(content, MetricRecord).values())
    if len(records) != 1:
        raise Refused("missing", f"a reply holds one MetricRecord, this one holds {len(records)}")
    metrics = dict(records[0].items())
    if len(metrics) > _METRIC_LIMIT:
        raise Refused("malformed", f"{len(metrics)} metrics came, {_METRIC_LIMIT} are read at most")
    if not all(map(_NAME.fullmatch, metrics)):
        raise Refused(
            "malformed", "a metric's name is not 1 to 64 letters, digits, dots and dashes"
        )
    try:
        scalars = {
            key: float(value) for key, value in metrics.items() if isinstance(value, int | float)
        }
    except OverflowError as error:
        raise Refused("malformed", "a metric is an integer past the range of a float") from error
    if NUM_EXAMPLES not in scalars:
        raise Refused("num_examples", f"the metrics have no number {NUM_EXAMPLES!r}")
    weight = scalars.pop(NUM_EXAMPLES)
    return weight, scalars
