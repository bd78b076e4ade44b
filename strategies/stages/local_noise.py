"""Noise that each client adds to its own clipped update before it leaves: local differential privacy of updates.

The Gaussian mechanism on one client's vector (Dwork & Roth 2014, "The Algorithmic Foundations of Differential Privacy",
Theorem A.1; its exact cost is the accountant's). Neighbours are any two updates that a client could have sent, which
lie up to 2C apart. Whatever the server does with it, or sees of it, is post-processing. The price is the noise: the
mean of n updates carries z·C/√n an element, against z·C/n under a trusted server.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import sqrt

import numpy as np

from strategies.contract import Claim, ContractError, name_of
from strategies.privacy.noise import Entropy, gaussian
from strategies.protocols import ClientContext, Settings
from strategies.stages.clip import bounded
from strategies.update import Section, Update
from strategies.wire import Refused


class LocalNoise:
    """Gaussian noise of standard deviation z·C on every element, C the joint bound of the sections.

    Args:
        multiplier: z as the server has it, asked when settings are sent down.
        least: the smallest z that this client adds, whatever the server says; 0 for any.
        entropy: of the noise; None for the operating system's, afresh for each update.
    """

    name = "noise"
    label = "privacy=local"
    covers = True
    """The server halves of earlier stages don't run: a clip would cut the noise, and with it what it carries."""

    def __init__(
        self,
        multiplier: Callable[[], float],
        *,
        least: float = 0.0,
        entropy: Callable[[ClientContext], Entropy],
    ) -> None:
        self._multiplier, self._least, self._entropy = multiplier, least, entropy

    def check(self, claim: Claim) -> Claim:
        """Makes updates private, and their bounds void: raises `ContractError` where a section has none."""
        claim.need_client_half(self)
        claim.need_no_statistics(self)
        claim.need_bounds(self)
        if claim.adaptive:
            raise ContractError(
                claim.source("adaptive"),
                name_of(self),
                "a clip bit under local noise of its own says nothing",
                "use clip=fixed",
            )
        return claim.given(self, bounds={}, private="local gaussian")

    def configure(self) -> Settings:
        """The noise multiplier."""
        return {"multiplier": self._multiplier()}

    def encode(self, update: Update, context: ClientContext) -> Update:
        """Client half: adds the noise.

        Raises:
            Refused: `terms`, when the server asks for less noise than this client adds at least.
        """
        z = float(context.settings["multiplier"])
        if not z >= self._least or not z > 0:
            raise Refused(
                "terms", f"noise of {z:g} is asked for, {self._least:g} is the least here"
            )
        bounds = [section.bound for section in update.sections.values()]
        if any(bound is None for bound in bounds):
            raise Refused("terms", "an update without a bound is hidden by no noise")
        scale = z * sqrt(sum(bound**2 for bound in bounds if bound is not None))
        entropy = self._entropy(context)
        for name, section in update.sections.items():
            noise = gaussian(section.layout.size, entropy)
            noise *= scale
            noise += bounded(section)
            update = update.with_section(name, Section(noise.astype(np.float32), section.layout))
        return replace(update, weight=1.0, metrics={})

    def decode(self, update: Update) -> Update:
        """Server half: noise is not to be taken off."""
        return update
