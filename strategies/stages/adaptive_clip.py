"""Clipping at a quantile of the clients' norms, which is learnt privately as the run goes.

Andrew, Thakkar, McMahan & Ramaswamy 2021, "Differentially Private Learning with Adaptive Clipping", Algorithm 1.

Each client sends, beside its clipped update, one bit b: whether its norm lay within the bound C. From the mean b̄ of
the bits, noised like all else, the server moves C towards the quantile γ, geometrically:

    C ← C · exp(−η (b̄ − γ)).

The bit is a section of the update (`clip_bit`), sent as b − 1/2 so that one client moves the sum by 1/2 at most; the
mechanism pays for it. With bits of the whole cohort missing (b̄ counts those as 1/2), C drifts at most by exp(η/2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import exp
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Gt, Lt

from strategies.contract import Claim
from strategies.protocols import ClientContext, Settings
from strategies.ranges import Ranged
from strategies.stages.clip import agreed_norm, clip, l2_norm
from strategies.state import State
from strategies.update import CLIP_BIT, DELTA, Layout, Section, Update
from strategies.wire import Refused

BIT = 0.5
"""The largest magnitude of a bit, and so the L2 bound of its section."""

_LAYOUT = Layout((CLIP_BIT,), ((),))
_LEAST, _MOST = 1e-10, 1e10
"""C stays within these, whatever the bits say."""


@dataclass
class AdaptiveClip(Ranged):
    """Scales the parameters' change to an L2 norm of at most C, and follows a quantile of the norms with C.

    Attributes:
        norm: C of the first round, in the units of the parameters.
        quantile: γ, the share of updates that C is to leave as they are.
        lr: η, how fast C moves: by the factor exp(η (γ − b̄)) a round.
        present: C of the round that comes.
    """

    norm: Annotated[float, Gt(0)] = 0.1
    quantile: Annotated[float, Gt(0), Lt(1)] = 0.5
    lr: Annotated[float, Gt(0)] = 0.2
    present: float = field(init=False)

    name = "clip"
    label = "clip=adaptive"
    layouts: ClassVar[Mapping[str, Layout]] = {CLIP_BIT: _LAYOUT}
    """Sections that the stage makes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.present = self.norm

    def check(self, claim: Claim) -> Claim:
        """Bounds the parameters' change and the bit; the bound is the clients' to move."""
        claim.need_client_half(self)
        claim.need_rounds(
            self,
            why="clients clip to bounds of several versions at once, and their bits speak of different ones",
            instead="use clip=fixed, or scheduler=synchronous",
        )
        return claim.given(
            self,
            sections=claim.sections | {CLIP_BIT},
            bounds={**claim.bounds, **self.bounds()},
            adaptive=True,
        )

    def bounds(self) -> Mapping[str, float]:
        """L2 bounds of the round that comes, by section."""
        return {DELTA: self.present, CLIP_BIT: BIT}

    def configure(self) -> Settings:
        """The present bound."""
        return {"norm": self.present}

    def encode(self, update: Update, context: ClientContext) -> Update:
        """Client half: clips to the bound that the server sent, and says whether that was needed."""
        norm = agreed_norm(context)
        within = l2_norm(update.delta.vector) <= norm
        bit = np.full(1, BIT if within else -BIT, np.float32)
        return clip(update, norm, (DELTA,)).with_section(CLIP_BIT, Section(bit, _LAYOUT, BIT))

    def decode(self, update: Update) -> Update:
        """Server half: the bounds hold for a single client whatever it did; nothing of a sum is looked at.

        Raises:
            Refused: `malformed`, for a bit that is none.
        """
        if len(update.members) != 1:
            return update
        section = update.sections[CLIP_BIT]
        if abs(float(section.vector[0])) != BIT:
            raise Refused("malformed", f"a clip bit is ±{BIT:g}, this one {section.vector[0]:g}")
        clipped = clip(update, self.present, (DELTA,))
        return clipped.with_section(CLIP_BIT, replace(section, bound=BIT))

    def learn(self, aggregate: Update) -> None:
        """Moves C after a round, by the mean of the bits as it was released."""
        share = float(aggregate.sections[CLIP_BIT].vector[0]) + BIT
        factor = exp(-self.lr * (min(max(share, 0.0), 1.0) - self.quantile))
        self.present = min(max(self.present * factor, _LEAST), _MOST)

    def state_dict(self) -> State:
        """The present bound: released already, so that it may be written down."""
        return {"present": self.present}

    def load_state_dict(self, state: State) -> None:
        """Takes up the bound of an earlier run; raises `ValueError` where there is none."""
        present = state.get("present")
        if not isinstance(present, float) or not _LEAST <= present <= _MOST:
            raise ValueError(
                f"the state's 'present' should be the clip's bound, a positive number, not {present!r}"
            )
        self.present = present
