"""One encrypted training in a lean process tree: an owner, a compute party and its workers, and no torch.

    python benchmarks/encrypted_cell.py PREPARED.npz

`encrypted_training.py` prepares the file: features, labels, mini-batches in their order, initial weights and settings.
One line of JSON comes out: seconds of wall and of processor, accuracy on the test images beside that of the same
training in plaintext from the same start, and the largest error of a gradient, in parts of the largest
element of the plaintext one of that step.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from clients.encrypted.evaluation import Value
from clients.encrypted.governor import MemoryLimit
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.notes import LOGITS, NOTE, Step, note, read_means, read_note
from clients.encrypted.owner import INPUTS, LABELS, LOSS, PACKED, Owner
from clients.encrypted.party import ComputeParty
from clients.encrypted.party_learner import PartyLearner
from clients.encrypted.plan import plan_of
from clients.encrypted.spec import Spec, bias, weight
from strategies.server_models import Adam
from strategies.update import DELTA, Layout, Section, Update

Weights = dict[str, NDArray[np.float64]]


class Cell:
    """A training and its plaintext twin.

    Args:
        prepared: the file's arrays.
        folder: of the compute party.
    """

    def __init__(self, prepared: Mapping[str, NDArray[Any]], folder: Path) -> None:
        told = json.loads(str(prepared["settings"]))
        self.spec = Spec(tuple(told["sizes"]), "square", told["loss"], told["batch"])
        self.plan = plan_of(self.spec)
        self.features, self.labels = prepared["features"], prepared["labels"]
        self.test, self.test_labels = prepared["test"], prepared["test_labels"]
        edges = prepared["edges"].tolist()
        self.batches = [prepared["rows"][start:stop] for start, stop in pairwise(edges)]
        self.order = prepared["order"]
        self.adam = told["adam"]
        self.start: Weights = {name: prepared[name].astype(np.float64) for name in self.spec.shapes}
        self.keys = OwnerKeys.generate(self.plan.ring)
        self.owner = Owner(self.plan, self.keys)
        memory = MemoryLimit(limit_mb=told.get("limit_mb"))
        self.party = ComputeParty(self.plan, folder, workers=told["workers"], memory=memory)
        self.key_seconds = 0.0

    def upload(self) -> int:
        """Encrypts all mini-batches and hands them over; bytes."""
        sent = 0
        for number in sorted(set(self.order.tolist())):
            rows = self.batches[number]
            arrays = {
                **self.owner.inputs(self.features[rows]).to_arrays(INPUTS),
                **self.owner.packed(self.features[rows]).to_arrays(PACKED),
            }
            if self.spec.loss == "squared":
                arrays |= self.owner.labels(self.labels[rows]).to_arrays(LABELS)
            if not sent:
                keys = self.keys.evaluation(self.plan.galois).to_arrays()
                arrays |= {f"keys.{name}": array for name, array in keys.items()}
            self.party.take(self._step(number), arrays)
            sent += sum(array.nbytes for array in arrays.values())
        return sent

    def _step(self, number: int) -> Step:
        return Step(self.keys.fingerprint, "0" * 32, number)

    def gradient(self, weights: Weights, number: int) -> tuple[Weights, int]:
        """The mean gradient of a mini-batch on ciphertexts, and the bytes that passed."""
        rows, learner = self.batches[number], PartyLearner(self.party, weights)
        told = {"fingerprint": self.keys.fingerprint, "data": "0" * 32, "batch": number}
        answer, errors = learner.answer(0, {NOTE: note(told)}), None
        passed = _bytes(answer)
        if self.spec.loss == "cross_entropy":
            began = time.process_time()
            value = Value(answer[LOGITS], read_note(answer)["scale"])  # type: ignore[arg-type]
            own = self.owner.answer(value, self.labels[rows])
            self.key_seconds += time.process_time() - began
            errors, answer = own.bias, learner.answer(0, own.arrays)
            passed += _bytes(own.arrays) + _bytes(answer)
        began = time.process_time()
        found = self.owner.gradients(read_means(answer), len(rows), errors)
        self.key_seconds += time.process_time() - began
        found.pop(LOSS, None)
        return found, passed

    def plain(self, weights: Weights, number: int) -> Weights:
        """The same in plaintext."""
        rows = self.batches[number]
        values, inputs, hidden = [], [self.features[rows]], self.spec.layers - 1
        for layer in range(self.spec.layers):
            values.append(inputs[-1] @ weights[weight(layer)].T + weights[bias(layer)])
            inputs.append(values[-1] ** 2)
        outputs, wanted = values[-1], np.eye(self.spec.sizes[-1])[self.labels[rows]]
        if self.spec.loss == "cross_entropy":
            outputs = np.exp(outputs - outputs.max(axis=1, keepdims=True))
            outputs /= outputs.sum(axis=1, keepdims=True)
        above, found = (outputs - wanted) / len(rows), {}
        for layer in range(hidden, -1, -1):
            found[weight(layer)], found[bias(layer)] = above.T @ inputs[layer], above.sum(axis=0)
            if layer:
                above = (above @ weights[weight(layer)]) * 2 * values[layer - 1]
        return found

    def accuracy(self, weights: Weights) -> float:
        """On the test images, in percent."""
        values = self.test
        for layer in range(self.spec.layers):
            values = (values**2 if layer else values) @ weights[weight(layer)].T
            values = values + weights[bias(layer)]
        return 100 * float((values.argmax(axis=1) == self.test_labels).mean())


class Optimiser:
    """The server's Adam over named arrays.

    Args:
        start: initial weights.
        settings: of `strategies.server_models.Adam`.
    """

    def __init__(self, start: Weights, settings: Mapping[str, Any]) -> None:
        self._layout = Layout.of(start)
        self._vector = self._layout.flatten(start).astype(np.float64)
        self._adam = Adam(bias_correction=True, **settings)
        self._adam.begin(self._vector.size)

    @property
    def weights(self) -> Weights:
        """As they are."""
        return {name: view.copy() for name, view in self._layout.views(self._vector).items()}

    def step(self, gradient: Weights) -> None:
        """One step down."""
        vector = -self._layout.flatten(gradient).astype(np.float32)
        update = Update({DELTA: Section(vector, self._layout)}, 1.0, (0,), 0, {})
        self._adam.step(self._vector, update)


def _bytes(arrays: Mapping[str, NDArray[Any]]) -> int:
    return sum(array.nbytes for array in arrays.values())


def _children_seconds() -> float:
    """Processor seconds of the workers."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(one.user + one.system for one in times)


def run(cell: Cell) -> dict[str, float]:
    """Trains on ciphertexts, then in plaintext."""
    began, cpu = time.monotonic(), time.process_time()
    sent = cell.upload()
    uploaded, upload_cpu = time.monotonic() - began, time.process_time() - cpu
    began, cpu = time.monotonic(), time.process_time()
    server, trail, passed = Optimiser(cell.start, cell.adam), [], 0
    for number in cell.order.tolist():
        weights = server.weights
        gradient, size = cell.gradient(weights, number)
        server.step(gradient)
        trail.append((weights, gradient))
        passed += size
    wall = time.monotonic() - began
    seconds = time.process_time() - cpu + _children_seconds()
    peak = cell.party.governor.peak_mb
    cell.party.close()
    errors = []
    for number, (weights, gradient) in zip(cell.order.tolist(), trail, strict=True):
        exact = cell.plain(weights, number)
        largest = max(float(np.abs(value).max()) for value in exact.values())
        off = max(float(np.abs(gradient[name] - exact[name]).max()) for name in exact)
        errors.append(off / largest)
    twin, cpu = Optimiser(cell.start, cell.adam), time.process_time()
    for number in cell.order.tolist():
        twin.step(cell.plain(twin.weights, number))
    plain_seconds = time.process_time() - cpu
    return {
        "accuracy": cell.accuracy(server.weights),
        "twin": cell.accuracy(twin.weights),
        "gradient_error": max(errors),
        "encrypt_wall": uploaded,
        "encrypt_cpu": upload_cpu,
        "wall": wall,
        "cpu": seconds,
        "key_cpu": cell.key_seconds,
        "plain_cpu": plain_seconds,
        "upload_mb": sent / 1e6,
        "step_mb": passed / len(cell.order) / 1e6,
        "peak_mb": peak,
        "ring_bits": float(sum(cell.plan.ring.bits)),
        "degree": float(cell.plan.ring.degree),
    }


def main() -> None:
    """Runs a prepared training."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with (
        np.load(sys.argv[1], allow_pickle=False) as prepared,
        tempfile.TemporaryDirectory(prefix="trellis-encrypted-") as folder,
    ):
        cell = Cell(dict(prepared), Path(folder))
        with cell.party:
            print(json.dumps(run(cell)))


if __name__ == "__main__":
    main()
