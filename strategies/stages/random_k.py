"""A random set of coordinates that all clients of one model version share: a shorter vector, and still a vector.

Stich, Cordonnier & Jaggi 2018, "Sparsified SGD with Memory", Definition 2.1 (rand_k), with the choice made of a seed
that both ends have (Konečný, McMahan, Yu et al. 2016, "Federated Learning: Strategies for Improving Communication
Efficiency", §2.1, random masks). No coordinates travel, and vectors of one version add up element by element: they may
be summed under masks or keys, clipped, made whole and noised like any other.

With error feedback what was left out comes back in a later round, and nothing is scaled. Without it the mean of a sent
vector is k/d of the true one, or the true one where `unbiased` scales it by d/k, at d/k times the variance.

The seed is no secret: whoever knows it knows which coordinates a round asks for. No ε rests on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import numpy as np
from annotated_types import Gt, Le

from strategies.compression.selection import Indices, kept, support
from strategies.contract import Claim, Visibility
from strategies.protocols import ClientContext, Settings, Stage
from strategies.ranges import Ranged
from strategies.stages.memory import fed_back, remember
from strategies.stages.packing import without_bound
from strategies.update import DELTA, Layout, Section, Update


@dataclass
class RandomK(Ranged):
    """Leaves ⌈ratio · d⌉ elements of the parameters' change, as a vector of that length.

    Attributes:
        ratio: the share that is left.
        error_feedback: whether clients remember what was left out.
        unbiased: whether what is left is scaled by d/k; without error feedback only.
        seed: the run's.

    Raises:
        ValueError: `unbiased` beside error feedback, which would send d/k times what it remembers as sent.
    """

    ratio: Annotated[float, Gt(0), Le(1)] = 0.01
    error_feedback: bool = True
    unbiased: bool = False
    seed: int = 0
    _dense: Layout | None = field(default=None, init=False, repr=False, compare=False)

    name = "random_k"
    label = "compression=random_k"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unbiased and self.error_feedback:
            raise ValueError(
                "unbiased: what error feedback remembers must not be scaled; set error_feedback=false"
            )

    @property
    def remembers(self) -> bool:
        """Whether clients keep something on their disk."""
        return self.error_feedback

    def stages(self) -> tuple[Sequence[Stage], Sequence[Stage]]:
        """This one, before the clip."""
        return [self], []

    def check(self, claim: Claim) -> Claim:
        """Coordinates are shared within a version: in a sum always, and in all of a round."""
        claim.need_client_half(self)
        mixed = claim.staleness is not None and (
            claim.visibility is Visibility.EACH or claim.sessions > 1
        )
        if mixed:
            claim = claim.given(self, support="per_version")
        return without_bound(claim, self, DELTA)

    def configure(self) -> Settings:
        """Nothing that the configuration does not say."""
        return {}

    def reshaped(self, layouts: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """See `Shaping.reshaped`; how the section was is kept for `decode`."""
        self._dense = layouts[DELTA]
        return {**layouts, DELTA: _short(kept(self.ratio, self._dense.size))}

    def encode(self, update: Update, context: ClientContext) -> Update:
        """Client half: (k,) float32."""
        vector = update.delta.vector
        target = fed_back(vector, context)
        chosen = self._chosen(len(vector), update.version)
        short = target[chosen]
        if self.error_feedback:
            remember(target, chosen, short, context)
        if self.unbiased and len(short):
            with np.errstate(over="ignore"):
                short *= np.float32(len(target) / len(short))
        return update.with_section(DELTA, Section(short, _short(len(short))))

    def decode(self, update: Update) -> Update:
        """Server half: puts the elements of a client, or of a sum, in their places."""
        assert self._dense is not None  # without a job nothing comes back
        vector = np.zeros(self._dense.size, np.float32)
        vector[self._chosen(len(vector), update.version)] = update.delta.vector
        section = replace(update.delta, vector=vector, layout=self._dense)
        return update.with_section(DELTA, section)

    def _chosen(self, size: int, version: int) -> Indices:
        return support(self.seed, version, size, kept(self.ratio, size))


def _short(count: int) -> Layout:
    return Layout(("kept",), ((count,),))
