"""Who attacks, and at which moment its update is replaced: what all attacks have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le

from strategies.ranges import Ranged
from strategies.seeds import generator
from strategies.update import MAXIMUM_SECTIONS, Section, Update, Vector


@dataclass(frozen=True)
class Attacker:
    """One lying client in one round.

    Attributes:
        client: logical id.
        round: the round's number.
        num_clients: of the run.
        seed: the run's.
        told: by section, the vectors that an omniscient adversary hands over; empty where it saw nobody.
    """

    client: int
    round: int
    num_clients: int
    seed: int
    told: Mapping[str, Vector] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def rng(self) -> np.random.Generator:
        """A generator of its own for each round and client."""
        return generator(self.seed, "attack", self.round, self.client)


@dataclass(frozen=True)
class Attack(Ranged):
    """A share of the clients, drawn once for the run, whose updates are replaced.

    Attributes:
        fraction: of all clients, rounded to whole ones.
    """

    fraction: Annotated[float, Ge(0), Le(1)] = 0.2

    def attackers(self, num_clients: int, seed: int) -> frozenset[int]:
        """Logical ids of those who lie, the same for the whole run."""
        chosen = generator(seed, "attackers").permutation(num_clients)[
            : round(self.fraction * num_clients)
        ]
        return frozenset(int(client) for client in chosen)

    def tell(self, update: Update, attacker: Attacker) -> Update:
        """What an attacker hands to its encoding stages in place of its honest update."""
        return self.poison(update, attacker.rng)

    def poison(self, update: Update, rng: np.random.Generator) -> Update:
        """The update with a lie in place of every float section, as `replaced` has it."""
        return replaced(
            update, {name: self.lie(update.sections[name].vector, rng) for name in lied(update)}
        )

    def lie(self, vector: Vector, rng: np.random.Generator) -> Vector:
        """The lie told for one honest (d,) float32 vector, which must not be changed."""
        raise TypeError(f"{type(self).__name__} does not say what its attackers send")


def lied(update: Update) -> list[str]:
    """The sections that attacks lie in: those of floats.

    Counters of integer buffers stay honest: the server takes their maximum, which a statistic of others says nothing
    about, and admission bounds them.
    """
    return [name for name in update.sections if name not in MAXIMUM_SECTIONS]


def replaced(update: Update, lies: Mapping[str, Vector]) -> Update:
    """The update with other vectors; weight, metrics and what is not named stay the client's own.

    Raises:
        ValueError: a lie has another length than its section.
        KeyError: the update has no such section.
    """
    sections = {
        name: Section(vector.astype(np.float32, copy=False), update.sections[name].layout)
        for name, vector in lies.items()
    }
    return replace(update, sections={**update.sections, **sections})
