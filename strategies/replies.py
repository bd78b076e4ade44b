"""How an update travels: to the records of a reply, and back, held against what was asked for.

Only what the server knows itself is believed of a reply: who was asked, for which round, and how its vectors are laid
out. Vectors stay the reply's own bytes. A vanilla client's weights are read, too, as the way from what it was sent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from strategies.protocols import Job, Packing
from strategies.records import bundle, extended, record_in, records_in
from strategies.update import Layout, Section, Update, Vector
from strategies.wire import METRICS, NUM_EXAMPLES, RECEIPT, UPDATE, Refused, pack, unpack

_NO_ARRAYS: Final = ArrayRecord()
_NO_METRICS: Final = MetricRecord()
_NO_RECEIPT: Final = ConfigRecord()

_METRIC_LIMIT: Final = 64
_NAME: Final = re.compile(r"[\w.-]{1,64}")


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
