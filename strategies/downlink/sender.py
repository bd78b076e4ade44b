"""The server's half: who holds which version, and for each request the least that makes the present one of it.

    round t:   x̂_t ← the server's model on its grid
               to a client that holds x̂_s, still remembered:   x̂_t − x̂_s, packed
               to any other:                                    x̂_t
    reply:     the client holds x̂_t

Clients that take part now and then are the usual case (Dorfman et al. 2023, "DoCoFL: Downlink Compression for
Cross-Device Federated Learning"): the last versions are remembered, and a change is computed from whichever of them a
client holds. Nothing that a client says is believed: it restores what it was sent and holds that against the digest,
and one that can't says so and is sent the whole at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from strategies.contract import Claim
from strategies.downlink.coding import Codec, Packed, pack, unpack
from strategies.downlink.grid import Array, exponent_of, rounded
from strategies.downlink.messages import Change, mark_of, marked
from strategies.protocols import Request
from strategies.ranges import Ranged
from strategies.records import record_in
from strategies.secagg.terms import ModelDigest
from strategies.sizes import count_bytes
from strategies.state import State, Value, integer_in, mapping_in
from strategies.wire import ARRAYS, Refused, pack_model, unpack_model


@dataclass(frozen=True)
class _Version:
    """A model that was sent.

    Attributes:
        record: as it is sent whole.
        digest: of the record.
        exponents: of its arrays' grids; None where one of them has none, and no change leads to or from it.
        mark: what names it.
        step: the change from the version before, where there is one.
    """

    record: ArrayRecord
    digest: bytes
    exponents: tuple[int, ...] | None
    mark: ConfigRecord
    step: Packed | None = None


@dataclass
class Downlink(Ranged):
    """Sends clients what has changed since the version that they hold.

    Attributes:
        bits: the model that clients train on is rounded to 2^−bits of each array's rms, or finer.
        versions: how many of the last versions sent are remembered. A client that holds an older one is sent the whole
            model. Each takes the model's size of memory.
        codec: what compresses changes.
    """

    bits: Annotated[int, Ge(2), Le(20)] = 8
    versions: Annotated[int, Ge(2), Le(1000)] = 16
    codec: Codec = "zstd"
    _ring: dict[int, _Version] = field(default_factory=dict, init=False, repr=False)
    _holders: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _changes: dict[int, Change | None] = field(default_factory=dict, init=False, repr=False)
    _digest: ModelDigest = field(default_factory=ModelDigest, init=False, repr=False)

    label = "downlink=delta"

    def check(self, claim: Claim) -> Claim:
        """Clients must restore what they are sent. Of the aggregate nothing changes: the model is released already.

        Raises:
            ContractError: clients have no client half, or are sent no model.
        """
        claim.need_client_half(self)
        claim.need_model_sent(
            self,
            why="clients are sent no model, so there is none for a change to be added to",
            instead="set downlink=none",
        )
        return claim

    def release(self, arrays: Mapping[str, Array]) -> ArrayRecord:
        """The model of the present version as all its clients see it: the same record for the same bits.

        Args:
            arrays: the server's, by name, in the dtypes in which they are sent.
        """
        found = [exponent_of(array, self.bits) for array in arrays.values()]
        grid = tuple(e for e in found if e is not None)
        exponents = grid if len(grid) == len(found) else None
        on_grid = {
            name: rounded(array, exponent)
            for (name, array), exponent in zip(arrays.items(), found, strict=True)
        }
        record = pack_model(on_grid)
        digest = self._digest.of({ARRAYS: record})
        number, last = next(reversed(self._ring.items()), (0, None))
        if last is not None and last.digest == digest:
            return last.record
        step = None if last is None else self._packed(last, on_grid, exponents)
        self._add(number + 1, _Version(record, digest, exponents, mark_of(digest), step))
        return record

    def content(self, request: Request) -> RecordDict:
        """What is sent for a request: a change in the model's place where that is smaller, the model marked where not.

        A request that carries no model of the last versions stays as it is.
        """
        number = self._version_in(request)
        if number is None:
            return request.content
        change = self._change(self._holders.get(request.client), number)
        if change is None:
            return marked(request.content, self._ring[number].mark)
        return change.instead(request.content)

    def answered(self, request: Request) -> None:
        """The client has answered: it holds the model of that request."""
        number = self._version_in(request)
        if number is not None:
            self._holders[request.client] = number

    def lost(self, client: int) -> None:
        """The client may hold nothing: it is sent the whole model next."""
        self._holders.pop(client, None)

    def state_dict(self) -> State:
        """The last version sent, the changes that led to it, and who holds which: a restart costs no bytes."""
        numbers = list(self._ring)
        newest: Mapping[str, Array] = (
            unpack_model(self._ring[numbers[-1]].record) if numbers else {}
        )
        return {
            "newest": dict(newest),
            # What came before the oldest is forgotten, and so is the change from it.
            "versions": {
                str(number): _told(self._ring[number], first=number == numbers[0])
                for number in numbers
            },
            "holders": {str(client): number for client, number in self._holders.items()},
        }

    def load_state_dict(self, state: State) -> None:
        """Takes up an earlier process's memory.

        Raises:
            ValueError: the state is another part's, or its versions do not follow from one another.
        """
        arrays = {n: a for n, a in mapping_in(state, "newest").items() if isinstance(a, np.ndarray)}
        told = mapping_in(state, "versions")
        ring: dict[int, _Version] = {}
        for number in sorted(map(int, told), reverse=True):
            ring[number] = version = self._read(mapping_in(told, str(number)), arrays)
            if version.step is None:
                break
            try:
                arrays = unpack(arrays, version.step, back=True)
            except Refused as refused:
                raise ValueError(
                    f"the downlink's version {number} can't be read: {refused}"
                ) from refused
        self._ring = {number: ring[number] for number in sorted(ring)}
        holders = mapping_in(state, "holders")
        self._holders = {int(client): integer_in(holders, client) for client in holders}
        self._changes.clear()

    def _add(self, number: int, version: _Version) -> None:
        self._ring[number] = version
        for old in list(self._ring)[: -self.versions]:
            del self._ring[old]
        self._holders = {c: held for c, held in self._holders.items() if held in self._ring}
        self._changes.clear()

    def _version_in(self, request: Request) -> int | None:
        """Which of the remembered versions a request carries."""
        record = record_in(request.content, ARRAYS, ArrayRecord)
        if record is None:
            return None
        for number, version in self._ring.items():
            if version.record is record:
                return number
        # Of an earlier process, say, that had it under way.
        digest = self._digest.of({ARRAYS: record})
        return next((n for n, version in self._ring.items() if version.digest == digest), None)

    def _change(self, held: int | None, number: int) -> Change | None:
        """The change that makes this version of a held one; None where the whole model is to go."""
        if held is None or held not in self._ring:
            return None
        newest = next(reversed(self._ring))
        if number != newest:  # a straggler's second request, say: not worth remembering
            return self._make(held, number)
        if held not in self._changes:
            self._changes[held] = self._make(held, number)
        return self._changes[held]

    def _make(self, held: int, number: int) -> Change | None:
        base, version = self._ring[held], self._ring[number]
        follows = version.step is not None and held == number - 1
        arrays = unpack_model(version.record)
        packed = version.step if follows else self._packed(base, arrays, version.exponents)
        if packed is None:
            return None
        change = Change(version.digest, base.digest, packed)
        whole = marked(RecordDict({ARRAYS: version.record}), version.mark)
        return change if change.size < count_bytes(whole) else None

    def _packed(
        self, base: _Version, target: Mapping[str, Array], exponents: tuple[int, ...] | None
    ) -> Packed | None:
        if base.exponents is None or exponents is None:
            return None
        finer = [min(one, other) for one, other in zip(base.exponents, exponents, strict=True)]
        return pack(unpack_model(base.record), target, finer, self.codec)

    def _read(self, told: State, arrays: Mapping[str, Array]) -> _Version:
        """A version of a state, its digest checked."""
        record = pack_model(arrays)
        digest, known = self._digest.of({ARRAYS: record}), told["digest"]
        if not isinstance(known, str) or digest.hex() != known:
            raise ValueError("the downlink's versions do not follow from one another")
        exponents = told["exponents"]
        grid = None if exponents is None else tuple(map(int, np.asarray(exponents)))
        step = None if told["step"] is None else _step_of(mapping_in(told, "step"))
        return _Version(record, digest, grid, mark_of(digest), step)


def _told(version: _Version, *, first: bool) -> dict[str, Value]:
    step = None if first else version.step
    return {
        "digest": version.digest.hex(),
        "exponents": None if version.exponents is None else np.array(version.exponents, np.int16),
        "step": None
        if step is None
        else {
            "codec": step.codec,
            "exponents": np.array(step.exponents, np.int16),
            "widths": np.array(step.widths, np.uint8),
            "planes": {
                str(n): np.frombuffer(plane, np.uint8) for n, plane in enumerate(step.planes)
            },
        },
    }


def _step_of(told: State) -> Packed:
    planes = mapping_in(told, "planes")
    return Packed(
        str(told["codec"]),
        tuple(map(int, np.asarray(told["exponents"]))),
        tuple(map(int, np.asarray(told["widths"]))),
        tuple(np.asarray(planes[str(number)], np.uint8).tobytes() for number in range(len(planes))),
    )
