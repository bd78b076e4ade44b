"""Flower's records without what they cost a small client: each value checked on its way in, each view a copy.

The one file of this package that knows how flwr 1.41 keeps a record's items (`_data`). For records whose values are our
own and known to be right; what a peer sends has been checked by Flower as it was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

Record = TypeVar("Record", ArrayRecord, MetricRecord, ConfigRecord)


def bundle(records: Mapping[str, ArrayRecord | MetricRecord | ConfigRecord]) -> RecordDict:
    """A new RecordDict that holds these records themselves, in order."""
    content = RecordDict()
    content.__dict__["_data"].update(records)
    return content


def extended(record: Record, items: Mapping[str, Any]) -> Record:
    """A copy of a record with further items, or others in their place."""
    copy = record.copy()
    copy.__dict__["_data"].update(items)
    return copy


def record_in(content: RecordDict, name: str, kind: type[Record]) -> Record | None:
    """The record of this name and kind; None where there is none."""
    record = content.__dict__["_data"].get(name)
    return record if isinstance(record, kind) else None


def records_in(content: RecordDict, kind: type[Record]) -> dict[str, Record]:
    """All records of a kind by name."""
    return {name: record for name, record in content.items() if isinstance(record, kind)}
