"""What the members of one session agree on, and how the protocol's messages are read: a peer's words are hostile.

Every key, sealed message and signature of a session is bound to all of its terms.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Annotated, Any, Final, get_type_hints

from annotated_types import Ge, Gt, MinLen
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from strategies.ranges import Ranged
from strategies.records import record_in
from strategies.secagg.keys import context
from strategies.wire import Refused

SECAGG: Final = "secagg"
"""The record of a message that holds what the protocol says."""
ID_BYTES: Final = 16
"""Length of the ids of runs and sessions."""
DIGEST_BYTES: Final = 32

LARGEST_ID: Final = 1 << 20
"""No list of clients is longer, no client's id beyond it fits the protocol's messages."""


@dataclass(frozen=True)
class Terms(Ranged):
    """One session.

    Attributes:
        run: the run's id, 16 bytes.
        session: this session's own id, 16 bytes: each attempt at a round has a new one.
        model: SHA-256 of the model that is trained on.
        round: the round's number.
        version: of that model.
        settings: SHA-256 of the configuration that all members train with (`config_digest`).
        members: clients in the session.
        cohort: SHA-256 of their ids, where these are told (malicious mode); 32 zero bytes elsewhere.
        degree: neighbours that a client has in the graph, or draws for itself.
        threshold: shares that give a secret back.
        quorum: survivors without which no sum is opened.
        malicious: the server is not trusted to follow the protocol.
        limit: largest magnitude of an element of an update.
        headroom: how far noise may lift a sum beyond `members · limit`, in the same units.
        metrics: names of the metrics within the mask.
        metric_limit: largest magnitude of a metric.
        max_weight: largest weight that counts, in examples; 0 where all weigh alike.
        stochastic: whether elements are rounded stochastically.

    Raises:
        ValueError: a term is out of its range.
    """

    run: Annotated[bytes, MinLen(ID_BYTES)]
    session: Annotated[bytes, MinLen(ID_BYTES)]
    model: Annotated[bytes, MinLen(DIGEST_BYTES)]
    round: Annotated[int, Ge(1)]
    version: Annotated[int, Ge(0)]
    settings: Annotated[bytes, MinLen(DIGEST_BYTES)]
    members: Annotated[int, Ge(3)]
    cohort: Annotated[bytes, MinLen(DIGEST_BYTES)]
    degree: Annotated[int, Ge(2)]
    threshold: Annotated[int, Ge(2)]
    quorum: Annotated[int, Ge(2)]
    malicious: bool
    limit: Annotated[float, Gt(0)]
    headroom: Annotated[float, Ge(0)]
    metrics: tuple[str, ...]
    metric_limit: Annotated[float, Gt(0)]
    max_weight: Annotated[float, Ge(0)]
    stochastic: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        ids, digests = (self.run, self.session), (self.model, self.settings)
        if max(map(len, ids)) > ID_BYTES or max(map(len, digests)) > DIGEST_BYTES:
            raise ValueError("an id or a digest of the terms is too long")
        if not 2 * self.threshold > self.degree + 1 >= self.threshold:
            raise ValueError(
                f"a threshold of {self.threshold} for {self.degree} neighbours: more than half of the "
                f"{self.degree + 1} shareholders are needed, or one half could open what the other hides"
            )
        if self.quorum > self.members or self.degree >= self.members:
            raise ValueError(
                f"{self.members} members can't have {self.degree} neighbours and a quorum of {self.quorum}"
            )

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over all terms."""
        text = json.dumps(self.record(), sort_keys=True, default=bytes.hex)
        return hashlib.sha256(text.encode()).digest()

    def context(self, purpose: str, /, **named: bytes | int | str) -> bytes:
        """What a key or a signature of this session is for."""
        return context(
            purpose,
            run=self.run,
            round=self.round,
            model=self.model,
            session=self.session,
            terms=self.digest,
            **named,
        )

    def record(self) -> dict[str, Any]:
        """The terms as a ConfigRecord's values."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return values | {"metrics": list(self.metrics)}

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Terms:
        """The terms out of a peer's values.

        Raises:
            Refused: `terms`, when one is missing, of another type or out of its range.
        """
        hints = _types()
        given: dict[str, Any] = {}
        for item in fields(cls):
            value = values.get(item.name)
            if item.name == "metrics" and isinstance(value, list):
                value = tuple(value)
            if type(value) is not (tuple if item.name == "metrics" else hints[item.name]):
                raise Refused("terms", f"{item.name} is {value!r:.60}")
            given[item.name] = value
        try:
            return cls(**given)
        except (ValueError, TypeError) as error:
            raise Refused("terms", str(error)) from error


@cache  # read in each step of each client
def _types() -> dict[str, Any]:
    return get_type_hints(Terms)


@dataclass(frozen=True)
class Said:
    """What a message's record of the protocol holds, each value checked as it is asked for."""

    values: Mapping[str, Any]

    @classmethod
    def of(cls, content: RecordDict) -> Said:
        """The record of a message.

        Raises:
            Refused: `missing`, when it has none.
        """
        record = record_in(content, SECAGG, ConfigRecord)
        if record is None:
            raise Refused("missing", f"the message has no ConfigRecord {SECAGG!r}")
        return cls(dict(record))

    def octets(self, name: str, length: int) -> bytes:
        """Exactly so many bytes; raises `Refused` (`malformed`)."""
        value = self.values.get(name)
        if not isinstance(value, bytes) or len(value) != length:
            said = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
            raise Refused("malformed", f"{name} should be {length} bytes, not {said}")
        return value

    def rows(self, name: str, count: int, length: int) -> list[bytes]:
        """So many strings of so many bytes; raises `Refused` (`malformed`)."""
        joined = self.octets(name, count * length)
        return [joined[begin : begin + length] for begin in range(0, count * length, length)]

    def clients(self, name: str) -> list[int]:
        """Ids of clients, ascending, each once; raises `Refused` (`malformed`)."""
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) > LARGEST_ID:
            raise Refused("malformed", f"{name} should be a list of clients")
        if not are_ids(value):
            raise Refused("malformed", f"{name} should be ids of clients, ascending, each once")
        return value

    def step(self) -> str:
        """Which of the protocol's steps the message belongs to."""
        return str(self.values.get("step"))


def are_ids(values: Sequence[object]) -> bool:
    """Whether these are ids of clients, ascending, each once."""
    last = -1
    for one in values:
        if type(one) is not int or not last < one < LARGEST_ID:
            return False
        last = one
    return True


def ids_digest(clients: Iterable[int]) -> bytes:
    """SHA-256 of a set of clients."""
    return hashlib.sha256(b"".join(one.to_bytes(4, "big") for one in sorted(clients))).digest()


class ModelDigest:
    """SHA-256 of a model as it travels: names, and each array's bytes with its header, in order.

    The last one is remembered: a process that plays many clients is sent the same records for all of them.
    """

    def __init__(self) -> None:
        self._last: tuple[Sequence[str], Sequence[ArrayRecord], bytes] = ((), (), b"")

    def of(self, records: Mapping[str, ArrayRecord]) -> bytes:
        """The digest of named array records, 32 bytes."""
        names = sorted(records)
        ordered = [records[name] for name in names]
        known, last, digest = self._last
        if known == names and all(a is b for a, b in zip(last, ordered, strict=True)):
            return digest
        hashed = hashlib.sha256()
        for name in names:
            for key, array in records[name].items():
                label = json.dumps([name, key, len(array.data)]).encode()
                hashed.update(len(label).to_bytes(4, "big") + label)
                hashed.update(array.data)
        self._last = names, ordered, hashed.digest()
        return hashed.digest()
