"""The signs of all elements and one scale: 1 bit an element.

Bernstein, Wang, Azizzadenesheli & Anandkumar 2018, "signSGD: Compressed Optimisation for Non-Convex Problems"; with a
scale and with what is lost fed back: Karimireddy, Rebjock, Stich & Jaggi 2019, "Error Feedback Fixes SignSGD and other
Gradient Compression Schemes", Algorithm 1. `combiner=majority_vote` counts the signs; a mean averages them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from strategies.compression.signs import (
    most_sign_bytes,
    pack_signs,
    signed,
    signs_of,
    unpack_signs,
)
from strategies.contract import Claim
from strategies.protocols import ClientContext, Settings, Stage
from strategies.ranges import Ranged
from strategies.stages.memory import fed_back, remember
from strategies.stages.packing import packs
from strategies.update import DELTA, Layout, Section, Update, Vector


@dataclass(frozen=True)
class Sign(Ranged):
    """Packs the parameters' change as signs, and their mean magnitude.

    Attributes:
        error_feedback: whether clients remember what signs lack. Where votes are counted, what a client lost is not
            what it remembers: set it off there.
    """

    error_feedback: bool = True

    name = "sign"
    label = "compression=sign"
    sections = (DELTA,)

    @property
    def remembers(self) -> bool:
        """Whether clients keep something on their disk."""
        return self.error_feedback

    def stages(self) -> tuple[Sequence[Stage], Sequence[Stage]]:
        """This one, behind all else."""
        return [], [self]

    def check(self, claim: Claim) -> Claim:
        """See `packs`."""
        return packs(claim, self)

    def configure(self) -> Settings:
        """Nothing that the configuration does not say."""
        return {}

    def encode(self, update: Update, context: ClientContext) -> Update:
        """Client half. A NaN makes a scale that is none, and the server refuses the update as not finite."""
        target = fed_back(update.delta.vector, context)
        scale, bits = signs_of(target)
        sent = signed(scale, bits, len(target))
        if self.error_feedback:
            remember(target, slice(None), sent, context)
        section = Section(sent, update.delta.layout, packed=pack_signs(scale, bits))
        return update.with_section(DELTA, section)

    def decode(self, update: Update) -> Update:
        """Server half: it is unpacked before."""
        return update

    def most_bytes(self, layout: Layout) -> int:
        """See `Packing.most_bytes`."""
        return most_sign_bytes(layout.size)

    def unpack(self, name: str, data: bytes | memoryview, layout: Layout) -> Vector:
        """See `Packing.unpack`."""
        return unpack_signs(data, layout.size)
