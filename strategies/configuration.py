"""The digest of what all clients of a round are told alike, so that no server trains one of them on other settings.

A sum hides a client only among others that did as it did: a server that tells all but one of them to clip at nothing
reads that one's update out of the sum. What protects a sum binds this digest.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from typing import Final

from flwr.app import ArrayRecord, RecordDict

from strategies.wire import CONFIG, TRAINS, Refused, config_of

KEPT: Final = "kept"
"""The setting that tells a client of which of its updates it is to keep the state, beside the last one included: the
models that the run may be sent back to hold these."""

OWN: Final = frozenset({"client", "included", KEPT, "phase", "phases", TRAINS})
"""Settings that are each client's own, or each phase's."""


def kept_in(config: Mapping[str, object]) -> list[int]:
    """The rounds that a request's `KEPT` names.

    Raises:
        Refused: `malformed`, where it is no list of whole numbers.
    """
    kept = config.get(KEPT, [])
    if not isinstance(kept, list) or not all(type(number) is int for number in kept):
        raise Refused("malformed", f"the request's {KEPT!r} should be a list of whole numbers")
    return kept


def config_digest(config: Mapping[str, object]) -> bytes:
    """SHA-256 of a configuration less `OWN`, 32 bytes: the same before it travels and after.

    Raises:
        Refused: `malformed`, for a value that no ConfigRecord holds.
    """
    hashed = hashlib.sha256(b"common configuration 1")
    for key in sorted(config.keys() - OWN):
        hashed.update(_encoded(key))
        value = config[key]
        if isinstance(value, list):  # an empty list has lost its type once it has travelled
            hashed.update(b"l" + len(value).to_bytes(8, "big"))
            hashed.update(b"".join(map(_encoded, value)))
        else:
            hashed.update(_encoded(value))
    return hashed.digest()


def digest_of_request(request: RecordDict, protocol: str) -> bytes:
    """`config_digest` of a request that trains.

    Args:
        request: the message.
        protocol: name of the record that holds what the collector says.

    Raises:
        Refused: `malformed`, when the request has no configuration, or settings beside it that nothing binds.
    """
    beside = [
        name
        for name, record in request.items()
        if name not in (CONFIG, protocol) and not isinstance(record, ArrayRecord)
    ]
    if beside:
        raise Refused("malformed", f"the request has a record {beside[0]!r:.40} beside its config")
    return config_digest(config_of(request))


def _encoded(value: object) -> bytes:
    """A value with its type and length, so that no two configurations read alike."""
    match value:
        case bool():
            kind, data = b"b", bytes([value])
        case int():
            kind, data = b"i", value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)
        case float():
            kind, data = b"f", struct.pack(">d", value)
        case str():
            kind, data = b"s", value.encode(errors="surrogatepass")
        case bytes():
            kind, data = b"o", value
        case _:
            raise Refused("malformed", f"a setting is of the type {type(value).__name__}")
    return kind + len(data).to_bytes(8, "big") + data
