"""The elements of the largest magnitude, with what was left out fed back in the next round.

Stich, Cordonnier & Jaggi 2018, "Sparsified SGD with Memory", Algorithm 1 (Mem-SGD); Karimireddy, Rebjock, Stich & Jaggi
2019, "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", Algorithm 2. With the change δ of a round
and the memory e of the last one that the server took,

    p = δ + e,   sent = top_k(p),   e ← p − sent,

k elements out of all of the model's. Values are rounded to the precision that they travel in before e is taken, so what
rounding costs is fed back too. What a clip behind cuts is not: it is there to be lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Gt, Le

from strategies.compression.entropy import Codec
from strategies.compression.selection import kept, largest
from strategies.compression.values import Precision, as_sent
from strategies.contract import Claim, ContractError, Visibility, name_of
from strategies.protocols import ClientContext, Settings, Stage
from strategies.ranges import Ranged
from strategies.stages.memory import fed_back, remember
from strategies.stages.packing import without_bound
from strategies.stages.sparse import Sparse
from strategies.update import DELTA, Section, Update


@dataclass(frozen=True)
class TopK(Ranged):
    """Leaves ⌈ratio · d⌉ elements of the parameters' change and zeros; of equal ones the first.

    Attributes:
        ratio: the share that is left.
        values: the precision that they travel in.
        error_feedback: whether clients remember what was left out. Without, small elements never travel.
        codec: of the stage that packs what is left.
    """

    ratio: Annotated[float, Gt(0), Le(1)] = 0.01
    values: Precision = "float16"
    error_feedback: bool = True
    codec: Codec = "zstd"

    name = "top_k"
    label = "compression=top_k"

    @property
    def remembers(self) -> bool:
        """Whether clients keep something on their disk."""
        return self.error_feedback

    def stages(self) -> tuple[Sequence[Stage], Sequence[Stage]]:
        """This one before the clip, and the one that packs behind all else."""
        return [self], [Sparse(self.ratio, self.values, self.codec)]

    def check(self, claim: Claim) -> Claim:
        """Each client chooses coordinates of its own.

        Raises:
            ContractError: clients don't run their halves; the server sees sums, or noise has come before.
        """
        claim.need_client_half(self)
        claim.need_visibility(
            self,
            Visibility.EACH,
            why="under a mask or a key each client's own few coordinates would travel as all of them",
            instead="use compression=random_k, whose coordinates all clients share, or collector=plain",
        )
        if claim.private is not None:
            raise ContractError(
                claim.source("private"),
                name_of(self),
                "what is largest behind noise is mostly the noise",
                "put it before the clip and the noise, or use compression=random_k",
            )
        return without_bound(claim.given(self, support="per_client"), self, DELTA)

    def configure(self) -> Settings:
        """Nothing that the configuration does not say."""
        return {}

    def encode(self, update: Update, context: ClientContext) -> Update:
        """Client half. A NaN counts as larger than all, and is sent for the server to refuse."""
        target = fed_back(update.delta.vector, context)
        chosen = largest(target, kept(self.ratio, len(target)))
        values = as_sent(target[chosen], self.values)
        if self.error_feedback:
            remember(target, chosen, values, context)
        sent = np.zeros_like(target)
        sent[chosen] = values
        return update.with_section(DELTA, Section(sent, update.delta.layout))

    def decode(self, update: Update) -> Update:
        """Server half: zeros are what they are."""
        return update
