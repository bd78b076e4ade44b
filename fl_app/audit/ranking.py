"""How well scores tell members from others: area under the ROC curve, hits at few false alarms, and a bound on ε.

The area's interval is that of DeLong, DeLong and Clarke-Pearson (1988, "Comparing the Areas under Two or More
Correlated Receiver Operating Characteristic Curves"), by midranks (Sun and Xu 2014, "Fast Implementation of DeLong's
Algorithm"). Hits at a false positive rate of 1% and of 0.1% are what an attack is worth that must not be wrong (Carlini
et al. 2022, "Membership Inference Attacks From First Principles", §III). The bound on ε chooses its threshold on one
half of the scores and counts on the other (Jagielski et al. 2020): a threshold that was chosen on what it is counted on
would flatter itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

from fl_app.audit.bounds import rates_epsilon

Scores = NDArray[np.float64]

_THRESHOLDS = 200
"""Tried on the first half, at even quantiles."""


@dataclass(frozen=True)
class Ranking:
    """What one attack's scores came to.

    Attributes:
        members: how many of the examples were members.
        others: how many were not.
        auc: area under the ROC curve: 0.5 for a guess, 1 where every member scores higher than every other.
        auc_interval: of the area, at `confidence`.
        tpr_at_1: share of the members found with at most 1% of the others taken for members.
        tpr_at_01: likewise with at most 0.1%.
        epsilon_bound: lower bound on ε at `confidence`.
        confidence: of the interval and of the bound, each for itself.
    """

    members: int
    others: int
    auc: float
    auc_interval: tuple[float, float]
    tpr_at_1: float
    tpr_at_01: float
    epsilon_bound: float
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        return {
            "members": self.members,
            "others": self.others,
            "auc": round(self.auc, 6),
            "auc_interval": [round(end, 6) for end in self.auc_interval],
            "tpr_at_fpr_1_percent": round(self.tpr_at_1, 6),
            "tpr_at_fpr_0.1_percent": round(self.tpr_at_01, 6),
            "epsilon_lower_bound": round(self.epsilon_bound, 6),
            "confidence": self.confidence,
        }


def rank(
    members: Scores, others: Scores, *, delta: float, confidence: float, rng: np.random.Generator
) -> Ranking:
    """Judges scores; a higher one says member.

    Args:
        members: (m,) float64, at least 4.
        others: (n,) float64, at least 4.
        delta: of the claim that the bound on ε is for.
        confidence: in (0, 1).
        rng: cuts the scores into halves.

    Raises:
        ValueError: too few scores, or one that is NaN.
    """
    for name, scores in (("members", members), ("others", others)):
        if len(scores) < 4:
            raise ValueError(f"{len(scores)} {name}: an attack is judged on 4 of each at least")
        if np.isnan(scores).any():
            raise ValueError(f"a score of the {name} is not a number")
    area, deviation = auc(members, others)
    reach = float(norm.ppf((1 + confidence) / 2)) * deviation
    return Ranking(
        members=len(members),
        others=len(others),
        auc=area,
        auc_interval=(max(0.0, area - reach), min(1.0, area + reach)),
        tpr_at_1=hits_at(members, others, 0.01),
        tpr_at_01=hits_at(members, others, 0.001),
        epsilon_bound=threshold_epsilon(
            members, others, delta=delta, confidence=confidence, rng=rng
        ),
        confidence=confidence,
    )


def auc(members: Scores, others: Scores) -> tuple[float, float]:
    """Area under the ROC curve, ties counted half, and its standard deviation by DeLong's estimate.

    The estimate is 0 for an area of 0 or 1: a curve without a fault says nothing of how often it has one.
    """
    m, n = len(members), len(others)
    together = rankdata(np.concatenate([members, others]))
    above = (together[:m] - rankdata(members)) / n
    below = 1 - (together[m:] - rankdata(others)) / m
    variance = above.var(ddof=1) / m + below.var(ddof=1) / n
    return float(above.mean()), math.sqrt(variance)


def hits_at(members: Scores, others: Scores, rate: float) -> float:
    """Share of the members above the lowest threshold that at most ⌊rate·n⌋ of the n others exceed."""
    allowed = math.floor(rate * len(others))
    threshold = np.sort(others)[::-1][allowed]
    return float((members > threshold).mean())


def threshold_epsilon(
    members: Scores, others: Scores, *, delta: float, confidence: float, rng: np.random.Generator
) -> float:
    """A lower bound on ε, its threshold chosen on a random half and its counts taken from the other."""
    (chosen, counted), (against, counter) = _halves(members, rng), _halves(others, rng)
    both = np.concatenate([chosen, against])
    thresholds = np.unique(np.quantile(both, np.linspace(0, 1, _THRESHOLDS), method="lower"))
    promise = _bounds(chosen, against, thresholds, delta=delta, confidence=confidence)
    best = thresholds[[int(promise.argmax())]]
    return float(_bounds(counted, counter, best, delta=delta, confidence=confidence)[0])


def _halves(scores: Scores, rng: np.random.Generator) -> tuple[Scores, Scores]:
    shuffled = rng.permutation(scores)
    return shuffled[: len(scores) // 2], shuffled[len(scores) // 2 :]


def _bounds(
    members: Scores, others: Scores, thresholds: Scores, *, delta: float, confidence: float
) -> Scores:
    """The bound for each threshold by itself: members are those above it."""
    hits, alarms = (
        len(scores) - np.searchsorted(np.sort(scores), thresholds, side="right")
        for scores in (members, others)
    )
    found = rates_epsilon(
        hits, len(members), alarms, len(others), delta=delta, confidence=confidence
    )
    return np.asarray(found, np.float64)
