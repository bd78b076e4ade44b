"""The compute party: it has the model, the owners' public keys and their ciphertexts, and can read none of them.

One step of an owner: its note says which key and which mini-batch; what is not on this disk is asked for; then come the
forward pass, with cross-entropy a turn in which the owner answers the logits, the way back, and the packed means of the
gradients. Keys and ciphertexts stay on the disk, so that a party that is started again goes on.

Everything that an owner sends is hostile until checked. A secret key is refused wherever it could be handed over, and
the workers, which do the work (`crew`), are started afresh and never hold one.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from filelock import FileLock, Timeout

from clients.encrypted import ranges
from clients.encrypted.crew import Crew
from clients.encrypted.evaluation import Packed, Value
from clients.encrypted.footprint import MB
from clients.encrypted.governor import Governor, MemoryLimit
from clients.encrypted.key_frames import EvaluationKeys, evaluation_bytes
from clients.encrypted.keyring import Keyring
from clients.encrypted.keys import public_only
from clients.encrypted.levers import Dial, Order
from clients.encrypted.memory import CiphertextCache
from clients.encrypted.notes import BATCH, KEYS, Arrays, Step
from clients.encrypted.owner import INPUTS, LABELS, LOSS, PACKED, Fresh
from clients.encrypted.plan import Plan
from clients.encrypted.ring import Desk
from clients.encrypted.sizes import kinds, stored_bytes
from clients.encrypted.spec import bias, weight
from clients.encrypted.stock import Held, Stock
from strategies.ckks.streams import CiphertextError

_MOST_OWNERS: Final = 64
"""Owners whose keys are kept on the disk."""
_KEYS_HEAD: Final = 4096
"""Bytes of a file of keys beside the keys, at the most."""
_LEAST_CHUNK: Final = 16


class FolderInUseError(RuntimeError):
    """Another compute party is at work in the folder."""


class ComputeParty:
    """Steps for any number of owners, one at a time.

    Args:
        plan: of the steps.
        folder: where keys and ciphertexts stay.
        workers: processes that compute.
        memory: limit of this process and all its children.
        cache_mb: of ciphertexts that are kept in memory.
        disk_mb: of ciphertexts that stay on the disk, of all owners.
        owner_disk_mb: the same, of one owner.
        chunk: packed means in the making at once, by a worker.

    Raises:
        FolderInUseError: another party has the folder, until it is closed.
        SecretKeyError: a secret key was handed over.
    """

    def __init__(
        self, plan: Plan, folder: Path, *, workers: int = 2, memory: MemoryLimit | None = None,
        cache_mb: float = 64.0, chunk: int = 512, disk_mb: float = 50_000.0,
        owner_disk_mb: float = 20_000.0,
    ) -> None:  # fmt: skip
        for handed in (plan, folder, memory):
            public_only(handed)
        self.plan, self.folder, self._held = plan, folder, _hold(folder)
        most = _MOST_OWNERS * (evaluation_bytes(plan.ring, plan.galois) + _KEYS_HEAD)
        self._keyring = Keyring(folder / "keys", most)
        self._cache = CiphertextCache(folder / "ciphertexts", cache_mb)
        most, most_each = int(disk_mb * MB), int(owner_disk_mb * MB)
        self._stock = Stock(self._cache, folder / "owners.json", most, most_each)
        self._crew = Crew(plan, folder / "keys", folder / "ciphertexts", workers, chunk)
        self.desk = Desk(plan.ring)
        self.lock = threading.Lock()
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
        self._held.release()

    def let_go(self) -> None:
        """Ends the workers, and with them what waits; they start again with the next step."""
        self._crew.close()

    def wanted(self, step: Step) -> list[str]:
        """What of an owner is not here: `keys`, `batch`."""
        wants = []
        plan = self.plan
        if self._keyring.load(step.fingerprint, plan.ring, plan.galois) is None:
            wants.append(KEYS)
        batch = [step.key(kind) for kind in kinds(plan)]
        self._stock.used(batch)
        if self._cache.missing(batch):
            wants.append(BATCH)
        return wants

    def take(self, step: Step, arrays: Arrays, client: int = 0) -> None:
        """Takes what an owner was asked for.

        Raises:
            CiphertextError: it is none.
            OSError: the disk has no room, or can't be written.
        """
        plan = self.plan
        found = {
            name.removeprefix("keys."): array
            for name, array in arrays.items()
            if name.startswith("keys.")
        }
        if found:
            keys = EvaluationKeys.from_arrays(found, plan.ring, plan.galois)
            if keys.fingerprint != step.fingerprint:
                raise CiphertextError(
                    "the evaluation keys belong to another key than the note says"
                )
            self._assign(step, client)
            self._keyring.save(keys)
        if any(name.startswith(f"{INPUTS}.") for name in arrays):
            sizes, fresh = stored_bytes(plan), dict[str, Fresh]()
            for kind, shape in kinds(plan).items():
                fresh[kind] = Fresh.from_arrays(arrays, kind, plan.ring, *shape)
            self._assign(step, client)
            self._stock.reserve(client, {step.key(kind): size for kind, size in sizes.items()})
            self._crew.trim()
            for kind, sent in fresh.items():
                self._cache.put(step.key(kind), sent.whole(self.desk))
                self.governor.check()

    def _assign(self, step: Step, client: int) -> None:
        """Forgets what an owner had under another key, or of other data."""
        folders = tuple(step.key(kind).owner for kind in kinds(self.plan))
        gone = self._stock.assign(client, Held(step.fingerprint, folders))
        if gone is not None:
            self._keyring.forget(gone)

    def forward(self, step: Step, weights: Arrays) -> Value:
        """The outputs of a mini-batch: (K, 2, level, N).

        Raises:
            ranges.RangeError, WeightRangeError: the weights are too large for the ring.
            BatchMissingError: the ciphertexts turn out to be torn, and must be sent again.
            WorkerError, MemoryLimitError: as these say.
        """
        ranges.check(self.plan, weights)
        self.governor.check()
        self._crew.each("begin", step.fingerprint, step.key(INPUTS), _version(weights))
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
        if not all(crew.each("resume", step.fingerprint, step.key(INPUTS), _version(weights))):
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


def _version(weights: Arrays) -> str:
    """Of the model: what waits in the workers is of one."""
    hashed = hashlib.sha256()
    for name in sorted(weights):
        hashed.update(np.ascontiguousarray(weights[name]).data)
    return hashed.hexdigest()


def _hold(folder: Path) -> FileLock:
    """The folder, for this party alone."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderInUseError(
            f"another compute party is at work in {folder}: wait until it has ended, or name another folder"
        ) from None
    return lock
