"""What many releases come to: the choice of accountants, and the noise that keeps to a budget.

An accountant is told of releases (`events.py`) and says for which (ε, δ) all of them together are differentially
private (Dwork, Rothblum & Vadhan 2010, "Boosting and Differential Privacy", §III), however each was chosen after those
before it. There are three:

* `pld`: privacy loss distributions, composed exactly up to rounding upwards (`pld.py`); the default.
* `rdp`: Rényi divergences, an upper bound that also knows integer noise and sampling without replacement (`rdp.py`).
* `prv`: privacy random variables as Opacus composes them (`prv.py`).

Each gives an upper bound. A release that an accountant has no theorem for is refused, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, get_args

from strategies.privacy.composition import Accountant
from strategies.privacy.events import Relation, Release

AccountantName = Literal["pld", "rdp", "prv"]

LEAST_NOISE, MOST_NOISE = 1e-2, 1e6
"""Between these `calibrate` looks for a noise multiplier."""


def make_accountant(name: AccountantName, relation: Relation = "add_or_remove_one") -> Accountant:
    """A new accountant with nothing composed.

    Raises:
        ValueError: the name or the relation is not known.
    """
    if name == "pld":
        from strategies.privacy.pld import PLD

        return PLD(relation)
    if name == "rdp":
        from strategies.privacy.rdp import RDP

        return RDP(relation)
    if name == "prv":
        from strategies.privacy.prv import PRV

        return PRV(relation)
    raise ValueError(f"accountant = {name!r}: choose one of {', '.join(get_args(AccountantName))}")


def calibrate(
    accountant_name: AccountantName,
    target_epsilon: float,
    delta: float,
    plan: Callable[[float], Iterable[tuple[Release, int]]],
    *,
    tolerance: float = 0.01,
) -> float:
    """The least noise multiplier with which a plan keeps to a budget.

    Args:
        accountant_name: by whose account.
        target_epsilon: above 0.
        delta: in (0, 1).
        plan: the releases that a noise multiplier leads to, each with its count; more noise must not cost more.
        tolerance: how much of the budget may be left over, as a share of it.

    Returns:
        z in [1e-2, 1e6] with ε(plan(z)) ≤ target, and ≥ (1 − tolerance)·target unless z is 1e-2 or ε leaps there.

    Raises:
        ValueError: even z = 1e6 costs more, or the accountant can't account for the plan.
    """
    if not 0 < target_epsilon < math.inf or not 0 < tolerance < 1:
        raise ValueError(
            f"target_epsilon = {target_epsilon!r} must be above 0, tolerance = {tolerance!r} between 0 and 1"
        )

    # Room for what rounding adds where the same releases are composed one by one.
    target_epsilon *= 1 - 1e-9

    def cost(log_noise: float) -> float:
        return _cost(accountant_name, plan(math.exp(log_noise)), delta)

    least, most = math.log(LEAST_NOISE), math.log(MOST_NOISE)
    high, spent = 0.0, cost(0.0)
    low = high
    while spent > target_epsilon:
        if high >= most:
            raise ValueError(
                f"no noise multiplier up to {MOST_NOISE:g} keeps to epsilon = {target_epsilon:g} at delta = {delta:g}:"
                f" the plan costs {spent:.4g} there by {accountant_name!r}"
            )
        low, high = high, min(most, high + math.log(2))
        spent = cost(high)
    while low == high and high > least:  # z = 1 was enough: down to where it is not
        low = max(least, high - math.log(2))
        if (cheaper := cost(low)) <= target_epsilon:
            high, low, spent = low, low, cheaper
    while spent < (1 - tolerance) * target_epsilon and high - low > 1e-6:
        middle = (low + high) / 2
        if (between := cost(middle)) <= target_epsilon:
            high, spent = middle, between
        else:
            low = middle
    return math.exp(high)


def _cost(name: AccountantName, releases: Iterable[tuple[Release, int]], delta: float) -> float:
    accountant = make_accountant(name, "add_or_remove_one")
    for number, (release, count) in enumerate(releases):
        if number == 0:
            accountant = make_accountant(name, release.relation)
        accountant.step(release, count)
    return accountant.epsilon(delta)
