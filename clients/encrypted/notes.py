"""What owners and the compute party write beside their arrays: a note of plain data, and the steps that it names.

A note is JSON text in an array of bytes, both ways. What a stranger's note says is checked here, value by value, and
refused with a reason; nothing else of a note is looked at.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from clients.encrypted.evaluation import Packed
from clients.encrypted.memory import BatchKey
from strategies import plain_json
from strategies.wire import Refused

NOTE: Final = "note"
"""JSON text as bytes, both ways."""
WANT: Final = "want"
MEANS: Final = "means"
LOGITS: Final = "logits"
KEYS: Final = "keys"
BATCH: Final = "batch"

Arrays = Mapping[str, NDArray[np.generic]]
MOST_NOTE: Final = 65_536
"""Bytes."""
_HEX: Final = re.compile(r"[0-9a-f]{32}")
_MOST_BATCHES: Final = 4096


@dataclass(frozen=True)
class Step:
    """What an owner's step is on.

    Attributes:
        fingerprint: of its key.
        data: by which it knows its mini-batches, with this key and plan.
        batch: which of them.
    """

    fingerprint: str
    data: str
    batch: int

    def key(self, kind: str) -> BatchKey:
        """Where ciphertexts of a kind lie."""
        told = f"{self.fingerprint} {self.data} {kind}".encode()
        return BatchKey(hashlib.sha256(told).hexdigest()[:32], self.batch)


def note(content: Mapping[str, object]) -> NDArray[np.uint8]:
    """Plain data as an array."""
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def read_note(arrays: Arrays) -> dict[str, Any]:
    """The note among a turn's arrays, empty where there is none; raises `Refused` (`malformed`)."""
    array = arrays.get(NOTE)
    if array is None:
        return {}
    try:
        if array.dtype != np.uint8 or array.ndim != 1 or array.size > MOST_NOTE:
            raise ValueError(f"it is {array.dtype} {array.shape}")
        found = plain_json.loads(array.tobytes())
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise Refused("malformed", f"a turn's note can't be read: {error}") from error
    return found


def read_means(arrays: Arrays) -> dict[str, list[Packed]]:
    """The owner's side of the last answer; raises `Refused` (`malformed`, `missing`) where it is none."""
    told = read_note(arrays)
    if WANT in told:
        raise Refused("missing", f"the compute party has lost {' and '.join(map(str, told[WANT]))}")
    means: Any = told.get(MEANS)
    try:
        return {
            str(name): [
                Packed(
                    arrays[f"{name}/{index}"].astype(np.uint64, copy=False),
                    float(scale),
                    int(leaves),
                )
                for index, (scale, leaves) in enumerate(items)
            ]
            for name, items in means.items()
        }
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise Refused("malformed", f"no mean gradients came: {error}") from error


def step_of(told: Mapping[str, Any]) -> Step:
    """The step that an owner's note names; raises `Refused` (`malformed`)."""
    fingerprint, data, batch = (told.get(name) for name in ("fingerprint", "data", "batch"))
    for name, value in (("fingerprint", fingerprint), ("data", data)):
        if not isinstance(value, str) or not _HEX.fullmatch(value):
            raise Refused("malformed", f"the note's {name} should be 32 hexadecimal digits")
    if type(batch) is not int or not 0 <= batch < _MOST_BATCHES:
        raise Refused("malformed", f"the note's batch should be a number below {_MOST_BATCHES}")
    return Step(cast(str, fingerprint), cast(str, data), batch)
