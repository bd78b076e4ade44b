"""Guessing canaries' coins from scores, with the bound on ε of Steinke, Nasr, Jagielski 2023, Theorem 5.2.

A positive score is guessed in, a negative one out, and only the r scores furthest from 0 are guessed at all: how many
guesses there are must not depend on the mechanism, which they are may. How many pay best is not known beforehand, so a
few numbers are tried, each at its share of the error (Bonferroni), and the best bound is kept: the bound as a whole
exceeds the ε of an (ε, δ)-DP mechanism with probability 1 − confidence at most.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_app.audit.bounds import one_run_epsilon

_SHARES = (1, 2, 4, 8)
"""All canaries are guessed, or one in so many."""
_FEWEST = 4
"""Guesses: at 95%, fewer right ones could not refute ε = 0."""


@dataclass(frozen=True)
class Guessed:
    """What the best number of guesses came to.

    Attributes:
        canaries: m.
        guesses: r.
        correct: v.
        epsilon_bound: lower bound on ε at `confidence`, the choice of r paid for.
        most: the bound that this audit would give if every guess were right: it can't tell an ε beyond.
        delta: of the claim.
        confidence: of the bound.
    """

    canaries: int
    guesses: int
    correct: int
    epsilon_bound: float
    most: float
    delta: float
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        return {
            "canaries": self.canaries,
            "guesses": self.guesses,
            "correct": self.correct,
            "epsilon_lower_bound": round(self.epsilon_bound, 6),
            "largest_possible_bound": round(self.most, 6),
            "delta": self.delta,
            "confidence": self.confidence,
        }


def toss(count: int, entropy: Callable[[int], bytes] = os.urandom) -> tuple[bool, ...]:
    """Independent fair coins, of the operating system's entropy: the bound's proof rests on them."""
    return tuple(bool(byte & 1) for byte in entropy(count))


def guess(
    scores: NDArray[np.float64], coins: Sequence[bool], *, delta: float, confidence: float
) -> Guessed:
    """The bound that scores give: above 0 they say in, the further the surer.

    Args:
        scores: (m,) float64, made of what the mechanism released, without knowledge of the coins.
        coins: who was in, m of them.
        delta: of the claim.
        confidence: in (0, 1).

    Raises:
        ValueError: scores and coins differ in number, a score is NaN, or there are fewer than 4.
    """
    m = len(coins)
    if scores.shape != (m,) or m < _FEWEST or np.isnan(scores).any():
        raise ValueError(f"{m} coins need as many scores, {_FEWEST} or more, none of them NaN")
    level = 1 - (1 - confidence) / len(_guesses(m))

    def bound(guesses: int, correct: int) -> float:
        return one_run_epsilon(m, guesses, correct, delta=delta, confidence=level)

    # Ties go to the canary that comes first, which its coin knows nothing of.
    surest = np.argsort(-np.abs(scores), kind="stable")
    right = np.cumsum(((scores > 0) == np.asarray(coins, bool))[surest])
    found = [(bound(r, int(right[r - 1])), r, int(right[r - 1])) for r in _guesses(m)]
    best, guesses, correct = max(found, key=lambda item: item[0])
    most = max(bound(r, r) for r in _guesses(m))
    return Guessed(m, guesses, correct, best, most, delta, confidence)


def _guesses(canaries: int) -> list[int]:
    return [canaries // share for share in _SHARES if canaries // share >= _FEWEST]
