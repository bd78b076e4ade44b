"""Matrices as products of two thin ones, with what is lost fed back in the next round.

Vogels, Karimireddy & Jaggi 2019, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization",
Algorithms 1 and 2, for one client by itself (`strategies.compression.low_rank`). Each client goes on from the factor
that it sent last (the paper's warm start), and takes off its memory bit for bit what the server makes of its factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from strategies.compression.entropy import Codec
from strategies.compression.low_rank import (
    as_decoded,
    factorise,
    first_right,
    matrices_of,
    most_low_rank_bytes,
    pack_low_rank,
    unpack_low_rank,
)
from strategies.contract import Claim
from strategies.protocols import ClientContext, Settings, Stage
from strategies.ranges import Ranged
from strategies.stages.memory import fed_back, remember
from strategies.stages.packing import packs
from strategies.update import DELTA, Layout, Section, Update, Vector

_RIGHT = "right"
"""The factor that the next round starts from."""


@dataclass(frozen=True)
class PowerSgd(Ranged):
    """Packs each array of two axes or more as factors of a rank, where these are smaller; the others as they are.

    Attributes:
        rank: r. An (n, m) matrix travels as r·(n + m) numbers of 16 bits.
        error_feedback: whether clients remember what a product lacks.
        codec: of the numbers' signs and exponents.
        seed: the run's: of the factor that clients start from.
    """

    rank: Annotated[int, Ge(1), Le(256)] = 2
    error_feedback: bool = True
    codec: Codec = "zstd"
    seed: int = 0

    name = "power_sgd"
    label = "compression=power_sgd"
    sections = (DELTA,)
    remembers = True
    """The factor, whatever else."""

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
        """Client half. A NaN makes factors that are none, which the server refuses as not finite."""
        layout, target = update.delta.layout, fed_back(update.delta.vector, context)
        matrices = matrices_of(layout, self.rank)
        right = context.state.get(_RIGHT)
        if right is None:
            right = first_right(matrices, self.seed)
        left, right = factorise(target, matrices, right)
        sent = as_decoded(target, matrices, left, right)
        context.proposed[_RIGHT] = right
        packed = pack_low_rank(target, matrices, left, right, self.codec)
        if self.error_feedback:
            remember(target, slice(None), sent, context)
        return update.with_section(DELTA, Section(sent, layout, packed=packed))

    def decode(self, update: Update) -> Update:
        """Server half: it is unpacked before."""
        return update

    def most_bytes(self, layout: Layout) -> int:
        """See `Packing.most_bytes`."""
        return most_low_rank_bytes(layout.size, matrices_of(layout, self.rank), self.codec)

    def unpack(self, name: str, data: bytes | memoryview, layout: Layout) -> Vector:
        """See `Packing.unpack`."""
        return unpack_low_rank(data, layout.size, matrices_of(layout, self.rank), self.codec)
