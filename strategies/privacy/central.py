"""Central differential privacy at the level of clients: DP-FedAvg.

McMahan, Ramage, Talwar & Zhang 2018, "Learning Differentially Private Recurrent Language Models", Algorithm 1.

The server is trusted: it sees clipped updates (or their sum), and releases

    (Σ clipped + N(0, z²C²)) / planned cohort,

with the same denominator and the same noise however many clients replied, even none: a number of replies that showed
would tell of a client. Noise goes on before the server's optimiser, whose steps are post-processing.

An adaptive clip's bit is noised beside (Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping",
Theorem 1): with σ_b on the sum of bits, the rest is noised with z_Δ = (z⁻² − (2σ_b)⁻²)^(−1/2), and both cost z.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from os import urandom
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Gt

from strategies.contract import Claim, ContractError, Visibility, name_of
from strategies.privacy.events import Release
from strategies.privacy.guarantee import Guarantee, gaussian_release
from strategies.privacy.noise import Entropy, Seeded, gaussian
from strategies.update import CLIP_BIT, DELTA, Section, Update

_BIT_SHARE = 20
"""σ_b of an expected cohort m is m/20 by default, as in the paper's experiments."""

_FLOAT32 = 2.0**-22
"""What rounding a mean of n to float32 may add to what one client changes, relative to it, times n."""

_RING = 2**31
"""Half the ring that masked sums are in."""

_SUMMED = 1e-3
"""Likewise what an encrypted or masked sum's rounding may add, where a bound is not small beside the ring's limit."""


@dataclass
class Central(Guarantee):
    """Gaussian noise on the aggregate.

    Attributes:
        bit_noise: σ_b, standard deviation of the noise on the sum of an adaptive clip's bits; None for a twentieth of
            the planned cohort, or z where that is more: the rest then has 1.15 times the noise at most.
    """

    bit_noise: Annotated[float, Gt(0)] | None = None

    label: ClassVar[str] = "privacy=central"
    unconditional: ClassVar[bool] = True
    mechanism: ClassVar[str] = "gaussian"
    protects: ClassVar[str] = (
        "each client, all it has, from whoever sees the models; the server is trusted with clipped updates"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._round = 0

    def promised(self, claim: Claim) -> Claim:
        """A sensitivity must be there, and nobody's exclusion may tell of updates.

        Raises:
            ContractError: as said, or a quorum asks for replies that the release must not depend on.
        """
        claim.need_public_choice(self)
        claim.need_sensitivity(self)
        if claim.private is not None:
            raise ContractError(
                claim.source("private"),
                name_of(self),
                "the updates are private before they are combined, and noise would be paid for twice",
                "use one of privacy=central, privacy=local and privacy=distributed",
            )
        if claim.quorum > 1:
            raise ContractError(
                claim.source("quorum"),
                name_of(self),
                f"a quorum of {claim.quorum} would make the release depend on who replied; it is made even for none",
                "set admission.quorum=1",
            )
        return claim

    def release(self, claim: Claim, z: float) -> Release:
        """Every round the same."""
        return gaussian_release(claim, z)

    def check(self, claim: Claim) -> Claim:
        """As every guarantee's; raises `ContractError` where a bit's noise alone costs more than z allows."""
        claim = super().check(claim)
        if CLIP_BIT in claim.sections and 2 * self._bit_noise <= self.z:
            raise ContractError(
                claim.source("adaptive"),
                name_of(self),
                f"noise of {self._bit_noise:.3g} on the sum of the clip's bits costs more than a noise multiplier of"
                f" {self.z:.3g} leaves",
                f"set privacy.bit_noise above {self.z / 2:.3g}, ask more clients a round, or use clip=fixed",
            )
        return claim

    def charge(self, round_number: int) -> None:
        """As every guarantee's."""
        super().charge(round_number)
        self._round = round_number

    def privatise(self, aggregate: Update, bounds: Mapping[str, float]) -> Update:
        """Adds noise to each section, scaled to its bound."""
        size = sum(section.layout.size for section in aggregate.sections.values())
        scales = self.deviations(bounds, size)
        sections = dict(aggregate.sections)
        for name, section in sections.items():
            noise = gaussian(section.layout.size, self._entropy(self._round, name))
            noise *= scales[name]
            noise += section.vector
            sections[name] = Section(noise.astype(np.float32), section.layout)
        return replace(aggregate, sections=sections)

    def deviations(self, bounds: Mapping[str, float], size: int = 1) -> dict[str, float]:
        """Standard deviation of the noise on an element of each section of the mean over the planned cohort.

        Args:
            bounds: L2 bounds of one client's sections in this round.
            size: elements of all sections: masked sums round each of them by up to a step.
        """
        cohort = self._cohort
        slack = 1 + cohort * _FLOAT32
        if self._claim.visibility < Visibility.EACH:
            members = self._claim.members or cohort
            step = max(bounds.values()) * members / _RING
            slack += max(_SUMMED, sqrt(size) * step / min(bounds.values()))
        rest, z = [name for name in bounds if name != CLIP_BIT], self.z
        if CLIP_BIT in bounds:
            z = (self.z**-2 - (2 * self._bit_noise) ** -2) ** -0.5
        joint = sqrt(sum(bounds[name] ** 2 for name in rest))
        if (
            not self._claim.adaptive
        ):  # a rule may bound what one client changes, whatever a clip does
            rest, joint = sorted(self._claim.sections), self._reach(self._claim)
        scales = dict.fromkeys(rest, slack * z * joint / cohort)
        if CLIP_BIT in bounds:
            scales[CLIP_BIT] = slack * self._bit_noise / cohort
        return scales

    def drowning(self, size: int) -> float:
        """Of the mean: no longer than C."""
        scale = self.deviations(self._claim.bounds, size)[DELTA]
        return scale * sqrt(size) / self._reach(self._claim)

    def signal(self, size: int) -> str:
        """The planned cohort, too."""
        return f"cohort {self._cohort}, {super().signal(size)}"

    def _entropy(self, round_number: int, section: str) -> Entropy:
        """The noise's: by round where it repeats, so that a run that is resumed has that of one that was not."""
        if not self.reproducible_noise:
            return urandom
        return Seeded(self.seed, f"central noise {round_number} {section}")

    @staticmethod
    def _reach(claim: Claim) -> float:
        """How far one client moves the sum over the cohort: C behind a clip, or what a rule allows."""
        assert claim.sensitivity is not None  # checked
        assert claim.cohort is not None  # without, there is no sensitivity
        return claim.sensitivity * claim.cohort / (2 if claim.sampling == "fixed" else 1)

    @property
    def _cohort(self) -> int:
        assert self._claim.cohort is not None  # without, there is no sensitivity
        return self._claim.cohort

    @property
    def _bit_noise(self) -> float:
        return max(self._cohort / _BIT_SHARE, self.z) if self.bit_noise is None else self.bit_noise
