"""The server's door: which updates may touch the model.

Looks at one client's update at a time and at nothing released, so that it may stand before any mechanism of
differential privacy. Refusals are counted by reason and strike the logical client; they never raise past the round.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from math import isfinite
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le

from strategies.contract import Claim, ContractError, name_of
from strategies.ranges import Ranged
from strategies.state import State, integer_in, mapping_in
from strategies.update import MAXIMUM_SECTIONS, Update, Vector
from strategies.wire import PAUSED, Refused

log = logging.getLogger(__name__)

COUNTER_LIMIT = 2.0**24
"""The largest increase of an integer buffer in one round: further than float32 counts."""

FAILURES = frozenset({"client_error", "timeout", PAUSED})
"""Reasons that are a client's misfortune: nothing came that could be refused."""

STALE = "stale"
"""The reason of an update that is too old: its client is slow, and no liar for it."""

_BLAMELESS = FAILURES | {"duplicate", "num_examples", STALE}


def is_wrong(refusal: Refused) -> bool:
    """Whether a client's update came and was wrong, so that it is one of the f that a robust rule bears.

    A second reply is not: the first may have been taken. Nor is a client without examples.
    """
    return refusal.reason not in _BLAMELESS


@dataclass
class Admission(Ranged):
    """Limits on one update, and what happens when too few pass.

    Attributes:
        max_examples: the most examples that a client may declare.
        max_value: the largest magnitude of any one element. Far beyond any trained update, and far enough below
            float32's limit that no weighted mean of admitted updates can overflow.
        quorum: good updates without which a round is void.
        on_shortfall: what follows a round below quorum: `repeat` draws a new cohort, `skip` keeps the model.
        max_attempts: how often one round is tried before it is skipped after all.
    """

    max_examples: Annotated[float, Ge(1), Le(1e12)] = 1e6
    max_value: Annotated[float, Gt(0), Le(1e30)] = 1e10
    quorum: Annotated[int, Ge(1)] = 1
    on_shortfall: Literal["repeat", "skip"] = "repeat"
    max_attempts: Annotated[int, Ge(1)] = 3
    refusals: Counter[str] = field(default_factory=Counter, init=False)
    strikes: Counter[int] = field(default_factory=Counter, init=False)

    label = "admission"

    def check(self, claim: Claim) -> Claim:
        """Refuses a quorum that no cohort can reach, and says what it is."""
        if claim.cohort is not None and self.quorum > claim.cohort:
            raise ContractError(
                claim.source("cohort"),
                name_of(self),
                f"a quorum of {self.quorum} can never be met by a cohort of {claim.cohort}",
                "lower admission.quorum, or ask more clients a round",
            )
        return claim.given(self, quorum=self.quorum)

    def admit(self, update: Update) -> None:
        """Passes an update or refuses it.

        Raises:
            Refused: `num_examples` (not in [1, max_examples] a member) or `not_finite` or `too_large`, by element.
        """
        most = self.max_examples * len(update.members)
        if not 1 <= update.weight <= most:  # NaN fails every comparison
            raise Refused("num_examples", f"{update.weight:g} is not in [1, {most:g}]")
        for name, section in update.sections.items():
            if not section.vector.size:
                continue
            limit = COUNTER_LIMIT if name in MAXIMUM_SECTIONS else self.max_value
            if _surely_within(section.vector, limit):
                continue
            # Two passes without a temporary: a NaN makes both extremes NaN.
            low, high = float(section.vector.min()), float(section.vector.max())
            if not (isfinite(low) and isfinite(high)):
                raise Refused("not_finite", f"section {name!r} holds NaN or an infinity")
            if max(-low, high) > limit:
                raise Refused(
                    "too_large", f"section {name!r} reaches {max(-low, high):.3g}, past {limit:.3g}"
                )

    def record(self, client: int, refusal: Refused) -> None:
        """Counts a refusal and strikes the client, unless it is only slow or waits for power."""
        self.refusals[refusal.reason] += 1
        if refusal.reason == STALE:
            log.info("client %d is slow: %s", client, refusal.detail)
            return
        if refusal.reason == PAUSED:
            log.info("client %d is paused", client)
            return
        self.strikes[client] += 1
        done = "failed" if refusal.reason in FAILURES else f"refused ({refusal.reason})"
        log.warning("client %d %s: %s", client, done, shown(refusal.detail))

    def state_dict(self) -> State:
        """Counts of refusals and strikes."""
        return {
            "refusals": dict(self.refusals),
            "strikes": {str(k): v for k, v in self.strikes.items()},
        }

    def load_state_dict(self, state: State) -> None:
        """Takes up the counts of an earlier run."""
        refusals, strikes = mapping_in(state, "refusals"), mapping_in(state, "strikes")
        self.refusals = Counter({reason: integer_in(refusals, reason) for reason in refusals})
        self.strikes = Counter({int(client): integer_in(strikes, client) for client in strikes})


def _surely_within(vector: Vector, limit: float) -> bool:
    """Whether a vector is finite and its norm, and so every element, well within a limit: one fast pass for most.

    float32's rounding of a sum of squares is far from the factor that is left to it.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        squares = float(vector @ vector)
    return limit > 1e-10 and 4 * squares <= limit**2  # squares of 1e-23 and less vanish


def shown(text: str, limit: int = 200) -> str:
    """A peer's text as it may stand in a log: one line, printable, and not long."""
    line = "".join(sign if sign.isprintable() else " " for sign in text[: 2 * limit])
    return line if len(line) <= limit else f"{line[:limit]}…"
