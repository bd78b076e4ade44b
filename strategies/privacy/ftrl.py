"""DP-FTRL: central privacy where nothing can be claimed of how clients are sampled.

Kairouz, McMahan, Song, Thakkar, Thakurta & Xu 2021, "Practical and Private (Deep) Learning without Sampling or
Shuffling".

The server's noise is correlated from round to round by a banded matrix (`strategies.privacy.banded`), which costs what
a client's at most k participations, at least b rounds apart, come to; the sampler `spaced` holds clients to both.
Neighbours differ in one client's updates being there or zero, in the same public schedule.

Noise is kept in memory and nowhere else. A resumed run begins a new matrix with new noise, and pays for it from its
first row: what it costs comes on top of what was spent. (Noise from the run's seed, of which nothing is promised, goes
on where it was.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge, Lt

from strategies.contract import Claim, ContractError, name_of
from strategies.privacy.banded import BandedNoise, BandedToeplitz
from strategies.privacy.central import Central
from strategies.privacy.events import GaussianRelease, Release
from strategies.privacy.noise import gaussian
from strategies.update import Section, Update


@dataclass
class Ftrl(Central):
    """Noise correlated over rounds.

    Attributes:
        bands: of the matrix; None for as many as the sampler's separation, the most there can be.
        momentum: of the server's optimiser, which the matrix is made for; another one costs accuracy, not privacy.
    """

    bands: Annotated[int, Ge(1)] | None = None
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0

    label: ClassVar[str] = "privacy=ftrl"
    mechanism: ClassVar[str] = "banded matrix factorisation"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._noise: dict[str, BandedNoise] = {}
        self._row = 0

    def promised(self, claim: Claim) -> Claim:
        """Participation must be bounded, and the clip fixed.

        Raises:
            ContractError: it is not, or the matrix has more bands than clients are rounds apart.
        """
        claim = super().promised(claim)
        if claim.participations is None:
            raise ContractError(
                claim.source("sampling"),
                name_of(self),
                "how often one client takes part, and how soon again, is not bounded",
                "use sampler=spaced, or privacy=central with sampler=poisson",
            )
        if claim.adaptive:
            raise ContractError(
                claim.source("adaptive"),
                name_of(self),
                "noise of one round is taken back in later ones, which a moving bound forbids",
                "use clip=fixed",
            )
        if self.bands is not None and self.bands > claim.separation:
            raise ContractError(
                claim.source("separation"),
                name_of(self),
                f"{self.bands} bands reach over the {claim.separation} rounds that clients stay away",
                f"set privacy.bands={claim.separation} at most, or raise sampler.separation",
            )
        return claim

    def release(self, claim: Claim, z: float) -> Release:
        """One participation in a round of independent noise: what the matrix costs is counted in these."""
        return GaussianRelease(z)

    def releases(self, claim: Claim, z: float) -> Iterable[tuple[Release, int]]:
        """All planned rounds as the one Gaussian release that they are."""
        limits = self._limits(claim)
        s = self._matrix(claim).sensitivity(self.rounds, **limits)
        return [(GaussianRelease(z / s), 1)]

    def next_release(self) -> Release | None:
        """What the next row adds to the segment's cost; None once every participation can be over."""
        return self._matrix(self._claim).release(
            self._row + 1, **self._limits(self._claim), noise_multiplier=self.z
        )

    def charge(self, round_number: int) -> None:
        """As every guarantee's; each round that is paid for takes a row."""
        super().charge(round_number)
        self._row += 1

    def privatise(self, aggregate: Update, bounds: Mapping[str, float]) -> Update:
        """Adds the next row of the correlated noise, scaled to the clip's bound."""
        scales = self.deviations(bounds)
        sections = dict(aggregate.sections)
        for name, section in sections.items():
            size = section.layout.size
            stream = self._noise.setdefault(name, BandedNoise(self._matrix(self._claim), size))
            if self.reproducible_noise:  # what an earlier process of the run gave is made anew
                for row in range(stream.rows + 1, self._round):
                    stream.next(gaussian(size, self._entropy(row, name)))
            noise = stream.next(gaussian(size, self._entropy(self._round, name)))
            noise *= scales[name]
            noise += section.vector
            sections[name] = Section(noise.astype(np.float32), section.layout)
        return replace(aggregate, sections=sections)

    def report(self) -> dict[str, Any] | None:
        """As every guarantee's, with what participation is held to."""
        report = super().report()
        return report and {**report, **self._limits(self._claim)}

    @property
    def adjacency(self) -> str:
        """A client's updates are there, or zero, in one public schedule."""
        return "zero_out"

    def _matrix(self, claim: Claim) -> BandedToeplitz:
        return BandedToeplitz(self.bands or claim.separation, self.momentum)

    @staticmethod
    def _limits(claim: Claim) -> dict[str, int]:
        assert claim.participations is not None  # checked
        return {"participations": claim.participations, "separation": claim.separation}
