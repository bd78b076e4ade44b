"""From what an attack got right to a lower bound on ε. Pure functions of counts: no model, no data, no randomness.

Two experiments, each with its own argument:

* **Two rates.** Under (ε, δ)-DP an attack with false positive rate FPR has TPR ≤ e^ε·FPR + δ, and the same for the
  rates of what it denies (Kairouz, Oh, Viswanath 2015, "The Composition Theorem for Differential Privacy", Theorem
  2.1). Rates that Clopper and Pearson (1934) bound from counts thus bound ε from below (Jagielski, Ullman, Oprea 2020,
  "Auditing Differentially Private Machine Learning", §3).
* **One run.** m canaries, each in or out by its own fair coin; r coins are guessed and v guesses are right. If the
  mechanism is (ε, δ)-DP, at least v are right with at most the probability `one_run_p_value` (Steinke, Nasr, Jagielski
  2023, "Privacy Auditing with One (1) Training Run", Theorem 5.2), whatever the canaries do to one another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binom

Counts = int | NDArray[np.int64]
Bounds = float | NDArray[np.float64]

_HIGHEST = 64.0
"""No bound beyond: e⁻⁶⁴ is less than any count here could ever tell from 0."""


def lower_rate(successes: Counts, trials: int, error: float) -> Bounds:
    """Clopper and Pearson's one-sided lower bound: it exceeds the true rate with probability `error` at most.

    Args:
        successes: 0 to `trials`, a number or an array.
        trials: independent, at least 1.
        error: in (0, 1).

    Raises:
        ValueError: no trials, successes outside 0 … trials, or an error outside (0, 1).
    """
    counts = _counted(successes, trials, error)
    found = np.where(counts > 0, beta.ppf(error, np.maximum(counts, 1), trials - counts + 1), 0.0)
    return found if isinstance(successes, np.ndarray) else float(found)


def upper_rate(successes: Counts, trials: int, error: float) -> Bounds:
    """The one-sided upper bound, as `lower_rate`: it falls short of the true rate with probability `error` at most."""
    counts = _counted(successes, trials, error)
    found = 1.0 - np.asarray(lower_rate(trials - counts, trials, error))
    return found if isinstance(successes, np.ndarray) else float(found)


def _counted(successes: Counts, trials: int, error: float) -> NDArray[np.int64]:
    counts = np.asarray(successes, np.int64)
    if trials < 1 or (counts.size and not 0 <= counts.min() <= counts.max() <= trials):
        raise ValueError(
            f"{successes} successes of {trials} trials: must be 0 to trials, of 1 or more"
        )
    if not 0 < error < 1:
        raise ValueError(f"error={error}: must be between 0 and 1")
    return counts


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The two-sided interval of a rate: half of 1 − confidence may lie on either side.

    Raises:
        ValueError: as `lower_rate`.
    """
    error = (1 - confidence) / 2
    return float(lower_rate(successes, trials, error)), float(upper_rate(successes, trials, error))


def rates_epsilon(
    hits: Counts,
    members: int,
    false_alarms: Counts,
    others: int,
    *,
    delta: float,
    confidence: float,
) -> Bounds:
    """A lower bound on ε from one attack's counts, right with probability `confidence`.

    Both rates are bounded with half of the error each; what follows for the attack's denials is the same event.

    Args:
        hits: members taken for members; an array for several attacks, each bounded by itself.
        members: how many were tried, independently.
        false_alarms: others taken for members, of the same shape.
        others: how many were tried, independently.
        delta: of the claim.
        confidence: in (0, 1).

    Raises:
        ValueError: as `lower_rate`, or a delta outside [0, 1).
    """
    _check_delta(delta)
    error = (1 - confidence) / 2
    true_rate = np.asarray(lower_rate(hits, members, error))
    false_rate = np.asarray(upper_rate(false_alarms, others, error))
    ratios = np.maximum(
        (true_rate - delta) / false_rate,
        (1 - false_rate - delta) / np.maximum(1 - true_rate, math.exp(-_HIGHEST)),
    )
    found = np.log(np.maximum(ratios, 1.0))
    return found if isinstance(hits, np.ndarray) else float(found)


def one_run_p_value(
    canaries: int, guesses: int, correct: int, epsilon: float, delta: float
) -> float:
    """The most likely that an (ε, δ)-DP mechanism lets at least `correct` of the guesses be right.

    β + 2·m·δ·α, where W is a binomial number of `guesses` with probability e^ε / (1 + e^ε), β = P(W ≥ v) and
    α = max over i = 1 … v of P(v > W ≥ v − i) / i.

    Args:
        canaries: m, each in or out by an independent fair coin.
        guesses: r, the others are abstentions; which canaries are guessed may depend on the mechanism's output, how
            many may not.
        correct: v of them.
        epsilon: of the hypothesis, at least 0.
        delta: of the hypothesis, in [0, 1).

    Raises:
        ValueError: not 0 ≤ correct ≤ guesses ≤ canaries, or an ε or a δ out of range.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            f"{correct} right of {guesses} guesses at {canaries} canaries: must not grow"
        )
    if not epsilon >= 0:
        raise ValueError(f"epsilon={epsilon}: must be at least 0")
    _check_delta(delta)
    rate = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, rate))
    if delta and correct:
        below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, rate))
        tail += 2 * canaries * delta * float((below / np.arange(1, correct + 1)).max())
    return min(tail, 1.0)


@lru_cache(maxsize=4096)  # forty binomial sums each, and an audit asks for the same ones again
def one_run_epsilon(
    canaries: int, guesses: int, correct: int, *, delta: float, confidence: float = 0.95
) -> float:
    """The largest ε that so many right guesses refute at this confidence; 0 where they refute none.

    A mechanism that is (ε, δ)-DP is given a bound above its ε with probability 1 − confidence at most.

    Args:
        canaries: as in `one_run_p_value`, and the next two.
        guesses: r.
        correct: v.
        delta: of the claim.
        confidence: in (0, 1).

    Raises:
        ValueError: as `one_run_p_value`, or a confidence out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must be between 0 and 1")
    error = 1 - confidence
    return _last(lambda eps: one_run_p_value(canaries, guesses, correct, eps, delta) < error)


def _last(refuted: Callable[[float], bool]) -> float:
    """The end of the range from 0 in which every ε is refuted, from below, to 2⁻⁴⁰ of `_HIGHEST`."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < _HIGHEST and refuted(high):
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _check_delta(delta: float) -> None:
    if not 0 <= delta < 1:
        raise ValueError(f"delta={delta}: must be at least 0 and less than 1")
