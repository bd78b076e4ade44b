"""How long what passes between an owner and the compute party is, to the byte, and what of it comes to the disk.

A plan says the shape of everything that is sent, so that nothing longer need ever be taken. This file reads and writes
nothing, and knows no key.
"""

from __future__ import annotations

from typing import Final

from clients.encrypted.key_frames import evaluation_bytes
from clients.encrypted.notes import MOST_NOTE
from clients.encrypted.owner import INPUTS, LABELS, PACKED
from clients.encrypted.plan import Plan
from strategies.ckks.parameters import SEED_BYTES

_HEADS: Final = 4096
"""Bytes that say what each array of a turn is, at the most: a turn has a dozen, of 128 bytes each."""


def kinds(plan: Plan) -> dict[str, tuple[int, int]]:
    """Ciphertexts and level of each kind that a mini-batch has."""
    found = {
        INPUTS: (plan.inputs, plan.ring.levels),
        PACKED: (plan.packs(plan.spec.sizes[0]), 1),
    }
    if plan.spec.loss == "squared":
        found[LABELS] = (plan.spec.sizes[-1], plan.formats["o"].level)
    return found


def turn_bytes(plan: Plan) -> int:
    """Of an owner's longest turn: its keys and a mini-batch, or errors where it sends these; with its note."""
    first = evaluation_bytes(plan.ring, plan.galois)
    first += sum(_fresh(plan, *shape) for shape in kinds(plan).values())
    second = 0
    if plan.spec.loss == "cross_entropy":
        classes = plan.spec.sizes[-1]
        second = _fresh(plan, classes, plan.formats["delta"].level)
        second += _fresh(plan, plan.packs(classes), 1)
    return max(first, second) + MOST_NOTE + _HEADS


def stored_bytes(plan: Plan) -> dict[str, int]:
    """Of each kind of a mini-batch's ciphertexts on the party's disk, both components; without checksums."""
    return {
        kind: 16 * plan.ring.degree * units * level for kind, (units, level) in kinds(plan).items()
    }


def _fresh(plan: Plan, units: int, level: int) -> int:
    """Fresh ciphertexts on the wire: first components, and seeds of the second ones."""
    return units * (8 * plan.ring.degree * level + SEED_BYTES)
