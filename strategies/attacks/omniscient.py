"""Attackers that see the honest updates of the round before they answer, and send one vector together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, Final

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from strategies.attacks.attack import Attack, Attacker, lied, replaced
from strategies.state import Value
from strategies.update import Update, Vector

log = logging.getLogger(__name__)

LIE: Final = "lie"
"""The record of an attacker's request in which an adversary hands over what to send."""

_BLOCK_ELEMENTS: Final = 1 << 20
"""Float64 elements of all clients that are worked at together: 8 MiB, whatever the model's length."""

Memory = dict[str, Value]
"""What an adversary remembers from round to round, as plain data that a checkpoint can hold."""


@dataclass(frozen=True)
class Sight:
    """What an adversary sees of a round.

    Attributes:
        honest: updates of the honest clients that answered, as the server will have them, by client; at least one.
        attackers: logical ids of the attackers that were asked, sorted.
        round: the round's number.
        seed: the run's.
    """

    honest: Sequence[Update]
    attackers: tuple[int, ...]
    round: int
    seed: int

    def rows(self, section: str) -> list[Vector]:
        """One (d,) float32 vector of each honest client; they must not be changed."""
        return [update.sections[section].vector for update in self.honest]


@dataclass(frozen=True)
class Omniscient(Attack):
    """Attackers that know all honest updates of the round. With none to be seen, they send their own."""

    def plot(self, seen: Sight, memory: Memory) -> dict[str, Vector]:
        """What all attackers of the round send: for each float section a (d,) float32 vector.

        Args:
            seen: the round.
            memory: what earlier calls of the run left there; empty at first. Entries are replaced, never changed.
        """
        return {name: self.craft(seen.rows(name), seen) for name in lied(seen.honest[0])}

    def craft(self, rows: Sequence[Vector], seen: Sight) -> Vector:
        """The vector that all attackers send for one section.

        Args:
            rows: one (d,) float32 vector of each honest client, at least one.
            seen: the round.
        """
        raise TypeError(f"{type(self).__name__} does not say what its attackers send")

    def tell(self, update: Update, attacker: Attacker) -> Update:
        """What the adversary hands over; the honest update where it saw nobody."""
        return replaced(update, attacker.told)


@dataclass(frozen=True)
class Alie(Omniscient):
    """A little is enough: within the spread of the honest, coordinate by coordinate.

    Baruch, Baruch and Goldberg 2019, "A Little Is Enough: Circumventing Defenses For Distributed Learning",
    Algorithm 3: attackers send μ_j − z·σ_j, mean and standard deviation being those of the honest (divided by n, not
    n − 1).

    Attributes:
        z: standard deviations off the mean; None for the algorithm's z_max, by how many clients and attackers of the
            round there are.
    """

    z: float | None = None

    def craft(self, rows: Sequence[Vector], seen: Sight) -> Vector:
        """μ − z·σ."""
        m = len(seen.attackers)
        z = z_max(len(rows) + m, m) if self.z is None else self.z
        if self.z is None and not z and seen.round == 1:
            log.warning(
                "%d attackers and %d honest clients leave ALIE no room (z = 0): they send the mean; "
                "raise attack.fraction, or set attack.z",
                m, len(rows),
            )  # fmt: skip
        lie = np.empty(rows[0].size, np.float32)
        for part, block in blocks(rows):
            lie[part] = block.mean(0) - z * block.std(0)
        return lie


def z_max(clients: int, attackers: int) -> float:
    """Algorithm 3's z_max: the largest z with Φ(z) < (n − m − s) / (n − m), where s = ⌊n/2 + 1⌋ − m.

    s is the number of honest clients that must lie further out than the attackers for these to hold the median; it is
    taken for 1 where they are a majority without. With half of the honest or more to win over, no z above 0 is left:
    attackers then send the mean.

    Args:
        clients: n, attackers and honest, of the round.
        attackers: m, fewer than n.
    """
    honest = clients - attackers
    needed = max(clients // 2 + 1 - attackers, 1)
    share = (honest - needed) / honest
    return NormalDist().inv_cdf(share) if share > 0.5 else 0.0


@dataclass(frozen=True)
class Ipm(Omniscient):
    """Inner product manipulation: minus a little of what the honest want.

    Xie, Koyejo and Gupta 2020, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation":
    attackers send −ε times the mean of the honest. A plain mean is turned round from ε = (n − m) / m on; rules that go
    by distances (Krum, the median) are turned by an ε below 1, which lies near the honest where they are spread.

    Attributes:
        epsilon: ½ by default, of those below 1.
    """

    epsilon: Annotated[float, Ge(0)] = 0.5

    def craft(self, rows: Sequence[Vector], seen: Sight) -> Vector:
        """−ε·μ."""
        lie = np.empty(rows[0].size, np.float32)
        for part, block in blocks(rows):
            lie[part] = -self.epsilon * block.mean(0)
        return lie


def blocks(rows: Sequence[Vector]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Where each block of coordinates lies, and a float64 copy of it, (n, width), of all rows."""
    size = rows[0].size
    width = max(1, _BLOCK_ELEMENTS // len(rows))
    for begin in range(0, size, width):
        part = slice(begin, min(begin + width, size))
        yield part, np.stack([row[part] for row in rows]).astype(np.float64)


def against(rows: NDArray[np.float64], vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) inner products of (n, d) rows with a vector. BLAS would add them up by its number of threads."""
    found: NDArray[np.float64] = np.einsum("ij,j->i", rows, vector)
    return found


def length(vector: NDArray[np.float64]) -> float:
    """‖x‖₂ of a (d,) vector, by the same means as `against`."""
    return float(np.sqrt(np.einsum("i,i->", vector, vector)))
