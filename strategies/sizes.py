"""How many bytes records take on the wire, without serialising them.

A run reports its traffic message by message, and Flower's own serialisation only to count it cost more than all else
that is done for a small client. The rules are protobuf's encoding (varints, zigzag, tags); values that they don't cover
here are serialised after all, so the figure is always `len(record.deflate())`.
"""

from __future__ import annotations

from typing import Final

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

_INT64: Final = 1 << 63


def count_bytes(content: RecordDict) -> int:
    """Bytes that the records of one message take on the wire: array data with their names, other records serialised.

    Raises:
        ValueError, TypeError: a value that no wire carries, such as an integer past 64 bits.
    """
    total = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            total += sum(len(name) + len(array.data) for name, array in record.items())
        else:
            total += record_bytes(record)
    return total


def record_bytes(record: ConfigRecord | MetricRecord) -> int:
    """`len(record.deflate())`.

    Raises:
        ValueError, TypeError: as `deflate`.
    """
    body = 0
    for key, value in record.items():
        held = _value_bytes(value)
        if held is None:
            return len(record.deflate())
        named = _framed(len(key.encode())) if key else 0  # an empty text is protobuf's default, and left out
        body += _framed(named + _framed(held))
    # The header of an object: its type, the ids of its children (none), and the length of its body.
    return len(f"{type(record).__name__}  {body}") + 1 + body


def _value_bytes(value: object) -> int | None:
    """Bytes of a value's message with its tag, None for kinds that are better left to Flower."""
    kind = type(value)
    if kind is str:
        return _framed(len(value.encode()))  # type: ignore[attr-defined]
    if kind is bool:
        return 2
    if kind is int and -_INT64 <= value < _INT64:  # type: ignore[operator]
        return 1 + _varint_bytes(2 * value if value >= 0 else -2 * value - 1)  # type: ignore[operator]
    if kind is float:
        return 9
    if kind is list and all(type(item) is str for item in value):  # type: ignore[attr-defined]
        held = sum(_framed(len(item.encode())) for item in value)  # type: ignore[attr-defined]
        return 1 + _framed(held)  # a list's field number takes a tag of two bytes
    return None


def _framed(length: int) -> int:
    """Bytes of a field of `length` bytes, with its tag and its length."""
    return 1 + _varint_bytes(length) + length


def _varint_bytes(number: int) -> int:
    """Bytes of a number ≥ 0 at seven bits each."""
    return (max(number.bit_length(), 1) + 6) // 7
