"""How many bytes records take on the wire, without serialising them.

A run reports its traffic message by message, and Flower's own serialisation only to count it cost more than all else
that is done for a small client. The rules are protobuf's encoding (varints, zigzag, tags); values that they don't cover
here are serialised after all, so the figure is always `len(record.deflate())`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

_INT64: Final = 1 << 63
_SHORT: Final = 128
"""Characters."""


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
        held = tuple(value) if isinstance(value, list) else value
        size = (_cached if _is_short(key, held) else _item_bytes)(key, held)
        if size is None:
            return len(record.deflate())
        body += size
    # The header of an object: its type, the ids of its children (none), and the length of its body.
    return len(f"{type(record).__name__}  {body}") + 1 + body


def _is_short(key: str, value: object) -> bool:
    """Whether an item may be remembered: a peer's values are not kept, whatever their size."""
    if isinstance(value, str):
        return len(key) + len(value) <= _SHORT
    if isinstance(value, tuple):
        return len(value) <= 4 and all(_is_short(key, item) for item in value)
    return len(key) <= _SHORT and isinstance(value, int | float) and abs(value) < _INT64


def _item_bytes(key: str, value: object) -> int | None:
    """Bytes of one item with its tag, None for values that are better left to Flower; a list comes as a tuple."""
    held = _value_bytes(value)
    if held is None:
        return None
    # An empty text is protobuf's default, and left out.
    return _framed((_framed(len(key.encode())) if key else 0) + _framed(held))


def _value_bytes(value: object) -> int | None:
    if isinstance(value, str):
        return _framed(len(value.encode()))
    if isinstance(value, bool):
        return 2
    if isinstance(value, int) and -_INT64 <= value < _INT64:
        return 1 + _varint_bytes(2 * value if value >= 0 else -2 * value - 1)
    if isinstance(value, float):
        return 9
    if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
        # A list's field number takes a tag of two bytes.
        return 1 + _framed(sum(_framed(len(item.encode())) for item in value))
    return None


_cached = lru_cache(maxsize=4096, typed=True)(_item_bytes)
"""A cohort's records are alike; 1, 1.0 and True are not."""


def _framed(length: int) -> int:
    """Bytes of a field of `length` bytes, with its tag and its length."""
    return 1 + _varint_bytes(length) + length


def _varint_bytes(number: int) -> int:
    """Bytes of a number ≥ 0 at seven bits each."""
    return (max(number.bit_length(), 1) + 6) // 7
