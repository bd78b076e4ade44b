"""What the data's owner does in a step: encrypts its mini-batches once, answers logits, reads mean gradients.

A mini-batch goes up as fresh ciphertexts, seeded: the features repeated, at the top level, for the forward pass; the
same packed, at level 1, for the first layer's gradient; and where the errors are computed on ciphertexts, the labels.
With cross-entropy the owner decrypts the logits of its own mini-batch, and encrypts their errors, softmax less label.
What comes at the end are mean gradients, which alone stand in what it decrypts: the rest is masked.

The model's weights are not known here. What is decrypted here is exact to the owner only: before any of it is told,
`flooding` has to cover what a decrypted number tells of the key.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from clients.encrypted.evaluation import Packed, Value
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.packing import Complex, Slots, encode
from clients.encrypted.plan import HEADROOM, Plan
from clients.encrypted.ring import Desk, Ring, centred, in_range
from clients.encrypted.spec import bias, weight
from strategies.ckks.parameters import SEED_BYTES
from strategies.ckks.streams import CiphertextError, Residues

INPUTS: Final = "inputs"
PACKED: Final = "packed"
LABELS: Final = "labels"
ERRORS: Final = "errors"
PACKED_ERRORS: Final = "packed_errors"
LOSS: Final = "loss"
_SCALE_TOLERANCE: Final = 1e-6

log = logging.getLogger(__name__)


class WrapAroundError(ArithmeticError):
    """A decrypted mean is larger than its format holds safely: something has wrapped round."""


@dataclass(frozen=True)
class Fresh:
    """Fresh ciphertexts, as they travel.

    Attributes:
        first: their first components (units, level, N).
        seeds: of their second ones (units, 64) uint8.
    """

    first: Residues
    seeds: NDArray[np.uint8]

    def to_arrays(self, name: str) -> dict[str, NDArray[np.generic]]:
        """For the wire, by names that begin with one."""
        return {f"{name}.first": self.first, f"{name}.seeds": self.seeds}

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, NDArray[np.generic]],
        name: str,
        ring: Ring,
        units: int,
        level: int,
    ) -> Fresh:
        """Takes them off the wire.

        Raises:
            CiphertextError: they are missing, of another shape or type, or no residues of the ring.
        """
        shapes = {"first": (units, level, ring.degree), "seeds": (units, SEED_BYTES)}
        found = {}
        for part, dtype in (("first", np.uint64), ("seeds", np.uint8)):
            array = arrays.get(f"{name}.{part}")
            if array is None or array.dtype != dtype or array.shape != shapes[part]:
                told = "nothing" if array is None else f"{array.dtype} {array.shape}"
                raise CiphertextError(
                    f"{name}.{part} should be {np.dtype(dtype)} {shapes[part]}, and is {told}"
                )
            found[part] = array
        first = found["first"].astype(np.uint64, copy=False)
        in_range(first, ring, name)
        return cls(first, found["seeds"].astype(np.uint8, copy=False))

    def whole(self, desk: Desk) -> Residues:
        """Both components (units, 2, level, N)."""
        units, level, degree = self.first.shape
        found = np.empty((units, 2, level, degree), np.uint64)
        for index in range(units):
            row = self.first[index : index + 1]
            found[index] = desk.residues(
                desk.ciphertext(row, 1.0, seed=self.seeds[index].tobytes())
            )
        return found


@dataclass(frozen=True)
class Errors:
    """What an owner makes of logits.

    Attributes:
        arrays: encrypted errors, for the compute party.
        bias: the last layer's mean gradient by its biases (K,), which the owner needs nobody for.
        loss: mean cross-entropy.
        accuracy: share of the mini-batch that is classified right.
    """

    arrays: dict[str, NDArray[np.generic]]
    bias: NDArray[np.float64]
    loss: float
    accuracy: float


class Owner:
    """The key's half of a training step.

    Args:
        plan: that both ends share.
        keys: of the plan's ring.

    Raises:
        ValueError: the key is of another ring.
    """

    def __init__(self, plan: Plan, keys: OwnerKeys) -> None:
        ring = plan.ring
        if keys.ring != ring:
            raise ValueError(
                f"the key is of degree {keys.ring.degree} and bits {list(keys.ring.bits)}, and this model takes degree"
                f" {ring.degree} and bits {list(ring.bits)}: name another key file"
            )
        secret = keys.seal_key()
        public = ring.seal.PublicKey()
        ring.seal.KeyGenerator(ring.context, secret).create_public_key(public)
        self._plan, self._ring = plan, ring
        self._desk, self.slots = Desk(ring), Slots(ring, plan.copies)
        self._encryptor = ring.seal.Encryptor(ring.context, public, secret)
        self._decryptor = ring.seal.Decryptor(ring.context, secret)

    def inputs(self, features: NDArray[np.floating]) -> Fresh:
        """A mini-batch's features (n, d), n up to m, repeated: one or two a ciphertext; and ones of its samples."""
        plan = self._plan
        self._check(features)
        ones = np.ones(len(features))
        if plan.paired:
            padded = np.zeros((len(features), 2 * plan.inputs))
            padded[:, : features.shape[1]] = features
            padded[:, -2] = ones
            pairs = range(0, 2 * plan.inputs, 2)
            rows = (self.slots.pair(padded[:, i], padded[:, i + 1]) for i in pairs)
        else:
            rows = (self.slots.repeated(column) for column in (*features.T, ones))
        return self._encrypted(rows, plan.inputs, plan.scales.inputs, plan.ring.levels)

    def packed(self, features: NDArray[np.floating]) -> Fresh:
        """The same, packed, 2 b a ciphertext, at level 1."""
        self._check(features)
        return self._packed(features, 1)

    def labels(self, targets: NDArray[np.integer]) -> Fresh:
        """One-hot labels of targets (n,), repeated, a class a ciphertext."""
        plan = self._plan
        classes = plan.spec.sizes[-1]
        rows = (self.slots.repeated((targets == label).astype(float)) for label in range(classes))
        return self._encrypted(rows, classes, plan.scales.labels, plan.formats["o"].level)

    def answer(self, logits: Value, targets: NDArray[np.integer]) -> Errors:
        """The errors of logits (K units at level 1) by targets (n,), n up to m.

        Raises:
            CiphertextError: they are no logits of the plan's scale.
        """
        plan, classes = self._plan, self._plan.spec.sizes[-1]
        scale = 2.0 ** plan.formats["o"].scale
        if not isclose(logits.scale, scale, rel_tol=_SCALE_TOLERANCE):
            raise CiphertextError(f"logits of scale {logits.scale:g}, where the plan has {scale:g}")
        rows = [self._slots_of(row, logits.scale)[: len(targets)] for row in logits.residues]
        values = np.stack(rows, axis=1)
        values -= values.max(axis=1, keepdims=True)
        exponentials = np.exp(values)
        sums = exponentials.sum(axis=1, keepdims=True)
        chosen = np.arange(len(targets)), targets
        loss = float(np.mean(np.log(sums[:, 0]) - values[chosen]))
        accuracy = float(np.mean(values.argmax(axis=1) == targets))
        errors = exponentials / sums
        errors[chosen] -= 1
        form = plan.formats["delta"]
        columns = (self.slots.repeated(column) for column in errors.T)
        arrays = self._encrypted(columns, classes, form.scale, form.level).to_arrays(ERRORS)
        if plan.spec.layers > 1:
            arrays |= self._packed(errors, 1).to_arrays(PACKED_ERRORS)
        return Errors(arrays, errors.mean(axis=0), loss, accuracy)

    def gradients(
        self,
        means: Mapping[str, Sequence[Packed]],
        samples: int,
        errors: NDArray[np.floating] | None = None,
    ) -> dict[str, NDArray[np.float64]]:
        """Mean gradients by the parameters' names, and the `loss` where it was computed on ciphertexts.

        Args:
            means: packed means by parameters' names, as `party.Party` gives them.
            samples: n of the mini-batch.
            errors: the last layer's gradient by its biases, where the owner has it.

        Raises:
            WrapAroundError: a mean is too large for its format.
            CiphertextError: what came is not what the plan says.
        """
        spec, found = self._plan.spec, {}
        full = self.slots.samples / samples
        for layer in range(spec.layers):
            inputs, outputs = spec.sizes[layer], spec.sizes[layer + 1]
            leaves = self._means(means, weight(layer), f"means{layer}") * full
            if layer == 0:
                found[weight(layer)] = _cut(leaves, outputs, inputs)
            else:
                found[weight(layer)] = _cut(leaves, inputs, outputs).T
            if errors is not None and layer == spec.layers - 1:
                found[bias(layer)] = np.asarray(errors, np.float64)
                continue
            form = f"g{layer}" if layer < spec.layers - 1 else "delta"
            pairs = self._means(means, bias(layer), form)[:, [0, self._plan.copies]] * full
            found[bias(layer)] = _cut(pairs, 1, outputs)[0]
        if spec.loss == "squared":
            loss = self._means(means, LOSS, "loss")[0, 0] * full / 2
            found[LOSS] = np.asarray(loss)
        return found

    def _means(
        self, means: Mapping[str, Sequence[Packed]], name: str, form: str
    ) -> NDArray[np.float64]:
        """The leaves (leaves, 2 b) of one parameter."""
        rows, scale = [], self._plan.packed_scale(form)
        most = 2.0 ** (self._plan.room(scale) - HEADROOM)
        for item in means.get(name, ()):
            if item.residues.shape != (2, 1, self._ring.degree) or not (
                1 <= item.leaves <= self.slots.most_leaves
            ):
                raise CiphertextError(
                    f"{name}: {item.residues.shape} with {item.leaves} leaves is no packed mean"
                )
            in_range(item.residues, self._ring, name)
            if not isclose(item.scale, scale, rel_tol=_SCALE_TOLERANCE):
                raise CiphertextError(
                    f"{name}: a scale of {item.scale:g}, where the plan has {scale:g}"
                )
            whole = centred(self._coefficients(item.residues, item.scale), self._ring.primes[0])
            rows.append(self.slots.means(whole[self.slots.places(item.leaves)] / item.scale))
        if not rows:
            raise CiphertextError(f"{name}: no mean gradients came")
        found = np.concatenate(rows)
        largest = float(np.abs(found).max())
        if not largest <= most:
            log.warning("%s: a mean of %g, where %g is the most that is safe", name, largest, most)
            raise WrapAroundError(  # which may travel: no decrypted number is in it
                f"{name}: a mean is larger than the {most:g} that is safe: the training has diverged, or a sum has"
                " wrapped round; lower server.lr, or start from smaller weights"
            )
        return found

    def _coefficients(self, residues: Residues, scale: float) -> Residues:
        """Decrypted coefficients (N,) modulo the first prime."""
        plaintext = self._decrypted(residues, scale)
        residues = self._desk.plain_residues(plaintext, 1)
        coefficients: Residues = self._desk.transformed(residues, back=True)[0]
        return coefficients

    def _slots_of(self, residues: Residues, scale: float) -> NDArray[np.float64]:
        """Decrypted numbers (m,) of a repeated vector."""
        in_range(residues, self._ring, "logits")
        encoder = self._ring.seal.CKKSEncoder(self._ring.context)
        slots = np.array(encoder.decode_double(self._decrypted(residues, scale)))
        means: NDArray[np.float64] = slots.reshape(self.slots.samples, -1).mean(axis=1)
        return means

    def _decrypted(self, residues: Residues, scale: float) -> Any:
        plaintext = self._ring.seal.Plaintext()
        self._decryptor.decrypt(self._desk.ciphertext(residues, scale), plaintext)
        return plaintext

    def _packed(self, values: NDArray[np.floating], level: int) -> Fresh:
        places = 2 * self._plan.copies
        count = self._plan.packs(values.shape[1])
        rows = (
            self.slots.packed(values[:, i : i + places]) for i in range(0, count * places, places)
        )
        return self._encrypted(rows, count, self._plan.scales.packed, level)

    def _encrypted(self, rows: Any, count: int, bits: float, level: int) -> Fresh:
        first = np.empty((count, level, self._ring.degree), np.uint64)
        seeds = np.empty((count, SEED_BYTES), np.uint8)
        for index, row in enumerate(rows):
            first[index], seeds[index] = self._fresh(row, 2.0**bits, level)
        return Fresh(first, seeds)

    def _fresh(
        self, slots: Complex, scale: float, level: int
    ) -> tuple[Residues, NDArray[np.uint8]]:
        plaintext = encode(self._ring, slots, scale, level)
        first, seed = self._desk.fresh(self._encryptor.encrypt_symmetric(plaintext), level)
        return first[0], np.frombuffer(seed, np.uint8)

    def _check(self, features: NDArray[np.floating]) -> None:
        wanted = self._plan.spec.sizes[0]
        if features.ndim != 2 or features.shape[1] != wanted or len(features) > self.slots.samples:
            raise ValueError(
                f"a mini-batch of shape {features.shape} should be at most {self.slots.samples} by {wanted}"
            )
        if not np.isfinite(features).all():
            raise ValueError("a feature is not finite: clean the data before it is encrypted")


def _cut(leaves: NDArray[np.float64], rows: int, columns: int) -> NDArray[np.float64]:
    """Leaves, a whole number of them a row, as a matrix of the first columns."""
    if leaves.size < rows * columns or len(leaves) % rows:
        raise CiphertextError(f"{len(leaves)} elements are no {rows} by {columns} mean gradients")
    return leaves.reshape(rows, -1)[:, :columns]
