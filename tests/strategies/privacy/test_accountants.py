"""Accountants agree with closed forms, with dp_accounting and with each other, and are never below the truth."""

import math
import time

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
from dp_accounting.pld import privacy_loss_distribution as reference
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from strategies.privacy.accountants import AccountantName, calibrate, make_accountant
from strategies.privacy.events import (
    GaussianRelease,
    LatticeRelease,
    release_from_data,
    release_to_data,
)
from strategies.privacy.lattice import renyi
from strategies.privacy.losses import losses
from strategies.privacy.pld import gaussian_delta, gaussian_epsilon
from strategies.privacy.sums import Sum

SLOW = pytest.mark.slow
NAMES: list[AccountantName] = ["pld", "rdp", "prv"]
LATTICE = LatticeRelease("skellam", 100.0, 10, 20.0, 60.0, 16, 0.1, "poisson")


def poisson(noise: float, rate: float) -> GaussianRelease:
    return GaussianRelease(noise, rate, "poisson")


def spent(name: AccountantName, delta: float, *releases: tuple[GaussianRelease, int]) -> float:
    accountant = make_accountant(name, releases[0][0].relation)
    for release, count in releases:
        accountant.step(release, count)
    return accountant.epsilon(delta)


def referred(delta: float, step: float, *parts: tuple[float, float, int]) -> float:
    """dp_accounting's ε of (noise, rate, count)."""
    whole = reference.identity(value_discretization_interval=step)
    for noise, rate, count in parts:
        one = reference.from_gaussian_mechanism(
            noise, sampling_prob=rate, value_discretization_interval=step
        )
        whole = whole.compose(one.self_compose(count))
    return float(whole.get_epsilon_for_delta(delta))


# ---- known answers ----


@pytest.mark.parametrize(
    ("noise", "rate", "count", "delta", "step"),
    [
        (1.0, 0.01, 1000, 1e-5, 1e-4),
        pytest.param(1.0, 0.01, 1, 1e-6, 1e-4, marks=SLOW),
        pytest.param(1.0, 0.01, 10_000, 1e-9, 1e-3, marks=SLOW),
        (0.5, 0.1, 10, 1e-7, 1e-3),
        pytest.param(0.5, 0.1, 1000, 1e-5, 1e-3, marks=SLOW),
        (5.0, 0.001, 1000, 1e-5, 2e-6),
        (0.3, 0.01, 100, 1e-5, 1e-3),
        pytest.param(10.0, 0.01, 1000, 1e-6, 1e-5, marks=SLOW),
        (2.0, 0.2, 1, 1e-10, 1e-4),
        pytest.param(2.0, 0.2, 5000, 1e-6, 1e-3, marks=SLOW),
        (1.0, 0.5, 20, 1e-8, 1e-3),
        pytest.param(1.0, 0.9, 100, 1e-5, 1e-3, marks=SLOW),
        (0.1, 0.01, 20, 1e-5, 1e-2),
        pytest.param(1.0, 1e-4, 1000, 1e-5, 1e-5, marks=SLOW),
    ],
)
def test_loss_distributions_agree_with_dp_accounting_to_a_per_cent(
    noise: float, rate: float, count: int, delta: float, step: float
) -> None:
    found = spent("pld", delta, (poisson(noise, rate), count))
    assert found == pytest.approx(referred(delta, step, (noise, rate, count)), rel=0.01)


def test_mixtures_agree_with_dp_accounting() -> None:
    found = spent(
        "pld",
        1e-5,
        (poisson(1.0, 0.01), 500),
        (poisson(0.8, 0.05), 20),
        (GaussianRelease(8.0), 3),
        (GaussianRelease(20.0), 4),
    )
    mu = math.sqrt(3 / 8.0**2 + 4 / 20.0**2)
    expected = referred(1e-5, 1e-3, (1.0, 0.01, 500), (0.8, 0.05, 20), (1 / mu, 1.0, 1))
    assert found == pytest.approx(expected, rel=0.01)


def test_the_textbook_run_costs_what_it_is_known_to_cost() -> None:
    run = (poisson(1.0, 0.01), 1000)
    assert spent("pld", 1e-5, run) == pytest.approx(1.828, rel=0.01)
    assert spent("rdp", 1e-5, run) == pytest.approx(2.101, rel=0.001)
    assert 1.82 < spent("prv", 1e-5, run) < 1.85
    plain = (GaussianRelease(1.0), 1000)
    assert spent("pld", 1e-5, plain) == pytest.approx(633.93, abs=0.01)
    assert spent("rdp", 1e-5, plain) == pytest.approx(654.86, abs=0.01)
    assert spent("prv", 1e-5, plain) == spent("pld", 1e-5, plain)


def test_a_cohort_of_fixed_size_is_amplified_by_renyi_divergences_only() -> None:
    fixed = GaussianRelease(1.0, 0.01, "fixed", "replace_one")
    theirs = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    theirs.compose(SampledWithoutReplacementDpEvent(1000, 10, GaussianDpEvent(1.0)), 1000)
    assert spent("rdp", 1e-5, (fixed, 1000)) == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-9)
    plain = GaussianRelease(1.0, relation="replace_one")
    for name in ("pld", "prv"):
        assert spent(name, 1e-5, (fixed, 1000)) == spent(name, 1e-5, (plain, 1000))
    added = GaussianRelease(
        1.0, 0.01, "fixed"
    )  # nothing is known of cohorts that one joins or leaves
    assert spent("rdp", 1e-5, (added, 1000)) == spent("rdp", 1e-5, (GaussianRelease(1.0), 1000))


@pytest.mark.parametrize("name", NAMES)
def test_poisson_sampling_claims_nothing_where_one_is_replaced(name: AccountantName) -> None:
    sampled = GaussianRelease(1.0, 0.01, "poisson", "replace_one")
    plain = GaussianRelease(1.0, relation="replace_one")
    assert spent(name, 1e-5, (sampled, 10)) == spent(name, 1e-5, (plain, 10))


def test_integer_noise_is_accounted_by_renyi_divergences_only() -> None:
    accountant = make_accountant("rdp")
    accountant.step(LATTICE, 50)
    orders = [float(order) for order in RdpAccountant().orders]
    log_delta = math.log(1e-5)
    by_hand = min(
        50 * divergence + math.log1p(-1 / order) - (log_delta + math.log(order)) / (order - 1)
        for order, divergence in zip(orders, renyi(LATTICE, orders), strict=True)
    )
    assert accountant.epsilon(1e-5) == pytest.approx(by_hand, rel=1e-12)
    for name in ("pld", "prv"):
        with pytest.raises(ValueError, match=r"privacy\.accountant=rdp"):
            make_accountant(name).step(LATTICE)


# ---- never below the truth ----


@settings(max_examples=40, deadline=None)
@given(
    st.floats(-2, 3).map(lambda exponent: 10**exponent),
    st.integers(0, 5).map(lambda exponent: 10**exponent),
    st.floats(-12, -2).map(lambda exponent: 10**exponent),
)
def test_the_lattice_gives_a_gaussians_epsilon_and_never_less(
    mu: float, count: int, delta: float
) -> None:
    noise = math.sqrt(count) / mu  # `count` releases come to one with mean mu
    exact = gaussian_epsilon(mu, delta)
    for side in (0, 1):
        found = Sum(side).epsilon({(noise, 1.0): count}, 0.0, delta)
        assert exact * (1 - 1e-9) <= found <= exact * 1.005 + 1e-3 * mu
        if 0 < exact < math.inf:
            assert Sum(side).delta({(noise, 1.0): count}, 0.0, found) <= delta * 1.01


STEP = 2.0**-7
"""Of the coarsest lattice of losses: an ε of about 0 is known to one step."""


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0.3, 20),
    st.floats(-3, -0.05).map(lambda exponent: 10**exponent),
    st.floats(-10, -2).map(lambda exponent: 10**exponent),
)
def test_one_release_costs_its_hockey_stick_and_never_less(
    noise: float, rate: float, delta: float
) -> None:
    found = spent("pld", delta, (poisson(noise, rate), 1))

    def exact(epsilon: float) -> float:
        output = noise**2 * math.log((math.exp(epsilon) - 1 + rate) / rate) + 0.5
        outside, inside = norm.sf(output / noise), norm.sf((output - 1) / noise)
        return float(rate * inside - (math.expm1(epsilon) + rate) * outside)

    assert exact(found) <= delta * (1 + 1e-6) + 1e-15
    if found > 2 * STEP:
        assert exact(found * 0.99 - STEP) >= delta * (1 - 1e-6) - 1e-15


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.01), (0.2, 0.3), (30.0, 0.5), (1.0, 1.0)])
def test_laws_of_one_loss_are_laws(noise: float, rate: float) -> None:
    for law in losses(noise, rate, 2.0**-8):
        assert law.masses.min() >= 0
        assert law.masses.sum() + law.infinite == pytest.approx(1, abs=1e-12)
        under_other = float(law.masses @ np.exp(-law.values))
        assert under_other == pytest.approx(1, abs=1e-9)  # E[exp(−L)] is the other law's mass


def test_gaussian_epsilon_inverts_gaussian_delta() -> None:
    for mu in (1e-3, 0.1, 1.0, 30.0, 1000.0):
        for delta in (1e-12, 1e-5, 0.1):
            epsilon = gaussian_epsilon(mu, delta)
            assert gaussian_delta(mu, epsilon) <= delta
            if epsilon > 0:
                assert gaussian_delta(mu, epsilon * (1 - 1e-9)) >= delta * (1 - 1e-4)
    # Balle & Wang 2018: at ε = 0, δ = 2Φ(μ/2) − 1
    assert gaussian_delta(1.0, 0.0) == pytest.approx(2 * norm.cdf(0.5) - 1, rel=1e-12)


def test_more_kinds_of_releases_than_are_kept_apart_cost_half_a_per_cent_more_at_most() -> None:
    many, few = make_accountant("pld"), make_accountant("pld")
    for number in range(90):
        many.step(poisson(1 + number / 1000, 0.02))
    for number in range(0, 90, 2):  # each for two neighbours, at the noise of the larger
        few.step(poisson(1 + (number + 1) / 1000, 0.02), 2)
    assert 1 <= many.epsilon(1e-5) / few.epsilon(1e-5) < 1.006


@pytest.mark.parametrize("name", ["pld", "rdp", pytest.param("prv", marks=SLOW)])
def test_delta_and_epsilon_belong_together(name: AccountantName) -> None:
    accountant = make_accountant(name)
    accountant.step(poisson(1.0, 0.05), 20)
    for delta in (1e-3, 1e-6):
        assert accountant.delta(accountant.epsilon(delta)) == pytest.approx(delta, rel=0.02)
    with pytest.raises(ValueError, match="delta"):
        accountant.epsilon(0.0)
    with pytest.raises(ValueError, match="epsilon"):
        accountant.delta(-1.0)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_costs_nothing(name: AccountantName) -> None:
    accountant = make_accountant(name)
    assert (accountant.epsilon(1e-5), accountant.delta(0.0)) == (0.0, 0.0)
    accountant.step(poisson(1.0, 0.0), 1000)
    assert accountant.epsilon(1e-5) == 0.0


# ---- step, fork, state ----


@pytest.mark.parametrize("name", ["pld", "rdp"])
def test_one_by_one_or_at_once_is_the_same_whatever_is_asked_between(name: AccountantName) -> None:
    one, at_once = make_accountant(name), make_accountant(name)
    for _ in range(200):
        one.step(poisson(1.0, 0.01))
        one.epsilon(1e-5)
    at_once.step(poisson(1.0, 0.01), 200)
    assert one.releases == at_once.releases
    assert one.epsilon(1e-5) == pytest.approx(at_once.epsilon(1e-5), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_fork_is_its_own(name: AccountantName) -> None:
    accountant = make_accountant(name)
    accountant.step(poisson(1.0, 0.05), 5)
    before = accountant.epsilon(1e-5)
    fork = accountant.fork()
    fork.step(poisson(1.0, 0.05), 5)
    fork.step(GaussianRelease(3.0))
    assert accountant.epsilon(1e-5) == before < fork.epsilon(1e-5)
    assert accountant.releases == [(poisson(1.0, 0.05), 5)]


@pytest.mark.parametrize("name", NAMES)
def test_a_state_is_taken_up(name: AccountantName) -> None:
    accountant = make_accountant(name)
    accountant.step(poisson(1.0, 0.05), 5)
    accountant.step(GaussianRelease(3.0), 2)
    other = make_accountant(name)
    other.step(GaussianRelease(0.1))
    other.load_state_dict(accountant.state_dict())
    assert other.releases == accountant.releases
    assert other.epsilon(1e-5) == accountant.epsilon(1e-5)


def test_states_of_others_are_refused_and_change_nothing() -> None:
    accountant = make_accountant("pld")
    accountant.step(poisson(1.0, 0.05), 5)
    state = dict(accountant.state_dict())
    with pytest.raises(ValueError, match="'pld' can't be taken up by 'rdp'"):
        make_accountant("rdp").load_state_dict(state)
    with pytest.raises(ValueError, match="'add_or_remove_one' can't be taken up by 'replace_one'"):
        make_accountant("pld", "replace_one").load_state_dict(state)
    entry = {**release_to_data(poisson(1.0, 0.05)), "count": 1}
    for wrong in (
        {**entry, "kind": "laplace"},
        {**entry, "rate": 2.0},
        {**entry, "noise_multiplier": "1"},
        {**entry, "count": 0},
        {**entry, "count": "5"},
        {**entry, "more": 1},
        "gaussian",
    ):
        with pytest.raises(ValueError, match=r"release|Release|count"):
            accountant.load_state_dict({**state, "releases": {"0": entry, "1": wrong}})
    assert accountant.releases == [(poisson(1.0, 0.05), 5)]


@pytest.mark.parametrize("release", [poisson(1.0, 0.05), LATTICE])
def test_releases_are_plain_data_and_back(release: GaussianRelease | LatticeRelease) -> None:
    assert release_from_data(release_to_data(release)) == release


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_known_is_refused(name: AccountantName) -> None:
    accountant = make_accountant(name)
    with pytest.raises(
        ValueError, match="'replace_one' can't be composed under 'add_or_remove_one'"
    ):
        accountant.step(GaussianRelease(1.0, relation="replace_one"))
    with pytest.raises(ValueError, match="no accountant knows"):
        accountant.step("laplace")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count"):
        accountant.step(GaussianRelease(1.0), 0)
    assert accountant.releases == []
    with pytest.raises(ValueError, match="choose one of"):
        make_accountant("gdp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose one of"):
        make_accountant(name, "swap")  # type: ignore[arg-type]


# ---- calibration ----


@pytest.mark.parametrize(
    ("name", "target", "delta"),
    [("pld", 0.1, 1e-6), ("pld", 1.0, 1e-5), ("pld", 300.0, 1e-5), ("rdp", 1.0, 1e-5)],
)
def test_found_noise_spends_the_budget_and_no_more(
    name: AccountantName, target: float, delta: float
) -> None:
    def plan(noise: float) -> list[tuple[GaussianRelease, int]]:
        return [(poisson(noise, 0.01), 1000), (GaussianRelease(40 * noise), 10)]

    noise = calibrate(name, target, delta, plan)
    assert 0.99 * target <= spent(name, delta, *plan(noise)) <= target
    accountant = make_accountant(name)
    for release, count in plan(noise):  # a run composes one by one
        for _ in range(count):
            accountant.step(release)
    assert accountant.epsilon(delta) <= target


def test_calibration_says_where_no_noise_will_do() -> None:
    with pytest.raises(
        ValueError, match=r"no noise multiplier up to 1e\+06 keeps to epsilon = 0.001"
    ):
        calibrate("pld", 1e-3, 1e-10, lambda noise: [(GaussianRelease(1.0), 1)])
    with pytest.raises(ValueError, match="target_epsilon"):
        calibrate("pld", 0.0, 1e-5, lambda noise: [(GaussianRelease(noise), 1)])
    assert calibrate(
        "pld", 1e9, 1e-5, lambda noise: [(GaussianRelease(noise), 1)]
    ) == pytest.approx(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("distinct", [False, True])
def test_a_round_costs_five_milliseconds_at_most(distinct: bool) -> None:
    accountant = make_accountant("pld")
    began = time.process_time()
    for number in range(1000):
        accountant.step(poisson(1.2 - 0.0002 * number * distinct, 0.01))
        accountant.epsilon(1e-5)
    assert time.process_time() - began < 5.0 * (2 if distinct else 1)
