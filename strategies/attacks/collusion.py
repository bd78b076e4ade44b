"""Sybils: groups of attackers, each with one aim, that look like honest clients by their updates' length.

Fung, Yoon and Beschastnikh 2020, "The Limitations of Federated Learning in Sybil Settings" (FoolsGold), §3: sybils with
a common objective send updates more alike than honest clients' are. Here the objective is a direction of its own for
each group, so that any rule that goes by the likeness of updates can be measured. Nobody need know the others' updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt

from strategies.attacks.attack import Attack, Attacker, lied, replaced
from strategies.seeds import generator
from strategies.stages.clip import l2_norm
from strategies.update import Update, Vector


@dataclass(frozen=True)
class Collusion(Attack):
    """scale·‖x‖·(u + jitter·e): x the member's honest update, u its group's unit direction, e noise of its own.

    Attackers are dealt to groups in turn, by their logical ids. u is drawn once for the run; e, of expected length 1,
    for each member and round.

    Attributes:
        groups: how many there are; more than there are attackers leave some empty.
        scale: length over that of the honest update.
        jitter: noise over signal; two members' updates have a cosine of about 1 / (1 + jitter²).
    """

    groups: Annotated[int, Ge(1)] = 1
    scale: Annotated[float, Gt(0)] = 1.0
    jitter: Annotated[float, Ge(0)] = 0.1

    def group(self, attacker: Attacker) -> int:
        """The group of an attacker, 0 … groups − 1."""
        members = sorted(self.attackers(attacker.num_clients, attacker.seed))
        return members.index(attacker.client) % self.groups

    def tell(self, update: Update, attacker: Attacker) -> Update:
        """The group's direction in each float section."""
        group, rng = self.group(attacker), attacker.rng
        lies = {}
        for name in lied(update):
            aim = generator(attacker.seed, f"collusion {name}", group)
            lies[name] = self._toward(update.sections[name].vector, aim, rng)
        return replaced(update, lies)

    def _toward(self, vector: Vector, aim: np.random.Generator, rng: np.random.Generator) -> Vector:
        direction = aim.standard_normal(vector.size, np.float32)
        size = self.scale * l2_norm(vector)
        lie = direction * np.float32(size / (l2_norm(direction) or 1.0))
        if self.jitter and vector.size:
            noise = rng.standard_normal(vector.size, np.float32)
            lie += noise * np.float32(self.jitter * size / np.sqrt(vector.size))
        return lie
