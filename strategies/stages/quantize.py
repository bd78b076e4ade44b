"""Elements rounded at random to a few levels, without bias.

Alistarh, Grubic, Li, Tomioka & Vojnovic 2017, "QSGD: Communication-Efficient SGD via Gradient Quantization and
Encoding", §3 (`strategies.compression.levels`). Being unbiased it needs no memory: a mean over clients averages the
errors out.

The draws come of the run's seed, the client and the round, so that a run repeats. No ε rests on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import NDArray

from strategies.compression.codes import Bits
from strategies.compression.entropy import Codec
from strategies.compression.levels import (
    Thresholds,
    most_level_bytes,
    pack_levels,
    unpack_levels,
)
from strategies.contract import Claim
from strategies.protocols import ClientContext, Settings, Stage
from strategies.ranges import Ranged
from strategies.secagg.masks import ZEROS, keystream
from strategies.seeds import generator
from strategies.stages.packing import packs
from strategies.update import DELTA, Layout, Update, Vector


@dataclass(frozen=True)
class Quantize(Ranged):
    """Packs the parameters' change in `bits` bits an element, and fewer where an entropy coder finds them.

    Attributes:
        bits: of a level: 8, 4 or 2.
        bucket: consecutive elements that share a scale, a float32. Shorter buckets err less and weigh more.
        codec: of the levels.
        seed: the run's.
    """

    bits: Bits = 8
    bucket: Annotated[int, Ge(8), Le(1 << 16)] = 1024
    codec: Codec = "zstd"
    seed: int = 0

    name = "quantize"
    label = "compression=quantize"
    sections = (DELTA,)

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
        """Client half. A bucket that holds a NaN says so, and the server refuses the update as not finite."""
        draws = _draws(generator(self.seed, "quantize", context.client, context.round).bytes(32))
        packed = pack_levels(update.delta.vector, self.bits, self.bucket, draws, self.codec)
        return update.with_section(DELTA, replace(update.delta, bound=None, packed=packed))

    def decode(self, update: Update) -> Update:
        """Server half: it is unpacked before."""
        return update

    def most_bytes(self, layout: Layout) -> int:
        """See `Packing.most_bytes`."""
        return most_level_bytes(layout.size, self.bits, self.bucket, self.codec)

    def unpack(self, name: str, data: bytes | memoryview, layout: Layout) -> Vector:
        """See `Packing.unpack`."""
        return unpack_levels(data, layout.size, self.bits, self.bucket, self.codec)


def _draws(key: bytes) -> Thresholds:
    """Uniform numbers from a keystream: three times as fast as numpy's generators."""
    stream = keystream(key)

    def fill(out: NDArray[np.uint16]) -> None:
        stream.update_into(ZEROS[: out.nbytes], out.view(np.uint8).data)

    return fill
