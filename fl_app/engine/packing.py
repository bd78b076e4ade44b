"""Messages as plain values, for the pipe between the engine and its own workers.

An array record that several messages share is packed once and is one object again at the other end. Arrays stay the
bytes that they are. Replies travel without metadata, which follows from the request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fl_app.engine.answering import describe
from fl_app.engine.flwr_internals import (
    ErrorCode,
    error_reply,
    metadata_fields,
    metadata_from,
    whole_message,
)

Packed = tuple[list[Any], list[Any]]
"""Array records, each once, and messages that name them by their index."""

_PLAIN = (bool, int, float, str, bytes)
_RECORDS: dict[str, type[ConfigRecord] | type[MetricRecord]] = {
    "config": ConfigRecord,
    "metric": MetricRecord,
}


def pack_requests(requests: Sequence[Message]) -> Packed:
    """A chunk of requests as plain values."""
    packer = _Packer()
    items = [
        (metadata_fields(request.metadata), packer.pack(request.content)) for request in requests
    ]
    return packer.tables, items


def unpack_requests(packed: Packed) -> list[Message]:
    """The chunk of requests; array records that were one object are one object."""
    tables, items = packed
    records = [_array_record(table) for table in tables]
    return [
        whole_message(metadata_from(fields), _content(content, records))
        for fields, content in items
    ]


def pack_replies(replies: Sequence[Message]) -> Packed:
    """What the replies carry, as plain values; a reply that cannot be packed becomes an error, alone."""
    packer = _Packer()
    items = [_packed_reply(packer, reply) for reply in replies]
    return packer.tables, items


def unpack_replies(packed: Packed, requests: Sequence[Message]) -> list[Message]:
    """Replies to `requests`.

    Raises:
        ValueError: there is not one reply for each request.
    """
    tables, items = packed
    records = [_array_record(table) for table in tables]
    replies = []
    for request, (kind, *rest) in zip(requests, items, strict=True):
        if kind == "error":
            code, reason = rest
            replies.append(error_reply(request, code, reason))
        else:
            replies.append(Message(_content(rest[0], records), reply_to=request))
    return replies


def _packed_reply(packer: _Packer, reply: Message) -> tuple[Any, ...]:
    try:
        if reply.has_error():
            return ("error", _plain(reply.error.code), _plain(reply.error.reason))
        return ("content", packer.pack(reply.content))
    except Exception as error:
        reason = f"the reply cannot be sent: {describe(error)}"
        return ("error", ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)


class _Packer:
    """Record dicts as plain values; `tables` holds each distinct array record once."""

    def __init__(self) -> None:
        self.tables: list[list[tuple[str, str, tuple[int, ...], str, bytes]]] = []
        self._indices: dict[int, int] = {}

    def pack(self, content: RecordDict) -> list[tuple[str, str, Any]]:
        packed: list[tuple[str, str, Any]] = []
        for name, record in content.items():
            if isinstance(record, ArrayRecord):
                packed.append((name, "arrays", self._index(record)))
            else:
                kind = "config" if isinstance(record, ConfigRecord) else "metric"
                packed.append((name, kind, {key: _plain(value) for key, value in record.items()}))
        return packed

    def _index(self, record: ArrayRecord) -> int:
        index = self._indices.get(id(record))
        if index is None:
            table = [
                (k, a.dtype, tuple(map(int, a.shape)), a.stype, _bytes(a.data))
                for k, a in record.items()
            ]
            index = self._indices[id(record)] = len(self.tables)
            self.tables.append(table)
        return index


def _bytes(data: object) -> bytes:
    if not isinstance(data, bytes):
        raise TypeError(f"an array's data is {type(data).__name__}, bytes are needed")
    return data


def _plain(value: Any) -> Any:
    """A record's value with subclasses (numpy's float64 is one of float) turned into their plain base."""
    if value is None or type(value) in _PLAIN:
        return value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, bytes):
        return bytes(value)
    raise TypeError(f"a record holds a {type(value).__name__}, which no Flower message can carry")


def _array_record(table: Iterable[tuple[str, str, tuple[int, ...], str, bytes]]) -> ArrayRecord:
    record = ArrayRecord()
    for name, dtype, shape, stype, data in table:
        record[name] = Array(dtype, shape, stype, data)
    return record


def _content(packed: Iterable[tuple[str, str, Any]], records: Sequence[ArrayRecord]) -> RecordDict:
    content = RecordDict()
    for name, kind, value in packed:
        content[name] = records[value] if kind == "arrays" else _RECORDS[kind](value)
    return content
