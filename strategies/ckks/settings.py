"""What both halves of the CKKS collector are told."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from strategies.ckks.messages import ID_BYTES
from strategies.ckks.parameters import CkksParameters
from strategies.contents import Contents
from strategies.ranges import Ranged
from strategies.update import Layout


@dataclass(frozen=True)
class CkksSettings(Ranged):
    """The settings that the clients and the server share.

    Attributes:
        degree: N, the degree of the polynomials and the number of values in a ciphertext.
        bits: of the ciphertexts' prime; a second one where the key is of a ring that has two.
        members: the most clients that a sum may hold: the scale leaves room for as many.
        limit: largest magnitude of an element of an update; what lies beyond is saturated, and its share is reported.
        noise_bits: ν, bits of statistical security of what is opened, for as many `decryptions` (docs/ckks.md).
        decryptions: τ, ciphertexts that may be opened under one key.
        decryptors: members that open each sum, and must agree on it.
        quorum: members without which no sum is opened, and which each client demands.
        metrics: names of the training metrics within the ciphertexts.
        metric_limit: largest magnitude of a metric.
        max_weight: largest weight that counts, in examples; None where all clients weigh alike.

    Raises:
        ValueError: a setting is out of its range.
    """

    degree: Literal[4096, 8192] = 4096
    bits: tuple[int, ...] = (60,)
    members: Annotated[int, Ge(2)] = 100
    limit: Annotated[float, Gt(0)] = 1.0
    noise_bits: Annotated[float, Ge(0), Le(64)] = 5.0
    decryptions: Annotated[int, Ge(1)] = 4096
    decryptors: Annotated[int, Ge(2)] = 2
    quorum: Annotated[int, Ge(2)] = 3
    metrics: tuple[str, ...] = ("train_loss",)
    metric_limit: Annotated[float, Gt(0)] = 100.0
    max_weight: Annotated[int, Ge(1)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "bits", tuple(self.bits))
        object.__setattr__(self, "metrics", tuple(self.metrics))
        if self.decryptors > self.quorum:
            raise ValueError(
                f"decryptors = {self.decryptors}: a sum of quorum = {self.quorum} members has no more"
            )
        _ = self.parameters

    @property
    def parameters(self) -> CkksParameters:
        """Those of the scheme."""
        return CkksParameters(
            self.degree, self.bits, self.members, self.limit, self.noise_bits, self.decryptions
        )

    @property
    def digest(self) -> bytes:
        """16 bytes that both ends share when their settings are the same."""
        settings = [(item.name, getattr(self, item.name)) for item in fields(CkksSettings)]
        return hashlib.sha256(repr(settings).encode()).digest()[:ID_BYTES]

    def contents(self, layouts: Mapping[str, Layout]) -> Contents:
        """The order of what is summed."""
        return Contents(layouts, self.metrics, self.metric_limit, self.max_weight)
