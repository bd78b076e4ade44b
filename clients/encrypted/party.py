"""The compute party: it has the model, the owners' public keys and their ciphertexts, and can read none of them.

One step of an owner: its note says which key and which mini-batch; what is not on this disk is asked for; then come the
forward pass, with cross-entropy a turn in which the owner answers the logits, the way back, and the packed means of the
gradients. Keys and ciphertexts stay on the disk, so that a party that is started again goes on.

Everything that an owner sends is hostile until checked. A secret key is refused wherever it could be handed over, and
the workers, which do the work (`crew`), are started afresh and never hold one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from clients.encrypted import ranges
from clients.encrypted.crew import Crew, WorkerError
from clients.encrypted.evaluation import Packed, Value
from clients.encrypted.governor import (
    Governor,
    MemoryLimit,
    MemoryLimitError,
    StepAbandonedError,
)
from clients.encrypted.key_frames import EvaluationKeys, evaluation_bytes
from clients.encrypted.keyring import Keyring
from clients.encrypted.levers import Dial, Order
from clients.encrypted.linear import WeightRangeError
from clients.encrypted.memory import BatchKey, BatchMissingError, CiphertextCache
from clients.encrypted.owner import ERRORS, INPUTS, LABELS, LOSS, PACKED, PACKED_ERRORS, Fresh
from clients.encrypted.plan import Plan
from clients.encrypted.ring import Desk
from clients.encrypted.spec import bias, weight
from strategies.ckks.streams import CiphertextError
from strategies.wire import Refused

log = logging.getLogger(__name__)

T = TypeVar("T")

NOTE: Final = "note"
"""JSON text as bytes, both ways."""
LOGITS: Final = "logits"
KEYS: Final = "keys"
BATCH: Final = "batch"
WANT: Final = "want"

Arrays = Mapping[str, NDArray[np.generic]]
_MOST_NOTE: Final = 4096
_HEX: Final = re.compile(r"[0-9a-f]{32}")
_MOST_OWNERS: Final = 64
"""Owners whose keys are kept on the disk."""
_MOST_BATCHES: Final = 4096
_LEAST_CHUNK: Final = 16


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
        if array.dtype != np.uint8 or array.ndim != 1 or array.size > _MOST_NOTE * 16:
            raise ValueError(f"it is {array.dtype} {array.shape}")
        found = json.loads(array.tobytes())
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise Refused("malformed", f"a turn's note can't be read: {error}") from error
    return found


class ComputeParty:
    """Steps for any number of owners, one at a time.

    Args:
        plan: of the steps.
        folder: where keys and ciphertexts stay.
        workers: processes that compute.
        memory: limit of this process and all its children.
        cache_mb: of ciphertexts that are kept in memory.
        chunk: packed means in the making at once, by a worker.
    """

    def __init__(
        self, plan: Plan, folder: Path, *, workers: int = 2, memory: MemoryLimit | None = None,
        cache_mb: float = 64.0, chunk: int = 512,
    ) -> None:  # fmt: skip
        self.plan, self._folder = plan, folder
        most = _MOST_OWNERS * (evaluation_bytes(plan.ring, plan.galois) + _MOST_NOTE)
        self._keyring = Keyring(folder / "keys", most)
        self._cache = CiphertextCache(folder / "ciphertexts", cache_mb)
        self._crew = Crew(plan, folder / "keys", folder / "ciphertexts", workers, chunk)
        self._desk = Desk(plan.ring)
        self._lock = threading.Lock()
        self.governor = Governor(memory or MemoryLimit())
        self._chunk = Dial(
            "chunks in flight", Order.CHUNKS, chunk, _LEAST_CHUNK, changed=self._crew.rest
        )
        self._workers = Dial("workers", Order.WORKERS, workers, changed=self._crew.resize)
        for lever in (self._cache, self._chunk, self._workers):
            self.governor.register(lever)
        self.governor.on_failure(self._cache.close)
        self.governor.on_failure(self._crew.close)
        self.governor.on_overrun(self._crew.interrupt)
        self.name = _name(folder)

    def __enter__(self) -> ComputeParty:
        self.governor.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        return self._crew.pids

    def close(self) -> None:
        """Ends the workers and lets go of memory; what is on the disk stays."""
        self._crew.close()
        self._cache.close()
        self.governor.__exit__(None, None, None)

    def let_go(self) -> None:
        """Ends the workers, and with them what waits; they start again with the next step."""
        self._crew.close()

    def wanted(self, step: Step) -> list[str]:
        """What of an owner is not here: `keys`, `batch`."""
        wants = []
        plan = self.plan
        if self._keyring.load(step.fingerprint, plan.ring, plan.galois) is None:
            wants.append(KEYS)
        if self._cache.missing(step.key(kind) for kind in self._kinds):
            wants.append(BATCH)
        return wants

    @property
    def _kinds(self) -> dict[str, tuple[int, int]]:
        """Ciphertexts and level of each kind that a mini-batch has."""
        plan = self.plan
        kinds = {
            INPUTS: (plan.inputs, plan.ring.levels),
            PACKED: (plan.packs(plan.spec.sizes[0]), 1),
        }
        if plan.spec.loss == "squared":
            kinds[LABELS] = (plan.spec.sizes[-1], plan.formats["o"].level)
        return kinds

    def take(self, step: Step, arrays: Arrays) -> None:
        """Takes what was asked for; raises `CiphertextError` for what is none."""
        plan = self.plan
        sent = {
            name.removeprefix("keys."): array
            for name, array in arrays.items()
            if name.startswith("keys.")
        }
        if sent:
            keys = EvaluationKeys.from_arrays(sent, plan.ring, plan.galois)
            if keys.fingerprint != step.fingerprint:
                raise CiphertextError(
                    "the evaluation keys belong to another key than the note says"
                )
            self._keyring.save(keys)
        if any(name.startswith(f"{INPUTS}.") for name in arrays):
            for kind, (units, level) in self._kinds.items():
                fresh = Fresh.from_arrays(arrays, kind, plan.ring, units, level)
                self._cache.put(step.key(kind), fresh.whole(self._desk))
                self.governor.check()

    def forward(self, step: Step, weights: Arrays) -> Value:
        """The outputs of a mini-batch: (K, 2, level, N).

        Raises:
            ranges.RangeError, WeightRangeError: the weights are too large for the ring.
            BatchMissingError: the ciphertexts turn out to be torn, and must be sent again.
            WorkerError, MemoryLimitError: as these say.
        """
        ranges.check(self.plan, weights)
        self.governor.check()
        self._crew.each("begin", step.fingerprint, step.key(INPUTS))
        spec, value = self.plan.spec, None
        for layer in range(spec.layers):
            shares = self._crew.share(layer)
            rows = [slice(share.start, share.stop) for share in shares]
            calls = [
                (layer, weights[weight(layer)][own], weights[bias(layer)][own], value)
                for own in rows
            ]
            value = _joined(self._crew.all("forward", calls))
            self.governor.check(midway=True)
        assert value is not None
        return value

    def backward(
        self, step: Step, weights: Arrays, errors: Value, packed_errors: Value | None
    ) -> dict[str, list[Packed]]:
        """Mean gradients, packed; after `forward`, which is computed again where it has been forgotten.

        Args:
            step: the same.
            weights: the same.
            errors: of the outputs.
            packed_errors: the same, packed; None where they are packed here.
        """
        crew, spec = self._crew, self.plan.spec
        if not all(crew.each("resume", step.fingerprint, step.key(INPUTS))):
            self.forward(step, weights)
        last, means, gradients = spec.layers - 1, dict[str, list[Packed]](), errors
        if spec.loss == "squared":
            means[LOSS] = crew.one("loss", errors)
            means[bias(last)] = crew.one("sums", errors)
        for layer in range(last, 0, -1):
            if layer == last and packed_errors is not None:
                packed = packed_errors
            else:
                packed = crew.one("pack", layer, gradients)
            means[weight(layer)] = _flat(crew.each("means", layer, packed))
            if layer < last:
                means[bias(layer)] = crew.one("sums", gradients)
            self.governor.check(midway=True)
            shares = crew.share(layer - 1)
            matrix = weights[weight(layer)]
            calls = [(layer - 1, matrix[:, own.start : own.stop], gradients) for own in shares]
            gradients = _joined(crew.all("backward", calls))
            self.governor.check(midway=True)
        self._first_means(step, means, errors)
        return means

    def _first_means(self, step: Step, means: dict[str, list[Packed]], errors: Value) -> None:
        crew, hidden = self._crew, self.plan.spec.layers > 1
        shares = crew.share(0)
        own = [
            None if hidden else Value(errors.residues[s.start : s.stop], errors.scale)
            for s in shares
        ]
        found = crew.all("first_means", [(step.key(PACKED), part) for part in own])
        means[weight(0)] = _flat(weights for weights, _ in found)
        if hidden:
            means[bias(0)] = _flat(biases for _, biases in found)
        self.governor.check(midway=True)

    def differences(self, step: Step, outputs: Value) -> Value:
        """Outputs less the step's stored labels."""
        return cast(Value, self._crew.one("differences", outputs, step.key(LABELS)))

    def learner(self, weights: Arrays) -> PartyLearner:
        """Steps with one version of the model."""
        return PartyLearner(self, {name: weights[name] for name in self.plan.spec.shapes})


class PartyLearner:
    """Owners' turns on one version of the model.

    Args:
        party: that computes.
        weights: the model's, by name.
    """

    def __init__(self, party: ComputeParty, weights: Arrays) -> None:
        self._party, self._weights = party, weights
        self._steps: dict[int, Step] = {}

    def answer(self, client: int, arrays: Arrays) -> dict[str, NDArray[np.generic]]:
        """What goes back for one turn of an owner.

        Raises:
            Refused: `malformed`, `phase`, `range`, `party`: what came is none of this protocol's, is out of order,
                leaves the ciphertexts' range, or can't be computed.
        """
        told = read_note(arrays)
        with self._party._lock:
            try:
                if f"{ERRORS}.first" in arrays:
                    return self._errors(self._known(client), arrays)
                if told:
                    self._steps[client] = _step(told)
                return self._forward(client, self._known(client), arrays)
            except CiphertextError as error:
                raise Refused("malformed", str(error)) from error
            except (ranges.RangeError, WeightRangeError) as error:
                raise Refused("range", str(error)) from error
            except (WorkerError, MemoryLimitError) as error:
                raise Refused("party", str(error)) from error

    def _known(self, client: int) -> Step:
        step = self._steps.get(client)
        if step is None:
            raise Refused("phase", "a step begins with a note of its key and mini-batch")
        return step

    def _forward(self, client: int, step: Step, arrays: Arrays) -> dict[str, NDArray[np.generic]]:
        party = self._party
        party.take(step, arrays)
        wants = party.wanted(step)
        if wants:
            return {NOTE: note({WANT: wants, "party": party.name})}
        try:
            if party.plan.spec.loss == "squared":
                return self._told(self._whole(lambda: self._strict(step)))
            outputs = self._whole(lambda: party.forward(step, self._weights))
        except BatchMissingError:
            return {NOTE: note({WANT: [BATCH], "party": party.name})}
        return {LOGITS: outputs.residues, NOTE: note({"scale": outputs.scale, "party": party.name})}

    def _errors(self, step: Step, arrays: Arrays) -> dict[str, NDArray[np.generic]]:
        party, plan = self._party, self._party.plan
        if plan.spec.loss == "squared":
            raise Refused("phase", "errors are computed here: an owner sends none")
        classes, form = plan.spec.sizes[-1], plan.formats["delta"]
        fresh = Fresh.from_arrays(arrays, ERRORS, plan.ring, classes, form.level)
        errors, packed = Value(fresh.whole(party._desk), 2.0**form.scale), None
        if plan.spec.layers > 1:
            sent = Fresh.from_arrays(arrays, PACKED_ERRORS, plan.ring, plan.packs(classes), 1)
            packed = Value(sent.whole(party._desk), 2.0**plan.scales.packed)
        means = self._whole(lambda: party.backward(step, self._weights, errors, packed))
        return self._told(means)

    def _strict(self, step: Step) -> dict[str, list[Packed]]:
        """A whole step whose errors are computed here."""
        outputs = self._party.forward(step, self._weights)
        errors = self._party.differences(step, outputs)
        return self._party.backward(step, self._weights, errors, None)

    def _whole(self, work: Callable[[], T]) -> T:
        """Work that can be done from what lies on the disk, begun again with less where the governor abandons it."""
        party = self._party
        while True:
            try:
                try:
                    return work()
                except WorkerError:
                    party.governor.check(midway=True)  # raises where it was the governor
                    raise
            except StepAbandonedError as told:
                log.warning("%s", told)
                party.let_go()

    def _told(self, means: Mapping[str, Sequence[Packed]]) -> dict[str, NDArray[np.generic]]:
        found: dict[str, NDArray[np.generic]] = {
            f"{name}/{index}": item.residues
            for name, items in means.items()
            for index, item in enumerate(items)
        }
        told = {
            name: [[item.scale, item.leaves] for item in items] for name, items in means.items()
        }
        return {**found, NOTE: note({"means": told, "party": self._party.name})}


def read_means(arrays: Arrays) -> dict[str, list[Packed]]:
    """The owner's side of the last answer; raises `Refused` (`malformed`, `missing`) where it is none."""
    told = read_note(arrays)
    if WANT in told:
        raise Refused("missing", f"the compute party has lost {' and '.join(map(str, told[WANT]))}")
    means = told.get("means")
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
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Refused("malformed", f"no mean gradients came: {error}") from error


def _step(told: Mapping[str, Any]) -> Step:
    """The step that an owner's note names."""
    fingerprint, data, batch = (told.get(name) for name in ("fingerprint", "data", "batch"))
    for name, value in (("fingerprint", fingerprint), ("data", data)):
        if not isinstance(value, str) or not _HEX.fullmatch(value):
            raise Refused("malformed", f"the note's {name} should be 32 hexadecimal digits")
    if type(batch) is not int or not 0 <= batch < _MOST_BATCHES:
        raise Refused("malformed", f"the note's batch should be a number below {_MOST_BATCHES}")
    return Step(cast(str, fingerprint), cast(str, data), batch)


def _joined(shares: Sequence[Value]) -> Value:
    """All units, of the shares of them."""
    return Value(np.concatenate([share.residues for share in shares]), shares[0].scale)


def _flat(items: Any) -> list[Packed]:
    return [packed for share in items for packed in share]


def _name(folder: Path) -> str:
    """By which owners know this party again; kept in its folder."""
    path = folder / "party"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        path.write_text(secrets.token_hex(8))
        return path.read_text().strip()
