"""What an attack came to: one figure with its interval, beside what a guess gets. No figure is made of several others.

Tokens of one text are no independent trials, so a share of tokens has an interval of its texts: Korn and Graubard 1998,
"Confidence Intervals For Proportions With Small Expected Number of Positive Counts Estimated From Survey Data", eq. 1:
Clopper and Pearson's, for as many trials as the spread between texts leaves of them. The area under an ROC curve has
that of Newcombe 2006, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic. Part 2",
method 5, which does not shrink to a point where an attack is always right.

Numbers only: this file knows no model and no attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.stats import beta, norm, t

from fl_app.audit.ranking import Scores, auc

Interval = tuple[float, float]

_NUDGE = 1e-12


@dataclass(frozen=True)
class Score:
    """One figure of one attack.

    Attributes:
        attack: what was tried.
        measure: what is counted: `accuracy`, `precision`, `recall` or `AUC`.
        cut: blocks below the cut that it was tried at; None where it is tried elsewhere.
        setting: what protects, or what is varied.
        value: within 0 … 1.
        interval: of the value, at the audit's confidence.
        baseline: what a guess gets that looks at nothing but how frequent each answer is.
        n: how many were tried: tokens, examples, updates.
        units: in how many independent units they came: texts, batches, rounds.
        meaning: who can do this, and what a high value says.
    """

    attack: str
    measure: str
    cut: int | None
    setting: str
    value: float
    interval: Interval
    baseline: float
    n: int
    units: int
    meaning: str

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        return {
            "attack": self.attack,
            "measure": self.measure,
            "cut": self.cut,
            "setting": self.setting,
            "value": round(self.value, 6),
            "interval": [round(end, 6) for end in self.interval],
            "baseline": round(self.baseline, 6),
            "n": self.n,
            "units": self.units,
            "meaning": self.meaning,
        }


def share(hits: ArrayLike, trials: ArrayLike, confidence: float) -> tuple[float, Interval]:
    """A share of trials that came in units, and its interval.

    Args:
        hits: (k,) of each unit.
        trials: (k,) of each unit; at least one in all.
        confidence: in (0, 1).

    Returns:
        All hits over all trials; 0 to 1 where there is one unit and so no spread between them.

    Raises:
        ValueError: there are no trials, or more hits than trials.
    """
    won, tried = np.asarray(hits, np.float64), np.asarray(trials, np.float64)
    total = float(tried.sum())
    if total < 1 or won.shape != tried.shape or (won < 0).any() or (won > tried).any():
        raise ValueError(f"hits {won.tolist()} of {tried.tolist()}: 0 to as many as were tried")
    won, tried = won[tried > 0], tried[tried > 0]
    units, rate = len(tried), float(won.sum() / total)
    if units < 2:
        return rate, (0.0, 1.0)
    variance = units / (units - 1) * float(((won - rate * tried) ** 2).sum()) / total**2
    effective = float(units)  # no fault, or no hit, says nothing of the spread: each unit is one
    if 0 < rate < 1:
        effective = total if variance == 0 else min(total, rate * (1 - rate) / variance)
        tail = (1 + confidence) / 2
        widened = (t.ppf(tail, max(total - 1, 1)) / t.ppf(tail, units - 1)) ** 2
        effective = min(total, effective * float(widened))
    return rate, _clopper_pearson(rate * effective, effective, confidence)


def _clopper_pearson(hits: float, trials: float, confidence: float) -> Interval:
    error = (1 - confidence) / 2
    low = beta.ppf(error, hits, trials - hits + 1) if hits > 0 else 0.0
    high = beta.ppf(1 - error, hits + 1, trials - hits) if hits < trials else 1.0
    return float(low), float(high)


def area(positives: Scores, others: Scores, confidence: float) -> tuple[float, Interval]:
    """Area under the ROC curve, ties counted half, and its interval.

    Args:
        positives: (m,) float64, at least 2.
        others: (n,) float64, at least 2.
        confidence: in (0, 1).

    Raises:
        ValueError: too few scores, or one that is not finite.
    """
    m, n = len(positives), len(others)
    if min(m, n) < 2 or not (np.isfinite(positives).all() and np.isfinite(others).all()):
        raise ValueError(f"{m} and {n} scores: at least 2 of each, all finite")
    found, z, even = auc(positives, others)[0], norm.ppf((1 + confidence) / 2), (m + n) / 2 - 1

    def deviation(theta: float) -> float:
        spread = 1 + even * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return float(np.sqrt(theta * (1 - theta) * spread / (m * n)))

    def end(side: int, edge: float) -> float:
        if found == edge:
            return edge
        near = found + side * _NUDGE  # at 0 and at 1 the value itself solves the equation, too
        return float(brentq(lambda x: side * (x - found) - z * deviation(x), edge, near))

    return found, (end(-1, 0.0), end(1, 1.0))


def most_frequent(answers: Sequence[int] | ArrayLike) -> tuple[int, float]:
    """The answer that is given most often, the smallest of several, and its share.

    Raises:
        ValueError: there are no answers.
    """
    values, counts = np.unique(np.asarray(answers), return_counts=True)
    if not len(values):
        raise ValueError("there are no answers to count")
    best = int(counts.argmax())
    return int(values[best]), float(counts[best] / counts.sum())
