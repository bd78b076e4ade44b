"""A vector of which most is 0, as bytes: gaps between coordinates, and values (`strategies.compression.sparse`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Gt, Le

from strategies.compression.entropy import Codec
from strategies.compression.selection import kept
from strategies.compression.sparse import most_sparse_bytes, pack_sparse, unpack_sparse
from strategies.compression.values import Precision
from strategies.contract import Claim, ContractError, name_of
from strategies.protocols import ClientContext, Settings
from strategies.ranges import Ranged
from strategies.stages.packing import packs
from strategies.update import DELTA, Layout, Update, Vector


@dataclass(frozen=True)
class Sparse(Ranged):
    """Packs what a selection before it has left of the parameters' change.

    Attributes:
        ratio: the share of the elements that the selection leaves; the server takes no more.
        values: how the values are written. A clip in between scales them, so that they are rounded once more.
        codec: of coordinates and of the values' signs and exponents.
    """

    ratio: Annotated[float, Gt(0), Le(1)] = 0.01
    values: Precision = "float16"
    codec: Codec = "zstd"

    name = "sparse"
    label = "compression=top_k"
    sections = (DELTA,)

    def check(self, claim: Claim) -> Claim:
        """See `packs`.

        Raises:
            ContractError: as there; or the vectors are not sparse, or noise has filled them up.
        """
        if claim.private is not None:
            raise ContractError(
                claim.source("private"),
                name_of(self),
                "noise leaves no zeros, so that a sparse vector is sparse no more",
                "use compression=random_k or compression=quantize",
            )
        if claim.support != "per_client":
            raise ContractError(
                claim.source("support"),
                name_of(self),
                "nothing before it leaves most elements 0",
                "put stages.TopK before the clip, as TopK().stages() does",
            )
        return packs(claim, self)

    def configure(self) -> Settings:
        """Nothing that the configuration does not say."""
        return {}

    def encode(self, update: Update, context: ClientContext) -> Update:
        """Client half."""
        packed = pack_sparse(update.delta.vector, self.values, self.codec)
        return update.with_section(DELTA, replace(update.delta, bound=None, packed=packed))

    def decode(self, update: Update) -> Update:
        """Server half: it is unpacked before."""
        return update

    def most_bytes(self, layout: Layout) -> int:
        """See `Packing.most_bytes`."""
        size = layout.size
        return most_sparse_bytes(size, kept(self.ratio, size), self.values, self.codec)

    def unpack(self, name: str, data: bytes | memoryview, layout: Layout) -> Vector:
        """See `Packing.unpack`."""
        size = layout.size
        return unpack_sparse(data, size, kept(self.ratio, size), self.values, self.codec)
