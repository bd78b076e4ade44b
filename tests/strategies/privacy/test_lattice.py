"""Bounds hold against exact divergences of one-dimensional sums, and come down to the Gaussian's on fine lattices."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from strategies.privacy.events import LatticeRelease
from strategies.privacy.lattice import inflation, renyi, share_variance

ORDERS = [1.1, 1.5, 2, 2.5, 3, 4, 5.7, 8, 12]
ROUNDING = 1e-14
"""Of the exact divergence: a logarithm of a sum that is nearly 1."""
REACH = 150
"""Probabilities are computed for −REACH … REACH."""

NOISES = pytest.mark.parametrize("noise", ["discrete_gaussian", "skellam"])
# (variance of a share, shares)
LAWS = pytest.mark.parametrize(
    ("variance", "shares"), [(0.25, 2), (0.25, 10), (0.5, 3), (1.0, 1), (1.0, 5), (4.0, 4), (9.0, 2)]
)  # fmt: skip


def logs(noise: str, variance: float, shares: int) -> np.ndarray:
    """log P(x) of the sum of the shares at each x, by the law itself; of discrete Gaussians by convolution."""
    x = np.arange(-REACH, REACH + 1)
    if noise == "skellam":
        from scipy.special import gammaln, logsumexp

        mean = variance * shares / 2  # of each Poisson part; P(x) = Σ_j Poisson(x + j)·Poisson(j)
        j = np.arange(0, 400)[:, None]
        size = np.abs(x)
        terms = -2 * mean + (2 * j + size) * math.log(mean) - gammaln(j + size + 1) - gammaln(j + 1)
        return logsumexp(terms, axis=0)
    one = np.exp(-(x**2) / (2 * variance))
    one /= one.sum()
    total = one
    for _ in range(shares - 1):
        total = np.convolve(total, one, "same")
    with np.errstate(divide="ignore"):
        return np.log(total)


def divergence(p: np.ndarray, q: np.ndarray, order: float) -> float:
    """D_α(P‖Q) from log-probabilities, where both are known."""
    known = np.isfinite(p) & np.isfinite(q)
    terms = order * p[known] + (1 - order) * q[known]
    return float(np.logaddexp.reduce(terms)) / (order - 1)


def exact(release: LatticeRelease, order: float) -> float:
    """The larger of the two directions for one dimension, sampled or not."""
    law = logs(release.noise, release.variance, release.shares)
    change = int(release.l2)
    without, with_it = law[change:], law[: len(law) - change]
    if release.sampling == "poisson" and release.rate < 1:
        with_it = np.logaddexp(
            math.log1p(-release.rate) + without, math.log(release.rate) + with_it
        )
    return max(divergence(without, with_it, order), divergence(with_it, without, order))


def line(noise, variance, shares, change=1, **options) -> LatticeRelease:
    return LatticeRelease(noise, variance, shares, change, change, 1, **options)


@NOISES
@LAWS
@pytest.mark.parametrize("change", [1, 2, 5])
def test_the_bound_is_above_the_exact_divergence(noise, variance, shares, change):
    release = line(noise, variance, shares, change)
    for order, bound in zip(ORDERS, renyi(release, ORDERS), strict=True):
        assert exact(release, order) <= bound * (1 + 1e-9)


@NOISES
@LAWS
@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.3, 0.9, 1.0])
def test_amplification_is_between_the_exact_divergence_and_none(noise, variance, shares, rate):
    release = line(noise, variance, shares, rate=rate, sampling="poisson")
    alone = renyi(replace(release, rate=1.0, sampling="none"), ORDERS)
    for order, bound, plain in zip(ORDERS, renyi(release, ORDERS), alone, strict=True):
        assert exact(release, order) <= bound * (1 + 1e-9) + ROUNDING
        assert bound <= plain * (1 + 1e-12)


@NOISES
def test_sampling_pays(noise):
    """At rate 1% and z = 2 the cost is below a thousandth at order 2, about γ² as for any mechanism."""
    release = line(noise, 100.0, 4, 10, rate=0.01, sampling="poisson")
    (amplified,), (plain,) = renyi(release, [2]), renyi(replace(release, sampling="none"), [2])
    assert amplified == pytest.approx(math.log1p(1e-4 * math.expm1(plain)), rel=1e-9)
    assert amplified < plain / 1_000


def test_the_sum_over_all_of_the_binomial_is_the_papers_formula():
    """Zhu & Wang's Theorem 5 as they write it, in plain arithmetic."""
    release = line("discrete_gaussian", 50.0, 2, 8, rate=0.2, sampling="poisson")
    for order in (2, 3, 7, 20):
        plain = renyi(replace(release, sampling="none"), range(2, order + 1))
        loss = dict(zip(range(2, order + 1), plain, strict=True))
        total = 0.8 ** (order - 1) * (order * 0.2 - 0.2 + 1)
        total += math.comb(order, 2) * 0.2**2 * 0.8 ** (order - 2) * math.exp(loss[2])
        total += 3 * sum(
            math.comb(order, k) * 0.8 ** (order - k) * 0.2**k * math.exp((k - 1) * loss[k])
            for k in range(3, order + 1)
        )
        expected = min(loss[order], math.log(total) / (order - 1))
        assert renyi(release, [order])[0] == pytest.approx(expected, rel=1e-12)


@NOISES
@given(z=st.floats(0.3, 10), dimension=st.integers(1, 10**7), shares=st.integers(1, 1_000))
def test_on_a_fine_lattice_it_is_the_gaussians(noise, z, dimension, shares):
    l2 = 1e7
    variance = share_variance(z, l2, shares)
    release = LatticeRelease(noise, variance, shares, l2, 1e3 * l2, dimension)
    for order, bound in zip(ORDERS, renyi(release, ORDERS), strict=True):
        # Of whole orders only, a chord of (α − 1)·α/(2z²) is what is known between them.
        low = math.floor(order)
        chord = order if noise == "discrete_gaussian" else low * (2 * order - low - 1) / (order - 1)
        assert bound == pytest.approx(chord / (2 * z**2), rel=1e-3)
        assert bound >= order / (2 * z**2) * (1 - 1e-12)


@NOISES
@settings(max_examples=40)
@example(variance=5.0, shares=10, l2=1.0, rate=0.25, sampling="poisson")
@given(
    variance=st.floats(0.25, 1e6),
    shares=st.integers(1, 200),
    l2=st.floats(1, 1e4),
    rate=st.floats(0, 1),
    sampling=st.sampled_from(["none", "poisson", "fixed"]),
)
def test_it_rises_with_the_order_and_falls_with_more_shares(
    noise, variance, shares, l2, rate, sampling
):
    release = LatticeRelease(noise, variance, shares, l2, l2**2, 1_000, rate, sampling)
    orders = [1.5, 2, 3, 4.5, 16, 64.5, 256]
    found = renyi(release, orders)
    assert all(low <= high * (1 + 1e-9) for low, high in pairwise(found))
    if noise == "skellam":  # of discrete Gaussians more shares also mean a larger τ
        more = renyi(replace(release, shares=shares + 1), orders)
        assert all(less <= bound * (1 + 1e-12) for less, bound in zip(more, found, strict=True))


@NOISES
def test_no_amplification_is_claimed_but_of_units_added_by_a_coin(noise):
    release = line(noise, 4.0, 4, rate=0.01)
    plain = renyi(release, ORDERS)
    assert renyi(replace(release, sampling="fixed"), ORDERS) == plain
    replaced = replace(release, sampling="poisson", relation="replace_one")
    assert renyi(replaced, ORDERS) == plain
    assert renyi(replace(release, sampling="poisson"), ORDERS) != plain


@NOISES
def test_who_is_never_asked_loses_nothing(noise):
    assert renyi(line(noise, 1.0, 2, rate=0.0, sampling="poisson"), [1.5, 2, 9]) == [0, 0, 0]


def test_tiny_costs_keep_their_digits():
    """γ² = 10⁻¹⁶ is the size of a rounding error of 1; the third term, 2·γ³, is far below."""
    release = line("discrete_gaussian", 100.0, 4, 10, rate=1e-8, sampling="poisson")
    assert renyi(release, [2])[0] == pytest.approx(1e-16 * math.expm1(0.25), rel=1e-6)


@NOISES
def test_large_orders_neither_overflow_nor_vanish(noise):
    release = LatticeRelease(noise, 1.0, 2, 100.0, 1e4, 10, 0.5, "poisson")
    for found in renyi(release, [512, 1024, 4096.5]):
        assert 0 < found < math.inf


def test_inflation_counts_every_share():
    def plain(variance, shares):
        return 10 * sum(
            math.exp(-2 * math.pi**2 * variance * k / (k + 1)) for k in range(1, shares)
        )

    assert inflation(3.0, 1) == 0.0
    for variance, shares in ((0.25, 2), (0.5, 10), (1.0, 1_001)):
        assert inflation(variance, shares) == pytest.approx(plain(variance, shares), rel=1e-12)
    assert plain(0.25, 5_000) <= inflation(0.25, 5_000) <= plain(0.25, 5_000) * 1.01


def test_inflation_covers_the_exact_range_of_log_probabilities():
    x = np.arange(-REACH, REACH + 1)
    for variance, shares in ((0.25, 2), (0.25, 5), (0.4, 3), (0.6, 2)):
        one = -(x**2) / (2 * variance * shares)
        off = logs("discrete_gaussian", variance, shares) - (one - np.logaddexp.reduce(one))
        near = np.abs(x) < 12 * math.sqrt(variance * shares)
        assert 0 < np.ptp(off[near]) <= inflation(variance, shares)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: renyi(line("skellam", 1.0, 1), [2, 1.0]), "orders above 1"),
        (lambda: renyi(line("skellam", 1.0, 1), [math.nan]), "orders above 1"),
        (lambda: renyi(line("skellam", 1.0, 1), [math.inf]), "orders above 1"),
        (lambda: renyi(line("discrete_gaussian", 0.2, 2), [2]), "take finer steps"),
        (lambda: share_variance(0.0, 1.0, 1), "above 0"),
        (lambda: share_variance(1.0, math.nan, 1), "above 0"),
        (lambda: share_variance(1.0, 1.0, 0), "above 0"),
    ],
)
def test_what_is_not_known_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_single_discrete_gaussian_needs_no_least_variance():
    """Canonne, Kamath & Steinke 2020, Theorem 4: Δ²/(2σ²)·α whatever σ."""
    assert renyi(line("discrete_gaussian", 0.01, 1), [3]) == pytest.approx([150.0])


def test_noise_is_divided_among_the_shares():
    assert share_variance(2.0, 10.0, 4) == 100.0
