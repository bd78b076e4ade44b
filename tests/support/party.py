"""An owner by hand, turn by turn, before a real compute party."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.encrypted.evaluation import Value
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.notes import BATCH, KEYS, LOGITS, NOTE, WANT, note, read_means, read_note
from clients.encrypted.owner import INPUTS, LABELS, LOSS, PACKED, Errors, Owner
from clients.encrypted.party import ComputeParty
from clients.encrypted.party_learner import PartyLearner
from clients.encrypted.plan import Plan, plan_of
from clients.encrypted.spec import Spec
from tests.support.encrypted import autograd, batch, keys_of, network, parameters

Arrays = dict[str, NDArray[Any]]
TOLERANCE = {"cross_entropy": 2e-3, "squared": 6e-3}
"""Of the largest gradient of an array. An error depends on the keys' noise: of 20 keys of the small networks here the
largest is 4e-4 with cross-entropy; with squared loss the median is 9e-4 and the spread a factor of 1.6, so that 6e-3 is
four of its standard deviations away."""


@dataclass
class Hand:
    """An owner of one mini-batch.

    Attributes:
        plan: of the steps.
        client: by which the party knows it.
        seed: of its data.
        keys: its own; by default the tests' one of the ring.
        samples: of its mini-batch.
        wanted: what the party has asked for, in order.
    """

    plan: Plan
    client: int = 0
    seed: int = 0
    keys: OwnerKeys | None = None
    samples: int = 200
    wanted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keys = self.keys or keys_of(self.plan.ring)
        self.owner = Owner(self.plan, self.keys)
        self.features, self.targets = batch(self.plan.spec, self.samples, self.seed)
        self._sent: Arrays = {}
        self._keys: Arrays = {}
        self._answered: Errors | None = None

    def hello(self, **changes: Any) -> Arrays:
        told = {"fingerprint": self.keys.fingerprint, "data": f"{self.seed:032x}", "batch": 0}
        return {NOTE: note({**told, **changes})}

    def upload(self, what: list[str]) -> Arrays:
        found: Arrays = {}
        if KEYS in what:
            if not self._keys:
                arrays = self.keys.evaluation(self.plan.galois).to_arrays()
                self._keys = {f"keys.{name}": array for name, array in arrays.items()}
            found |= self._keys
        if BATCH in what:
            if not self._sent:
                self._sent = self.owner.inputs(self.features).to_arrays(INPUTS)
                self._sent |= self.owner.packed(self.features).to_arrays(PACKED)
                if self.plan.spec.loss == "squared":
                    self._sent |= self.owner.labels(self.targets).to_arrays(LABELS)
            found |= self._sent
        return found

    def begin(self, learner: Any) -> Arrays:
        """Turns until nothing is wanted: logits, or means where the loss is squared."""
        answer = learner.answer(self.client, self.hello())
        for _ in range(2):
            wants = read_note(answer).get(WANT, [])
            if not wants:
                break
            self.wanted += wants
            answer = learner.answer(self.client, self.hello() | self.upload(wants))
        return answer

    def errors(self, answer: Arrays) -> Arrays:
        logits = Value(answer[LOGITS], read_note(answer)["scale"])
        self._answered = self.owner.answer(logits, self.targets)
        return self._answered.arrays

    def gradients(self, answer: Arrays) -> Arrays:
        bias = None if self._answered is None else self._answered.bias
        found = self.owner.gradients(read_means(answer), self.samples, bias)
        return {name: np.asarray(found[name]) for name in self.plan.spec.shapes}

    def step(self, learner: Any) -> Arrays:
        """A whole step; its gradients."""
        answer = self.begin(learner)
        if self.plan.spec.loss == "cross_entropy":
            answer = learner.answer(self.client, self.hello() | self.errors(answer))
        return self.gradients(answer)

    def agrees(self, gradients: Mapping[str, NDArray[Any]], weights: Mapping[str, Any]) -> bool:
        """Whether they are those of torch in the clear."""
        wanted = autograd(self.plan.spec, weights, self.features, self.targets)
        wanted.pop(LOSS)
        return all(
            np.abs(gradients[name] - array).max()
            <= TOLERANCE[self.plan.spec.loss] * np.abs(array).max()
            for name, array in wanted.items()
        )


def steps(party: ComputeParty, hand: Hand, number: int = 1) -> bool:
    """Whether so many steps agree with torch, from the model as it starts and down its gradients."""
    weights = weights_of(hand.plan.spec)
    for _ in range(number):
        gradients = hand.step(PartyLearner(party, weights))
        if not hand.agrees(gradients, weights):
            return False
        weights = {name: array - 0.1 * gradients[name] for name, array in weights.items()}
    return True


def weights_of(spec: Spec) -> dict[str, NDArray[Any]]:
    """The model as it starts."""
    return parameters(network(spec))


SMALL = plan_of(Spec((6, 4, 3)))
STRICT = plan_of(Spec((6, 4, 3), loss="squared"))
LOGISTIC = plan_of(Spec((6, 3)))
