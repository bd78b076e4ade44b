"""Owners' turns with the compute party, on one version of the model: what is asked, in which order, and what is told.

Whatever comes is a stranger's. It is refused with a reason where it is none of the protocol's, and the next turn is
served as if nothing had been. A step that memory has no room for is begun again with less. What is computed, and how,
is the party's affair.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from clients.encrypted import ranges
from clients.encrypted.crew import WorkerError
from clients.encrypted.evaluation import Packed, Value
from clients.encrypted.keys import public_only
from clients.encrypted.limits import MemoryLimitError, StepAbandonedError
from clients.encrypted.linear import WeightRangeError
from clients.encrypted.memory import BatchMissingError
from clients.encrypted.notes import (
    BATCH,
    KEYS,
    LOGITS,
    MEANS,
    NOTE,
    WANT,
    Arrays,
    Step,
    note,
    read_note,
    step_of,
)  # fmt: skip
from clients.encrypted.owner import ERRORS, PACKED_ERRORS, Fresh
from clients.encrypted.party import ComputeParty
from clients.encrypted.worker import KeysMissingError
from strategies.ckks import SecretKeyError
from strategies.ckks.streams import CiphertextError
from strategies.wire import Refused

log = logging.getLogger(__name__)

T = TypeVar("T")


class PartyLearner:
    """Owners' turns on one version of the model.

    Args:
        party: that computes.
        weights: the model's, by name; what else is there is left alone.

    Raises:
        SecretKeyError: a secret key was handed over.
    """

    def __init__(self, party: ComputeParty, weights: Arrays) -> None:
        for array in weights.values():
            public_only(array)
        self._party = party
        self._weights = {name: weights[name] for name in party.plan.spec.shapes}
        self._steps: dict[int, Step] = {}

    def answer(self, client: int, arrays: Arrays) -> dict[str, NDArray[np.generic]]:
        """What goes back for one turn of an owner.

        Raises:
            Refused: `malformed`, `phase`, `range`, `party`: what came is none of this protocol's, is out of order,
                leaves the ciphertexts' range, or can't be computed.
        """
        _refuse_keys(arrays)
        told = read_note(arrays)
        with self._party.lock:
            try:
                if told:
                    self._steps[client] = step_of(told)
                step = self._known(client)
                if f"{ERRORS}.first" in arrays:
                    return self._errors(step, arrays)
                return self._forward(client, step, arrays)
            except BatchMissingError as error:
                return self._want(BATCH, error)
            except KeysMissingError as error:
                return self._want(KEYS, error)
            except CiphertextError as error:
                raise Refused("malformed", str(error)) from error
            except (ranges.RangeError, WeightRangeError) as error:
                raise Refused("range", str(error)) from error
            except (WorkerError, MemoryLimitError) as error:
                raise Refused("party", str(error)) from error
            except OSError as error:
                log.error("an owner's turn ended at the disk: %s", error)
                reason = error.strerror or type(error).__name__
                raise Refused("party", f"the compute party's disk: {reason}") from error
            except Refused:
                raise
            except Exception as error:  # one owner's turn must not end the others' run
                log.exception("an owner's turn could not be computed")
                reason = f"the turn could not be computed: {type(error).__name__}"
                raise Refused("party", reason) from error

    def _known(self, client: int) -> Step:
        step = self._steps.get(client)
        if step is None:
            raise Refused("phase", "a step begins with a note of its key and mini-batch")
        return step

    def _want(self, what: str, error: LookupError) -> dict[str, NDArray[np.generic]]:
        log.warning("an owner is asked again: %s", error)
        return {NOTE: note({WANT: [what], "party": self._party.name})}

    def _forward(self, client: int, step: Step, arrays: Arrays) -> dict[str, NDArray[np.generic]]:
        party = self._party
        party.take(step, arrays, client)
        wants = party.wanted(step)
        if wants:
            return {NOTE: note({WANT: wants, "party": party.name})}
        if party.plan.spec.loss == "squared":
            return self._told(self._whole(lambda: self._strict(step)))
        outputs = self._whole(lambda: party.forward(step, self._weights))
        return {LOGITS: outputs.residues, NOTE: note({"scale": outputs.scale, "party": party.name})}

    def _errors(self, step: Step, arrays: Arrays) -> dict[str, NDArray[np.generic]]:
        party, plan = self._party, self._party.plan
        if plan.spec.loss == "squared":
            raise Refused("phase", "errors are computed here: an owner sends none")
        classes, form = plan.spec.sizes[-1], plan.formats["delta"]
        fresh = Fresh.from_arrays(arrays, ERRORS, plan.ring, classes, form.level)
        errors, packed = Value(fresh.whole(party.desk), 2.0**form.scale), None
        if plan.spec.layers > 1:
            sent = Fresh.from_arrays(arrays, PACKED_ERRORS, plan.ring, plan.packs(classes), 1)
            packed = Value(sent.whole(party.desk), 2.0**plan.scales.packed)
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
        return {**found, NOTE: note({MEANS: told, "party": self._party.name})}


def _refuse_keys(arrays: Arrays) -> None:
    """Refuses a secret key's file among what was sent, before anything keeps it."""
    for name, array in arrays.items():
        try:
            public_only(array.ravel()[:64].tobytes())
        except SecretKeyError as error:
            raise Refused("malformed", f"{name}: {error}") from error
