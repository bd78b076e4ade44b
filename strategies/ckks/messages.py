"""The protocol's records in messages; what a peer says in them is checked as it is read."""

from __future__ import annotations

from typing import Final

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from strategies.records import record_in
from strategies.wire import Refused

CKKS: Final = "ckks"
"""The record of a message that holds what the protocol says."""
CIPHERTEXTS: Final = "ciphertexts"
"""The record, and the array in it, of an upload or of an encrypted sum."""
PLAIN: Final = "plain"
"""The record, and the array in it, of a sum that was opened."""
ID_BYTES: Final = 16
FINGERPRINT_LENGTH: Final = 32


def said_in(content: RecordDict) -> ConfigRecord:
    """What a message says; raises `Refused` (`missing`) where it says nothing."""
    record = record_in(content, CKKS, ConfigRecord)
    if record is None:
        raise Refused("missing", f"the message has no ConfigRecord {CKKS!r}")
    return record


def octets(said: ConfigRecord, name: str, length: int) -> bytes:
    """Exactly so many bytes; raises `Refused` (`malformed`)."""
    value = said.get(name)
    if not isinstance(value, bytes) or len(value) != length:
        found = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
        raise Refused("malformed", f"{name} should be {length} bytes, not {found}")
    return value


def carrier(name: str, blob: bytes) -> ArrayRecord:
    """Bytes as a record with one array."""
    array = Array(dtype="uint8", shape=(len(blob),), stype="numpy.ndarray", data=blob)
    return ArrayRecord({name: array})


def data_in(content: RecordDict, name: str) -> bytes:
    """The bytes of such a record; raises `Refused` (`missing`) where there is none."""
    record = record_in(content, name, ArrayRecord)
    if record is None or set(record) != {name}:
        raise Refused("missing", f"the message has no {name}")
    return record[name].data
