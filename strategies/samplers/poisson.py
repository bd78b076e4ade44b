"""Poisson sampling: each client is asked by a coin of its own, so that the size of a cohort is random, and may be 0.

What differential privacy's amplification by sampling is proved for (Abadi et al. 2016, "Deep Learning with Differential
Privacy", §3.1; for clients, McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", §3). The
coins must be nobody's to foresee: they come from the operating system, not from the run's seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import SystemRandom
from typing import Annotated

from annotated_types import Ge, Gt, Le

from strategies.contract import Claim
from strategies.ranges import Ranged
from strategies.seeds import generator


@dataclass(frozen=True)
class Poisson(Ranged):
    """Asks each client that is there with the probability `fraction`.

    Attributes:
        fraction: the probability, in (0, 1].
        population: clients planned in all, which fixes the expected cohort; 0 where it is not known.
        reproducible: coins come from the run's seed, so that a run can be repeated; no ε may rest on them.
    """

    fraction: Annotated[float, Gt(0), Le(1)] = 0.5
    population: Annotated[int, Ge(0)] = 0
    reproducible: bool = False

    def check(self, claim: Claim) -> Claim:
        """The server's own coins; the planned cohort is the expected one."""
        cohort = self.cohort(self.population) if self.population else None
        return claim.given(self, sampling="poisson", rate=self.fraction, cohort=cohort)

    def cohort(self, available: int) -> int:
        """How many of `available` clients are expected, at least 1."""
        return max(1, round(self.fraction * available))

    def draw(
        self, clients: Sequence[int], *, seed: int, round_number: int, attempt: int
    ) -> list[int]:
        """A cohort, in ascending order: other coins for every attempt at a round."""
        if self.reproducible:
            rng = generator(seed, "sampler", round_number, attempt)
            return [client for client in sorted(clients) if rng.random() < self.fraction]
        coin = SystemRandom().random
        return [client for client in sorted(clients) if coin() < self.fraction]
