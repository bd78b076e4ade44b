"""Local differential privacy of updates: each client noises its own, and trusts nobody with the rest.

The stage `strategies.stages.LocalNoise` makes the noise; here is what it promises. ε is one client's, over all rounds:
the server knows whom it asks, so sampling amplifies nothing, and a client counts as asked in every round. What is done
with the noised updates is post-processing, a robust rule as well as a mean. The clip is the client's alone: noise hides
from the server whether it was applied, so a client that skips it gains what admission lets pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from os import urandom
from typing import ClassVar

from strategies.contract import Claim, ContractError, name_of
from strategies.privacy.events import GaussianRelease, Release
from strategies.privacy.guarantee import Guarantee
from strategies.privacy.noise import Entropy, Seeded
from strategies.protocols import ClientContext, Stage
from strategies.stages.local_noise import LocalNoise


@dataclass
class Local(Guarantee):
    """Gaussian noise on each client's update."""

    label: ClassVar[str] = "privacy=local"
    unit: ClassVar[str] = "client update"
    mechanism: ClassVar[str] = "local gaussian"
    protects: ClassVar[str] = "each client's updates of all rounds, from everybody"

    def promised(self, claim: Claim) -> Claim:
        """The noise must be the stage's; raises `ContractError` where the pipeline lacks it."""
        if claim.private != self.mechanism:
            raise ContractError(
                claim.source("private"),
                name_of(self),
                "clients add no noise of their own",
                "put its stages behind the clip: Pipeline(stages=[clip, *privacy.stages(clip.bounds)])",
            )
        return claim

    def release(self, claim: Claim, z: float) -> Release:
        """One noised update: any two lie within 2C."""
        return GaussianRelease(z / 2, relation="replace_one")

    def stages(self, bounds: Callable[[], Mapping[str, float]]) -> Sequence[Stage]:
        """The noise, behind the clip."""
        least = self.noise_multiplier or 0.0
        return [LocalNoise(lambda: self.z, least=least, entropy=self._entropy)]

    def drowning(self, size: int) -> float:
        """Of the mean of a cohort, or of one update where none is planned."""
        return self.z * sqrt(size / (self._claim.cohort or 1))

    def _entropy(self, context: ClientContext) -> Entropy:
        if not self.reproducible_noise:
            return urandom
        return Seeded(self.seed, f"local noise {context.client} {context.round}")
