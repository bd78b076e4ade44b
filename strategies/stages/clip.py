"""Clipping to an L2 norm (McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", §2).

A client scales its update down to norm C. The server does the same again to whatever it sees of a single client:
a client that skips its half gains nothing by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Annotated

import numpy as np
from annotated_types import Gt, MinLen

from strategies.contract import Claim
from strategies.protocols import ClientContext, Settings
from strategies.ranges import Ranged
from strategies.update import DELTA, Section, Update, Vector
from strategies.wire import Refused

LEAST_NORM, MOST_NORM = 1e-30, 1e30
"""Between these a vector of float32 can be scaled to a norm without falling among the denormal numbers."""


@dataclass(frozen=True)
class Clip(Ranged):
    """Scales each named section to an L2 norm of at most `norm`.

    Attributes:
        norm: the bound C, in the units of the parameters.
        sections: which sections are clipped, each to its own bound of C.
    """

    norm: Annotated[float, Gt(0)] = 1.0
    sections: Annotated[tuple[str, ...], MinLen(1)] = (DELTA,)

    name = "clip"

    def check(self, claim: Claim) -> Claim:
        """Gives the clipped sections a bound; the others keep what they had."""
        claim.need_client_half(self)
        claim.need_sections(self, self.sections, instead="clip sections that the updates have")
        return claim.given(self, bounds={**claim.bounds, **self.bounds()})

    def bounds(self) -> Mapping[str, float]:
        """L2 bounds by section."""
        return dict.fromkeys(self.sections, self.norm)

    def configure(self) -> Settings:
        """The present bound."""
        return {"norm": self.norm}

    def encode(self, update: Update, context: ClientContext) -> Update:
        """Client half: clips to the bound that the server sent; raises `Refused` for one that is none."""
        return clip(update, agreed_norm(context), self.sections)

    def decode(self, update: Update) -> Update:
        """Server half: the bound holds for a single client whatever it did. A sum is not the place to clip."""
        return clip(update, self.norm, self.sections) if len(update.members) == 1 else update


def clip(update: Update, norm: float, sections: Iterable[str]) -> Update:
    """The update with each named section's vector scaled by min(1, norm / ‖x‖₂); others untouched.

    What has no length, for a NaN or an infinity in it, is left to admission to refuse; noise takes zeros in its place.
    """
    for name in sections:
        section = update.sections[name]
        length = l2_norm(section.vector)
        if isfinite(length) and length > norm:
            # A hair further than C, so that rounding to float32 can't lift the norm above it again.
            scaled = section.vector * np.float64(norm / length * (1 - 2.0**-22))
            section = replace(section, vector=scaled.astype(np.float32), bound=norm, packed=None)
        else:
            section = replace(section, bound=norm)
        update = update.with_section(name, section)
    return update


def agreed_norm(context: ClientContext) -> float:
    """The bound that the server sent.

    Raises:
        Refused: `terms`, where float32 can't hold a vector to it.
    """
    norm = float(context.settings["norm"])
    if not LEAST_NORM <= norm <= MOST_NORM:
        raise Refused("terms", f"a clip to {norm:g} is none")
    return norm


def bounded(section: Section) -> Vector:
    """A clipped section's vector, which noise hides: zeros where it has no length, and so no bound."""
    return section.vector if isfinite(l2_norm(section.vector)) else np.zeros_like(section.vector)


def l2_norm(vector: Vector) -> float:
    """‖x‖₂ of a (d,) float32 vector in float64: neither overflows near 1e38 nor vanishes near 1e-38."""
    total = 0.0
    for begin in range(0, len(vector), 1 << 16):
        block = vector[begin : begin + (1 << 16)].astype(np.float64)
        total += float(block @ block)
    return float(np.sqrt(total))
