"""One step of training on ciphertexts, for a share of each layer's units: what a worker of the compute party does.

Forward, z = W a + b and h = z^p, layer by layer; backward, g = slope(z) · (W^T g of the layer above); then the mean
gradients, constant coefficients of products (`packing`). Linear layers are matrix products of residues (`linear`), and
take all units of the layer below; everything else is done by SEAL on a share's own units. After each layer the shares
meet, which is the caller's affair (`party`).

What goes in and out are residues and scales. There is no secret key here, and none could be told from what is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from clients.encrypted.linear import matmul, quantised
from clients.encrypted.packing import Packer, Slots, encode
from clients.encrypted.plan import MEANS_LEVEL, Plan
from clients.encrypted.ring import Desk
from strategies.ckks.streams import Residues

Columns = Callable[[int, int, int], Residues]
"""Residues (inputs, 2, n) modulo the i-th prime, of columns start to stop: a layer's inputs, wherever they lie."""

_COLUMNS: Final = 4096


@dataclass(frozen=True)
class Value:
    """Ciphertexts of one level and scale.

    Attributes:
        residues: (units, 2, level, N).
        scale: what they are multiplied by.
    """

    residues: Residues
    scale: float

    @property
    def level(self) -> int:
        """Primes that are left."""
        return int(self.residues.shape[2])

    def columns(self, prime: int, start: int, stop: int) -> Residues:
        """See `Columns`."""
        return self.residues[:, :, prime, start:stop]


@dataclass(frozen=True)
class Packed:
    """Mean gradients in one ciphertext at level 1.

    Attributes:
        residues: (2, 1, N).
        scale: what they are multiplied by.
        leaves: how many elements it holds, at `Slots.places`.
    """

    residues: Residues
    scale: float
    leaves: int


@dataclass
class _Layer:
    """What the way back takes of a layer of this share's units."""

    slopes: list[Any] = field(default_factory=list)
    units: list[Any] = field(default_factory=list)
    gradients: list[Any] = field(default_factory=list)


def _nothing(prime: int, start: int, stop: int) -> Residues:
    raise ValueError("a step begins with its mini-batch: Evaluation.begin")


@dataclass
class State:
    """A step between its way up and its way down.

    Attributes:
        batch: residues of the mini-batch's features and, last, of its ones.
        layers: by number, as far as it has come.
    """

    batch: Columns = _nothing
    layers: dict[int, _Layer] = field(default_factory=dict)


class Evaluation:
    """A share of the units of each layer; one step at a time, and any number of others that wait.

    Attributes:
        state: the step's; another may be put in its place, and it back again.

    Args:
        plan: levels and scales.
        relin: SEAL's relinearisation keys.
        galois: SEAL's automorphism keys, for the plan's elements.
        chunk: leaves of one tree, at most.
    """

    def __init__(self, plan: Plan, relin: Any, galois: Any, chunk: int = 512) -> None:
        ring = plan.ring
        self._plan, self._ring, self._seal = plan, ring, ring.seal
        self._relin, self._galois = relin, galois
        self._desk, self._slots = Desk(ring), Slots(ring, plan.copies)
        self._packer = Packer(self._slots, self._desk, galois)
        self._evaluator = self._seal.Evaluator(ring.context)
        self.chunk = chunk
        self.state = State()

    def begin(self, batch: Columns) -> None:
        """Starts a step on a mini-batch: the residues of its features and, last, of its ones."""
        self.state = State(batch)

    def forward(
        self, layer: int, weights: NDArray[np.floating], biases: NDArray[np.floating],
        below: Value | None = None,
    ) -> Value:  # fmt: skip
        """This share's units of a layer: activations, or logits of the last one.

        Args:
            layer: from 0.
            weights: (own units, inputs).
            biases: (own units,).
            below: activations of all units below; None for the first layer, whose inputs are the mini-batch.
        """
        plan, last = self._plan, layer == self._plan.spec.layers - 1
        kept = self.state.layers[layer] = _Layer()
        if not len(weights):
            return self._none("o" if last else f"h{layer}")
        factor = 2.0 ** (plan.scales.weights if layer else plan.scales.first)
        scale = 2.0**plan.scales.inputs if below is None else below.scale
        # What a bias is multiplied with is encrypted too, and 0 where there is no sample: so is all that comes of it.
        ones = biases * (scale / 2.0**plan.scales.inputs)
        if below is None and plan.paired:
            sums = self._paired(weights, ones, factor)
        else:
            columns = self.state.batch if below is None else self._with_ones(below)
            level = plan.ring.levels if below is None else below.level
            if last:  # logits that an owner decrypts need no more primes than they are sent with
                level = plan.formats["o"].level
            whole = quantised(np.column_stack([weights, ones]), factor)
            sums = self._matmul(whole, columns, level)
        if last:
            return Value(sums, scale * factor)
        for row in sums:
            value = self._desk.ciphertext(row, scale * factor)
            unit, slope = self._activate(value)
            kept.slopes.append(slope)
            kept.units.append(unit)
        return self._value(kept.units)

    def backward(self, layer: int, weights: NDArray[np.floating], above: Value) -> Value:
        """This share's gradients by z of a hidden layer.

        Args:
            layer: the hidden layer.
            weights: of the layer above, (units above, own units).
            above: gradients by z of all units above; of the last layer, the outputs' errors.
        """
        kept, power = self.state.layers[layer], self._plan.spec.power
        if not kept.units:
            return self._none(f"g{layer}")
        factor = 2.0**self._plan.scales.back
        whole = quantised(weights.T * power, factor)
        sums = self._matmul(whole, above.columns, above.level)
        gradients = []
        for row, slope in zip(sums, kept.slopes, strict=True):
            back = self._desk.ciphertext(row, above.scale * factor)
            gradients.append(self._product(back, slope))
        kept.gradients = gradients
        return self._value(gradients)

    def first_means(
        self, packed: Value, errors: Value | None = None
    ) -> tuple[list[Packed], list[Packed]]:
        """Mean gradients of the first layer's weights and biases, for this share's units.

        Args:
            packed: the features, packed, at level 1.
            errors: the outputs' errors of this share, where there is no hidden layer.

        Returns:
            Weights, unit by unit and pack by pack; biases, two units an element.
        """
        gradients = self.state.layers[0].gradients if errors is None else self._loaded(errors)
        gradients = [self._lowered(gradient, 1) for gradient in gradients]
        packs = self._loaded(packed)
        pairs = [(unit, pack) for unit in gradients for pack in packs]
        return self._products(pairs), self._sums(gradients)

    def means(self, layer: int, packed: Value) -> list[Packed]:
        """Mean gradients of the weights of a layer behind the first, by this share's units below.

        Args:
            layer: from 1.
            packed: gradients by z, or errors, packed.
        """
        packs = self._loaded(packed)
        pairs = [(unit, pack) for unit in self.state.layers[layer - 1].units for pack in packs]
        return self._products(pairs)

    def sums(self, gradients: Value) -> list[Packed]:
        """Means of this share's gradients themselves: its biases'; two units an element."""
        return self._sums([self._lowered(item, 1) for item in self._loaded(gradients)])

    def pack(self, layer: int, gradients: Value) -> Value:
        """All units' gradients by z of a layer, or errors, repeated, as packed ciphertexts."""
        form = self._plan.formats[f"mask{layer}"]
        places = 2 * self._plan.copies
        loaded, packs = self._loaded(gradients), []
        for start in range(0, len(loaded), places):
            total = None
            for place, item in enumerate(loaded[start : start + places]):
                item = self._lowered(item, form.level)
                mask = encode(self._ring, self._slots.mask(place), 2.0**form.scale, form.level)
                self._evaluator.multiply_plain_inplace(item, mask)
                if total is None:
                    total = item
                else:
                    self._evaluator.add_inplace(total, item)
            packs.append(total)
        return self._value(packs)

    def differences(self, outputs: Value, labels: Value) -> Value:
        """Outputs less labels, which are brought to their level and scale."""
        found = []
        for output, label in zip(self._loaded(outputs), self._loaded(labels), strict=True):
            label = self._lowered(label, outputs.level)
            ratio = outputs.scale / label.scale
            one = self._seal.Plaintext()
            encoder = self._seal.CKKSEncoder(self._ring.context)
            encoder.encode(1.0, self._ring.parms_id(outputs.level), ratio, one)
            self._evaluator.multiply_plain_inplace(label, one)
            label.scale = output.scale
            self._evaluator.sub_inplace(output, label)
            found.append(output)
        return self._value(found)

    def loss(self, errors: Value) -> list[Packed]:
        """The mean over samples of the errors' squares, summed over outputs; once, not a share."""
        total = self._seal.Ciphertext()
        for index, error in enumerate(self._loaded(errors)):
            square = self._seal.Ciphertext()
            self._evaluator.square(error, square)
            if index:
                self._evaluator.add_inplace(total, square)
            else:
                total = square
        self._evaluator.relinearize_inplace(total, self._relin)
        self._evaluator.rescale_to_next_inplace(total)
        return self._sums([self._lowered(total, 1)])

    def _with_ones(self, value: Value) -> Columns:
        """A layer's inputs and behind them what its biases are multiplied with: the mini-batch's last ciphertext."""

        def columns(prime: int, start: int, stop: int) -> Residues:
            ones = self.state.batch(prime, start, stop)[-1:]
            return np.concatenate([value.columns(prime, start, stop), ones])

        return columns

    def _matmul(self, whole: NDArray[np.int64], inputs: Columns, level: int) -> Residues:
        # A ciphertext of nothing would hide nothing, and SEAL refuses it: one unit of fixed point does no harm.
        whole[~whole.any(axis=1), 0] = 1
        degree = self._ring.degree
        found = np.empty((len(whole), 2, level, degree), np.uint64)
        for index in range(level):
            prime = self._ring.primes[index]
            for start in range(0, degree, _COLUMNS):
                block = inputs(index, start, start + _COLUMNS)
                product = matmul(whole, block.reshape(len(block), -1), prime)
                found[:, :, index, start : start + _COLUMNS] = product.reshape(len(whole), 2, -1)
        return found

    def _paired(
        self, weights: NDArray[np.floating], ones: NDArray[np.floating], factor: float
    ) -> Residues:
        """The first layer of inputs with two features a ciphertext, x + X^(N/2) y: the real part of (w - X^(N/2) v) x.

        Real slots are what a ciphertext and its conjugate have in common, so that weights count half.
        """
        level = self._plan.ring.levels
        halves = np.zeros((2, len(weights), self._plan.inputs))
        halves[0, :, : -(-weights.shape[1] // 2)] = weights[:, 0::2] / 2
        halves[1, :, : weights.shape[1] // 2] = weights[:, 1::2] / 2
        halves[0, :, -1] = ones / 2
        both = quantised(halves.reshape(-1, halves.shape[2]), factor)
        product = self._matmul(both, self.state.batch, level)
        first, second = product.reshape(2, len(weights), 2, level, -1)
        turn = encode(self._ring, self._slots.second, 1.0, level)
        found: Residues = np.empty_like(first)
        for index in range(len(weights)):
            real = self._desk.ciphertext(first[index], 1.0)
            other = self._desk.ciphertext(second[index], 1.0)
            self._evaluator.multiply_plain_inplace(other, turn)
            self._evaluator.sub_inplace(real, other)
            conjugate = self._seal.Ciphertext()
            self._evaluator.complex_conjugate(real, self._galois, conjugate)
            self._evaluator.add_inplace(real, conjugate)
            found[index] = self._desk.residues(real)
        return found

    def _activate(self, value: Any) -> tuple[Any, Any]:
        """A unit's activation, and its slope but for the factor p."""
        square = self._seal.Ciphertext()
        self._evaluator.square(value, square)
        self._evaluator.relinearize_inplace(square, self._relin)
        self._evaluator.rescale_to_next_inplace(square)
        if self._plan.spec.power == 2:
            return square, value
        return self._product(value, square), square

    def _product(self, first: Any, second: Any) -> Any:
        """A product, relinearised and rescaled, at the lower level of the two."""
        level = min(first.coeff_modulus_size(), second.coeff_modulus_size())
        found = self._seal.Ciphertext()
        self._evaluator.multiply(self._lowered(first, level), self._lowered(second, level), found)
        self._evaluator.relinearize_inplace(found, self._relin)
        self._evaluator.rescale_to_next_inplace(found)
        return found

    def _lowered(self, item: Any, level: int) -> Any:
        """The same value with fewer primes; its scale stays. A copy where there is something to do."""
        if item.coeff_modulus_size() == level:
            return item
        found = self._seal.Ciphertext()
        self._evaluator.mod_switch_to(item, self._ring.parms_id(level), found)
        return found

    def _products(self, pairs: Sequence[tuple[Any, Any]]) -> list[Packed]:
        """Constant coefficients of products, as many a ciphertext as a chunk has."""
        most = min(self.chunk, self._slots.most_leaves)
        found = []
        for start in range(0, len(pairs), most):
            chosen = pairs[start : start + most]
            shrinking = cache(partial(self._shrink, len(chosen)))
            leaves = [partial(self._leaf, unit, pack, shrinking) for unit, pack in chosen]
            found.append(self._packed(leaves))
        return found

    def _shrink(self, leaves: int, scale: float) -> Any:
        # Each automorphism adds noise, which the tree multiplies: what is packed is lifted above it first.
        return self._packer.shrink(leaves, self._plan.lift(scale))

    def _leaf(self, unit: Any, pack: Any, shrinking: Callable[[float], Any]) -> Any:
        level = min(unit.coeff_modulus_size(), pack.coeff_modulus_size(), MEANS_LEVEL)
        product = self._seal.Ciphertext()
        self._evaluator.multiply(self._lowered(unit, level), self._lowered(pack, level), product)
        self._evaluator.relinearize_inplace(product, self._relin)
        for _ in range(level - 1):
            self._evaluator.rescale_to_next_inplace(product)
        self._evaluator.multiply_plain_inplace(product, shrinking(product.scale))
        return product

    def _sums(self, items: Sequence[Any]) -> list[Packed]:
        """Constant coefficients of ciphertexts at level 1 themselves, two an element."""
        most = 2 * min(self.chunk, self._slots.most_leaves)
        turn = encode(self._ring, self._slots.second, 1.0, 1)
        found = []
        for start in range(0, len(items), most):
            chosen = items[start : start + most]
            shrink = self._shrink(-(-len(chosen) // 2), items[0].scale)
            leaves = [
                partial(self._pair, chosen[at : at + 2], turn, shrink)
                for at in range(0, len(chosen), 2)
            ]
            found.append(self._packed(leaves))
        return found

    def _pair(self, pair: Sequence[Any], turn: Any, shrink: Any) -> Any:
        found = self._seal.Ciphertext()
        self._evaluator.multiply_plain(pair[0], shrink, found)
        for other in pair[1:]:
            turned = self._seal.Ciphertext()
            self._evaluator.multiply_plain(other, turn, turned)
            self._evaluator.multiply_plain_inplace(turned, shrink)
            self._evaluator.add_inplace(found, turned)
        return found

    def _packed(self, leaves: Sequence[Callable[[], Any]]) -> Packed:
        packed = self._packer.pack(leaves)
        return Packed(self._desk.residues(packed), packed.scale, len(leaves))

    def _loaded(self, value: Value) -> list[Any]:
        return [self._desk.ciphertext(row, value.scale) for row in value.residues]

    def _value(self, items: Sequence[Any]) -> Value:
        residues = np.stack([self._desk.residues(item) for item in items])
        return Value(residues, items[0].scale)

    def _none(self, name: str) -> Value:
        """No unit: what a late worker has of a layer with few."""
        form = self._plan.formats[name]
        residues = np.empty((0, 2, form.level, self._ring.degree), np.uint64)
        return Value(residues, 2.0**form.scale)
