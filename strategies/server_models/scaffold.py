"""SCAFFOLD's server half (Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging", Algorithm 1).

x ← x + η_g · mean Δyᵢ and c ← c + |S|/N · mean Δcᵢ. The client half is `clients.trainers.Scaffold`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from strategies.contract import Claim, ContractError
from strategies.server_models.optimizers import OptimizerBase, Rate
from strategies.update import CONTROL, Update, Vector


@dataclass
class Scaffold(OptimizerBase):
    """Keeps the server's control variate c.

    Attributes:
        lr: the global step size η_g.
        population: N, the number of all clients; with 0 those who take part in a round count as all there are.
    """

    lr: Rate = 1.0
    population: Annotated[int, Ge(0)] = 0

    label = "SCAFFOLD's server"
    slot_names: ClassVar[tuple[str, ...]] = ("control",)

    @property
    def sections(self) -> tuple[str, ...]:
        """Each client's change of its control variate."""
        return (CONTROL,)

    def check(self, claim: Claim) -> Claim:
        """Needs the control section, which vanilla clients can't send, and a uniform mean: weights would bias it."""
        claim.need_client_half(self)
        claim.need_rounds(
            self,
            why="control variates correct a drift from the present model, and these are of several versions",
            instead="use server=sgd with client=sgd or proximal, or scheduler=synchronous",
        )
        claim.need_sections(self, [CONTROL], instead="use client=scaffold, which sends it")
        if claim.weighting != "uniform":
            raise ContractError(
                claim.source("weighting"),
                self.label,
                "its control variate is the uniform mean over clients, and weights by examples bias it",
                "use combiner.weighting=uniform",
            )
        if claim.denominator != "replies":
            raise ContractError(
                claim.source("denominator"),
                self.label,
                "c moves by the mean over those who replied, and a fixed denominator makes it smaller",
                "use combiner.denominator=replies",
            )
        return claim

    def step(self, parameters: NDArray[np.float64], aggregate: Update) -> None:
        """Moves (d,) parameters and c."""
        parameters += np.multiply(aggregate.delta.vector, self.lr, dtype=np.float64)
        share = len(aggregate.members) / max(self.population, len(aggregate.members))
        self._slots["control"] += np.multiply(
            aggregate.sections[CONTROL].vector, share, dtype=np.float64
        )

    def broadcast(self) -> Mapping[str, Vector]:
        """c, as (d,) float32."""
        return {CONTROL: self._slots["control"].astype(np.float32)}
