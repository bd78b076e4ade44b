"""A cohort of fixed size, drawn uniformly without replacement: FedAvg's S_t (McMahan et al. 2017, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le

from strategies.contract import Claim
from strategies.ranges import Ranged
from strategies.seeds import generator


@dataclass(frozen=True)
class Uniform(Ranged):
    """Asks max(minimum, ⌊fraction · n⌉) of the n clients that are there.

    Where a claim of privacy rests on it (`reproducible=False`), the share of those who are there that is asked is never
    above the share that was claimed of the population, whoever is gone.

    Attributes:
        fraction: of the clients, in (0, 1].
        minimum: asked at least (all of them where there are fewer).
        population: clients planned in all, which fixes the cohort for the contract; 0 where it is not known.
        reproducible: whether no privacy rests on the draw.
    """

    fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    minimum: Annotated[int, Ge(1)] = 1
    population: Annotated[int, Ge(0)] = 0
    reproducible: bool = True

    def check(self, claim: Claim) -> Claim:
        """The server draws a cohort of fixed size itself."""
        cohort = self.cohort(self.population) if self.population else None
        rate = cohort / self.population if cohort is not None else None
        return claim.given(self, sampling="fixed", rate=rate, cohort=cohort)

    def cohort(self, available: int) -> int:
        """How many of `available` clients are asked."""
        if not self.reproducible and self.population > available:
            return self.cohort(self.population) * available // self.population
        return min(available, max(self.minimum, round(self.fraction * available)))

    def draw(
        self, clients: Sequence[int], *, seed: int, round_number: int, attempt: int
    ) -> list[int]:
        """A cohort, in ascending order; another one for every attempt at a round.

        Args:
            clients: logical ids of those who are there, sorted.
            seed: the run's.
            round_number: from 1.
            attempt: from 0.
        """
        count = self.cohort(len(clients))
        return self.pick(clients, count, seed=seed, round_number=round_number, attempt=attempt)

    def pick(
        self, clients: Sequence[int], count: int, *, seed: int, round_number: int, attempt: int
    ) -> list[int]:
        """`count` of the clients, in ascending order; others for every attempt."""
        rng = generator(seed, "sampler", round_number, attempt)
        chosen = rng.choice(len(clients), min(count, len(clients)), replace=False)
        return sorted(clients[index] for index in chosen)

    def took(self, clients: Iterable[int], round_number: int) -> None:
        """Nobody is remembered."""
