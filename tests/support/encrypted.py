"""One step of training on ciphertexts by hand, and what it computes in the clear."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clients.encrypted.evaluation import Evaluation, Packed, Value
from clients.encrypted.features import Kind, feature_map
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.network import PolynomialNet
from clients.encrypted.owner import ERRORS, LOSS, PACKED_ERRORS, Errors, Fresh, Owner
from clients.encrypted.plan import Plan, plan_of
from clients.encrypted.ring import Desk, Ring
from clients.encrypted.spec import Spec, bias, weight
from clients.tasks import Mnist

Array = NDArray[np.float64]
Arrays = Mapping[str, Array]


@lru_cache(maxsize=8)
def keys_of(ring: Ring) -> OwnerKeys:
    """One key a ring: what is tested of keys themselves makes its own."""
    return OwnerKeys.generate(ring)


@lru_cache(maxsize=16)
def evaluation_keys(plan: Plan) -> tuple[Any, Any]:
    """SEAL's keys for products and for the plan's automorphisms."""
    found: tuple[Any, Any] = keys_of(plan.ring).evaluation(plan.galois).seal(plan.ring)
    return found


@lru_cache(maxsize=16)
def owner_of(plan: Plan) -> Owner:
    """The key's half."""
    return Owner(plan, keys_of(plan.ring))


def network(spec: Spec, seed: int = 0, **settings: Any) -> PolynomialNet:
    """The model of a spec, as it starts, on features that are given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PolynomialNet(
            (spec.sizes[0],), spec.sizes[-1], hidden=spec.sizes[1:-1], activation=spec.activation,
            features="raw", **settings,
        )  # fmt: skip


def parameters(model: PolynomialNet) -> dict[str, Array]:
    """The arrays of a model, by name."""
    return {name: value.double().numpy().copy() for name, value in model.state_dict().items()}


def batch(spec: Spec, samples: int, seed: int = 0) -> tuple[Array, NDArray[np.int64]]:
    """Standard normal features, and labels."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(samples, spec.sizes[0]))
    return features, rng.integers(0, spec.sizes[-1], samples)


def loss_of(spec: Spec, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean loss."""
    if spec.loss == "cross_entropy":
        return torch.nn.functional.cross_entropy(outputs, targets)
    wanted = torch.nn.functional.one_hot(targets, outputs.shape[1])
    return (outputs - wanted).square().sum(1).mean() / 2


def autograd(
    spec: Spec, arrays: Arrays, features: Array, targets: NDArray[np.int64]
) -> dict[str, Array]:
    """The mean loss of `PolynomialNet` and its gradients, by torch in float64."""
    model = network(spec).double()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    loss = loss_of(spec, model(torch.from_numpy(features)), torch.from_numpy(targets))
    loss.backward()
    found = {name: value.grad.numpy() for name, value in model.named_parameters()}
    return {**found, LOSS: np.asarray(loss.item())}


@lru_cache(maxsize=4)
def images(kind: Kind, number: int | None = None) -> tuple[Array, NDArray[np.int64]]:
    """Features of the training images of MNIST and their labels, in an order that mixes the digits."""
    examples = Mnist().train()
    order = np.random.default_rng(0).permutation(len(examples.targets))
    made = feature_map(kind, (1, 28, 28), number)(examples.inputs[order])
    return made.double().numpy(), examples.targets[order].numpy()


def descended(
    spec: Spec, features: Array, targets: NDArray[np.int64], steps: int, lr: float = 0.03
) -> dict[str, Array]:
    """The model's arrays after some steps of Adam in the clear, on mini-batches."""
    model = network(spec).double()
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.7, 0.95), eps=1e-3)
    inputs, labels = torch.from_numpy(features), torch.from_numpy(targets)
    parts = -(-len(features) // spec.batch)
    for step in range(steps):
        own = slice(step % parts, None, parts)
        optimiser.zero_grad()
        loss_of(spec, model(inputs[own]), labels[own]).backward()
        optimiser.step()
    return parameters(model)


def coefficients(ring: Ring, slots: NDArray[np.complex128]) -> Array:
    """The real polynomials (..., N) that have these slots (..., N / 2): the inverse of CKKS's embedding."""
    degree, powers = ring.degree, np.empty(ring.slots, np.int64)
    power = 1
    for index in range(ring.slots):
        powers[index], power = power, power * 3 % (2 * degree)
    values = np.empty((*slots.shape[:-1], degree), np.complex128)
    values[..., (powers - 1) // 2] = slots
    values[..., (2 * degree - powers - 1) // 2] = slots.conj()
    turns = np.exp(-1j * np.pi * np.arange(degree) / degree)
    found: Array = (turns * np.fft.fft(values) / degree).real
    return found


def shadow(
    spec: Spec, arrays: Arrays, features: Array, targets: NDArray[np.int64]
) -> dict[str, Array]:
    """The numbers (n, units) that each value of `Plan.formats` stands for, by numpy; of packed ones, the mean."""
    found, hidden, count = {"x": features}, features, len(features)
    last, power = spec.layers - 1, spec.power
    below = [features]
    for layer in range(last):
        z = found[f"z{layer}"] = hidden @ arrays[weight(layer)].T + arrays[bias(layer)]
        if power == 3:
            found[f"s{layer}*"] = found[f"s{layer}"] = z**2
        hidden = found[f"h{layer}*"] = found[f"h{layer}"] = z**power
        below.append(hidden)
    outputs = found["o"] = hidden @ arrays[weight(last)].T + arrays[bias(last)]
    indicators = np.eye(spec.sizes[-1])[targets]
    if spec.loss == "squared":
        delta = outputs - indicators
        found["loss*"] = found["loss"] = (delta**2).sum(1, keepdims=True)
    else:
        raised = np.exp(outputs - outputs.max(1, keepdims=True))
        delta = raised / raised.sum(1, keepdims=True) - indicators
    gradient = found["delta"] = delta
    for layer in range(last, -1, -1):
        found[f"means{layer}"] = gradient.T @ below[layer] / count
        if layer:
            found[f"mask{layer}"] = np.ones_like(gradient)
            back = found[f"e{layer - 1}"] = power * gradient @ arrays[weight(layer)]
            gradient = back * found[f"z{layer - 1}"] ** (power - 1)
            found[f"g{layer - 1}*"] = found[f"g{layer - 1}"] = gradient
    return found


@dataclass(frozen=True)
class Step:
    """What came of a step.

    Attributes:
        gradients: as the owner reads them; and the loss.
        values: of the units of all shares, by the names of `Plan.formats`.
        means: packed, by the parameters' names.
    """

    gradients: dict[str, Array]
    values: dict[str, Value]
    means: dict[str, list[Packed]]


@dataclass
class Bench:
    """Both ends of encrypted training in one process: an owner, and a party of some shares of the units.

    Attributes:
        spec: what is trained.
        shares: of the units.
        chunk: leaves of a tree, at most.
        make: of an evaluation.
    """

    spec: Spec
    shares: int = 1
    chunk: int = 512
    make: Callable[..., Evaluation] = Evaluation

    def __post_init__(self) -> None:
        self.plan = plan_of(self.spec)
        self.owner = owner_of(self.plan)
        self.desk = Desk(self.plan.ring)
        relin, galois = evaluation_keys(self.plan)
        cuts = [self.spec.share(layer, self.shares) for layer in range(self.spec.layers)]
        self.units = list(zip(*cuts, strict=True))
        self.workers = [self.make(self.plan, relin, galois, self.chunk) for _ in self.units]

    def value(self, fresh: Fresh, bits: float) -> Value:
        """Fresh ciphertexts as the party expands them."""
        return Value(fresh.whole(self.desk), 2.0**bits)

    def step(self, arrays: Arrays, features: Array, targets: NDArray[np.int64]) -> Step:
        """Encrypts a mini-batch, and takes one step on it."""
        spec, scales = self.spec, self.plan.scales
        inputs = self.value(self.owner.inputs(features), scales.inputs)
        packed = self.value(self.owner.packed(features), scales.packed)
        for worker in self.workers:
            worker.begin(inputs.columns)
        values = {"x": inputs, **self.forward(arrays)}
        means: dict[str, list[Packed]] = {}
        answer, last = None, spec.layers - 1
        if spec.loss == "cross_entropy":
            answer = self.owner.answer(values["o"], targets)
            values["delta"], packs = self._answered(answer)
        else:
            labels = self.value(self.owner.labels(targets), scales.labels)
            values["delta"] = self.workers[0].differences(values["o"], labels)
            means[LOSS] = self.workers[0].loss(values["delta"])
            means[bias(last)] = self.workers[0].sums(values["delta"])
            packs = self.workers[0].pack(last, values["delta"]) if last else None
        values |= self._backward(arrays, values["delta"])
        for layer in range(last, 0, -1):
            means[weight(layer)] = [p for w in self.workers for p in w.means(layer, packs)]
            if layer > 1:
                packs = self.workers[0].pack(layer - 1, values[f"g{layer - 1}"])
                means[bias(layer - 1)] = self.workers[0].sums(values[f"g{layer - 1}"])
        self._first(means, packed, values["delta"])
        errors = None if answer is None else answer.bias
        gradients = self.owner.gradients(means, len(features), errors)
        if answer is not None:
            gradients[LOSS] = np.asarray(answer.loss)
        return Step(gradients, values, means)

    def forward(self, arrays: Arrays) -> dict[str, Value]:
        """All layers, on the batch that the workers have begun with."""
        found: dict[str, Value] = {}
        below = None
        for layer in range(self.spec.layers):
            outputs = []
            for worker, units in zip(self.workers, self.units, strict=True):
                own = slice(units[layer].start, units[layer].stop)
                weights, biases = arrays[weight(layer)][own], arrays[bias(layer)][own]
                outputs.append(worker.forward(layer, weights, biases, below))
            below = joined(outputs)
            found["o" if layer == self.spec.layers - 1 else f"h{layer}"] = below
        return found

    def _backward(self, arrays: Arrays, delta: Value) -> dict[str, Value]:
        found, above = {}, delta
        for layer in range(self.spec.layers - 2, -1, -1):
            outputs = []
            for worker, units in zip(self.workers, self.units, strict=True):
                own = slice(units[layer].start, units[layer].stop)
                outputs.append(worker.backward(layer, arrays[weight(layer + 1)][:, own], above))
            above = found[f"g{layer}"] = joined(outputs)
        return found

    def _first(self, means: dict[str, list[Packed]], packed: Value, delta: Value) -> None:
        known = means.get(bias(0), [])  # of a logistic regression with squared loss
        sums: list[Packed] = []
        for worker, units in zip(self.workers, self.units, strict=True):
            own = Value(delta.residues[units[0].start : units[0].stop], delta.scale)
            weights, biases = worker.first_means(packed, own if self.spec.layers == 1 else None)
            means.setdefault(weight(0), []).extend(weights)
            sums += biases
        means[bias(0)] = known or sums

    def _answered(self, answer: Errors) -> tuple[Value, Value | None]:
        form, ring = self.plan.formats["delta"], self.plan.ring
        classes = self.spec.sizes[-1]
        fresh = Fresh.from_arrays(answer.arrays, ERRORS, ring, classes, form.level)
        delta, packs = self.value(fresh, form.scale), None
        if self.spec.layers > 1:
            count = self.plan.packs(classes)
            fresh = Fresh.from_arrays(answer.arrays, PACKED_ERRORS, ring, count, 1)
            packs = self.value(fresh, self.plan.scales.packed)
        return delta, packs


def joined(values: list[Value]) -> Value:
    """The shares' units together."""
    return Value(np.concatenate([value.residues for value in values]), values[0].scale)
