"""What a request says of the model that goes with it: the whole of it to be held, or a change of one that is held.

    held           model      SHA-256 of the model's record, which the client keeps from now on
                   base       of the one that the change is for; absent where the whole model travels
                   codec, exponents, widths      how the change is written (`strategies.downlink.coding`)
    held-planes    its planes, in place of the record `arrays`

Both records are gone before anything else sees the request.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from strategies.downlink.coding import REASON, Packed
from strategies.records import bundle, record_in
from strategies.sizes import count_bytes
from strategies.wire import ARRAYS, Refused, pack, unpack

HELD: Final = "held"
PLANES: Final = "held-planes"
DIGEST_BYTES: Final = 32


class Change:
    """A change as records, which the requests of all clients that hold the same model share.

    Args:
        model: digest of what comes of it.
        base: digest of what it is a change of.
        packed: the change.
    """

    def __init__(self, model: bytes, base: bytes, packed: Packed) -> None:
        count = len(packed.widths)
        self._said = ConfigRecord(
            {
                "model": model,
                "base": base,
                "codec": packed.codec,
                "exponents": struct.pack(f"<{count}h", *packed.exponents),
                "widths": bytes(packed.widths),
            }
        )
        self._planes = ArrayRecord()
        for number, plane in enumerate(packed.planes):
            self._planes[str(number)] = pack(np.frombuffer(plane, np.uint8))

    @property
    def size(self) -> int:
        """Bytes of the records."""
        return count_bytes(self.instead(RecordDict()))

    def instead(self, content: RecordDict) -> RecordDict:
        """The request with the change in the model's place."""
        others = {name: record for name, record in content.items() if name != ARRAYS}
        return bundle({HELD: self._said, PLANES: self._planes, **others})


def is_change(content: RecordDict) -> bool:
    """Whether a request carries a change in its model's place."""
    return PLANES in content


def marked(content: RecordDict, mark: ConfigRecord) -> RecordDict:
    """The request with its model named, so that the client keeps it."""
    return bundle({**content, HELD: mark})


def mark_of(model: bytes) -> ConfigRecord:
    """What names a model."""
    return ConfigRecord({"model": model})


def plain(content: RecordDict, model: ArrayRecord) -> RecordDict:
    """The request as it was before either, with this model."""
    others = {name: r for name, r in content.items() if name not in (HELD, PLANES, ARRAYS)}
    return bundle({ARRAYS: model, **others})


def digest_in(said: ConfigRecord, key: str) -> bytes:
    """A digest; raises `Refused` (`held`) where it is none."""
    value = said.get(key)
    if not isinstance(value, bytes) or len(value) != DIGEST_BYTES:
        raise Refused(REASON, f"{key!r} should be {DIGEST_BYTES} bytes, not {value!r:.80}")
    return value


def packed_in(content: RecordDict, said: ConfigRecord) -> Packed:
    """The change in a request; raises `Refused` (`held`) for one that is malformed."""
    planes = record_in(content, PLANES, ArrayRecord)
    exponents, widths = said.get("exponents"), said.get("widths")
    if planes is None or not isinstance(exponents, bytes) or not isinstance(widths, bytes):
        raise Refused(REASON, "the request has neither a model nor a change of one")
    if len(exponents) != 2 * len(widths) or list(planes) != [str(n) for n in range(len(planes))]:
        raise Refused(REASON, "the parts of the change do not go together")
    octets = [unpack(array, "a plane") for array in planes.values()]
    if any(plane.dtype != np.uint8 or plane.ndim != 1 for plane in octets):
        raise Refused(REASON, "a plane is not a row of bytes")
    return Packed(
        str(said.get("codec")),
        struct.unpack(f"<{len(widths)}h", exponents),
        tuple(widths),
        tuple(plane.tobytes() for plane in octets),
    )
