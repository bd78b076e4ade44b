"""Distributed differential privacy: members of a masked sum share the noise, and no server is trusted with it bare.

Kairouz, Liu & Steinke 2021; Agarwal, Kairouz & Liu 2021; docs/distributed_dp.md.

The stage `strategies.stages.integer_noise` makes the noise, the collector `masked` hides the shares, and says how many
honest members any sum that it opens has at least: what those add is counted on, and nothing else. Two ε are told:

* against the server, who knows the members of each sum: no amplification by sampling. The budget is of this one.
* against those who see the models, and neither sums nor cohorts: where cohorts come of Poisson's coins, with rate q.

Neighbours differ in one member's vector being there or zero (or another, where cohorts are of fixed size): it takes
part and adds its share in both. So a model is a mixture: with probability q the member is in, and ε(α) tells the
two apart; else they are the same. exp((α − 1)·D) is jointly convex, so D ≤ log(1 − q + q·exp((α − 1)·ε(α))) / (α − 1).
Bounds of the order q² assume that sums with and without a member are noised alike, and these are not.

Integer noise has no privacy loss distribution here: Rényi divergences account for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import expm1, log, log1p, sqrt
from os import urandom
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from strategies.contract import Claim, ContractError, name_of
from strategies.privacy.events import Relation, Release
from strategies.privacy.guarantee import Guarantee
from strategies.privacy.lattice import renyi
from strategies.privacy.noise import Entropy, Seeded
from strategies.privacy.steps import Steps
from strategies.protocols import ClientContext, Stage
from strategies.stages.integer_noise import IntegerNoise
from strategies.update import CLIP_BIT, DELTA

_ORDERS = (*(1 + 2.0**k for k in range(-6, 0)), *range(2, 65), 96, 128, 256, 512)
"""Rényi orders α at which the mixture is bounded."""
_LARGE = 500.0
"""Where exp overflows nearly, and a mixture is as good as its one part."""


@dataclass
class Distributed(Guarantee):
    """Integer noise, shared by the members of each masked sum.

    Attributes:
        accountant: `rdp`; the others know no integer noise.
        noise: `discrete_gaussian`, whose cost is the Gaussian's, or `skellam`, whose sums are Skellam to the bit.
        size: parameters that travel.
    """

    accountant: Literal["rdp"] = "rdp"
    noise: Literal["discrete_gaussian", "skellam"] = "discrete_gaussian"
    size: Annotated[int, Ge(1)] | None = None

    label: ClassVar[str] = "privacy=distributed"
    mechanism: ClassVar[str] = "distributed noise"
    protects: ClassVar[str] = (
        "each client, all it has, from whoever sees the models and from a server that follows the protocol"
    )

    def promised(self, claim: Claim) -> Claim:
        """The noise must be the stage's, and the collector must say how many shares are sure to be there.

        Raises:
            ContractError: it is not, or does not; or others' times decide who takes part.
        """
        claim.need_public_choice(self)
        if claim.private != self.mechanism:
            raise ContractError(
                claim.source("private"),
                name_of(self),
                "clients share no noise",
                "put its stages behind the clip: Pipeline(stages=[clip, *privacy.stages(clip.bounds)])",
            )
        if claim.honest is None or claim.members is None or self.size is None:
            raise ContractError(
                claim.source("honest", "cohort", "visibility"),
                name_of(self),
                "how many honest members a sum has at least, or elements, is not known",
                "use collector=masked with a sampler that plans a cohort (in Python: Distributed(size=...))",
            )
        if not claim.whole:
            raise ContractError(
                claim.source("visibility"),
                name_of(self),
                "the collector rounds each member's integers apart",
                "set collector.whole=true",
            )
        try:
            self._steps_of(claim, self.noise_multiplier or 1.0)
        except ValueError as error:
            raise ContractError(
                claim.source("cohort"),
                name_of(self),
                str(error),
                "make smaller groups (collector.groups)",
            ) from error
        return claim

    def release(self, claim: Claim, z: float) -> Release:
        """One round's sum, to the server."""
        return self._steps_of(claim, z).release()

    def stages(self, bounds: Callable[[], Mapping[str, float]]) -> Sequence[Stage]:
        """The noise, behind the clip."""
        return [IntegerNoise(self._steps, bounds, seed=self.seed, entropy=self._entropy)]

    def report(self) -> dict[str, Any] | None:
        """As every guarantee's, with the ε against those who see the models."""
        report = super().report()
        return report and {**report, "noise": self.noise, "epsilon_models": self.epsilon_models()}

    def epsilon_models(self) -> float:
        """ε against those who see every model, and neither sums nor cohorts."""
        claim, count = self._claim, len(self._accounts()[1].charges)
        if claim.sampling != "poisson" or claim.rate is None or not count:
            return self._epsilon
        release = self._steps_of(claim, self.z).release()
        found = self._epsilon
        for order, divergence in zip(_ORDERS, renyi(release, _ORDERS), strict=True):
            grown = (order - 1) * divergence
            mixed = grown if grown > _LARGE else log1p(claim.rate * expm1(grown))
            spent = count * mixed / (order - 1)
            # Canonne, Kamath & Steinke 2020, "The Discrete Gaussian for Differential Privacy", Proposition 12.
            tail = (log(self.resolved_delta) + log(order)) / (order - 1)
            found = min(found, max(0.0, spent + log1p(-1 / order) - tail))
        return found

    @property
    def adjacency(self) -> str:
        """`zero_out`, or that one vector is replaced by another: who takes part is the same."""
        return self._relation if self._relation == "replace_one" else "zero_out"

    def drowning(self, size: int) -> float:
        """Of a sum's mean, were only the sure shares there."""
        steps = self._steps()
        noise = sqrt(steps.shares * steps.variance * steps.dimension)
        return noise / (steps.members * steps.norm)

    def signal(self, size: int) -> str:
        """What is counted on, too."""
        steps = self._steps()
        return (
            f"{steps.shares} of {steps.members} members are sure to add their share, rounding adds "
            f"{steps.rounded / steps.norm - 1:.2g} to the sensitivity, {super().signal(size)}"
        )

    def _header(self) -> str:
        return f"{super()._header()}, {self.noise}"

    def _steps(self) -> Steps:
        return self._steps_of(self._claim, self.z)

    def _steps_of(self, claim: Claim, z: float) -> Steps:
        assert claim.honest is not None
        assert claim.members is not None
        assert self.size is not None
        relation: Relation = "replace_one" if claim.sampling == "fixed" else "add_or_remove_one"
        return _steps(
            self.noise, z, claim.honest, claim.members, self.size, claim.adaptive, relation
        )

    def _entropy(self, context: ClientContext) -> Entropy:
        if not self.reproducible_noise:
            return urandom
        return Seeded(self.seed, f"noise shares {context.client} {context.round}")


@lru_cache(maxsize=256)
def _steps(
    noise: Literal["discrete_gaussian", "skellam"],
    z: float,
    honest: int,
    members: int,
    size: int,
    adaptive: bool,
    relation: Relation,
) -> Steps:
    """Made once for the same numbers: asked for at each reply, and by each trial of a calibration."""
    dimensions = {DELTA: size} | ({CLIP_BIT: 1} if adaptive else {})
    return Steps(noise, z, min(honest, members), members, dimensions, relation)
