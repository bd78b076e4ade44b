"""The majority's sign of each coordinate, times a scale of the clients'.

Bernstein, Zhao, Azizzadenesheli & Anandkumar 2019, "signSGD with Majority Vote is Communication Efficient and Fault
Tolerant", Algorithm 1: every client has one vote a coordinate, whatever the size of what it sends. The paper's step is
a learning rate; here it is the median of the clients' mean magnitudes, which a majority of honest clients keeps among
theirs, so that a server's learning rate means what it means with other rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from strategies.combiners.robust import Robust, Side
from strategies.combiners.rows import Rows
from strategies.contract import Claim, ContractError, name_of
from strategies.update import DELTA, MAXIMUM_SECTIONS, Vector


@dataclass
class MajorityVote(Robust):
    """The sign of the sum of signs, times the median of ‖x‖₁ / d; 0 where votes are even. Needs n > 2f."""

    label: ClassVar[str] = "the majority vote"
    by_coordinate: ClassVar[bool] = True

    def least(self, f: int) -> int:
        """2f + 1: a majority is honest."""
        return 2 * f + 1

    def needs(self, claim: Claim, part: object) -> None:
        """One scale is for one section: refuses others beside the parameters' change, but for counters."""
        super().needs(claim, part)
        beside = sorted(claim.sections - MAXIMUM_SECTIONS - {DELTA})
        if beside:
            raise ContractError(
                claim.source("sections"),
                name_of(part),
                f"signs have one scale for all, which {', '.join(beside)} would have to share",
                "use combiner=median, or what sends the parameters' change alone",
            )

    def combine(self, rows: Rows, f: int, side: Side) -> Vector:
        """See `Robust.combine`."""
        votes = np.empty(rows.size, np.float32)
        magnitudes = np.zeros(rows.n)
        for begin, block in rows.blocks():
            magnitudes += np.abs(block).sum(axis=1, dtype=np.float64)
            np.sign(block, out=block)
            votes[begin : begin + block.shape[1]] = np.sign(block.sum(axis=0))
        votes *= np.float32(np.median(magnitudes / max(rows.size, 1)))
        return votes
