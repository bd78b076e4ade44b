"""Canary clients: an auditor's own, whose updates are directions that can be found again in what is released.

Every canary has a direction, a random vector of signs scaled to one norm, and sends it whenever it is asked; a canary
whose coin left it out sends zeros, which is what a client that is not there adds to a sum. After the training the
auditor guesses from the released models who was in (Andrew, Kairouz, Oh, Oprea, McMahan, Suriyakumar 2024, "One-shot
Empirical Privacy Estimation for Federated Learning", §3; guesses and bound: `fl_app.audit`). Directions of d signs are
nearly orthogonal: the cosine of two has mean 0 and standard deviation 1/√d.

For audits on the engine; no choice of `attack=`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from annotated_types import Gt, MinLen
from numpy.typing import NDArray

from strategies.attacks.attack import Attack, Attacker, lied, replaced
from strategies.seeds import generator
from strategies.update import DELTA, Update


@dataclass(frozen=True, kw_only=True)
class Canary(Attack):
    """The last clients of a run are canaries.

    Attributes:
        included: one coin for each canary; the canaries are the clients with the highest ids, in this order.
        norm: L2 norm of what an included one sends; a clip may make it smaller.
        weight: what each canary declares, in examples, in or out.
        key: of the directions.
    """

    included: Annotated[tuple[bool, ...], MinLen(1)]
    norm: Annotated[float, Gt(0)]
    weight: Annotated[float, Gt(0)] = 1.0
    key: int = 0

    def attackers(self, num_clients: int, seed: int) -> frozenset[int]:
        """The canaries' ids, in or out.

        Raises:
            ValueError: there are no more clients than canaries.
        """
        first = num_clients - len(self.included)
        if first < 1:
            raise ValueError(
                f"{len(self.included)} canaries among {num_clients} clients: more clients are needed"
            )
        return frozenset(range(first, num_clients))

    def tell(self, update: Update, attacker: Attacker) -> Update:
        """The direction, or zeros; zeros in every other section of floats."""
        canary = attacker.client - (attacker.num_clients - len(self.included))
        lies = {name: np.zeros_like(update.sections[name].vector) for name in lied(update)}
        if self.included[canary]:
            signs = direction(self.key, canary, len(lies[DELTA]))
            lies[DELTA] = signs * np.float32(self.norm / np.sqrt(len(signs)))
        return replace(replaced(update, lies), weight=self.weight)


def direction(key: int, canary: int, size: int) -> NDArray[np.float32]:
    """A canary's signs, (size,) float32 of ±1; divided by √size they have norm 1.

    Args:
        key: of all directions.
        canary: from 0; numbers that no canary has give directions that nobody sends.
        size: parameters that travel, d.
    """
    bits = generator(key, "canary", canary).integers(0, 2, size, np.int8)
    return (2 * bits - 1).astype(np.float32)
