"""The laws are the ones that are promised: tables and wide values in 50-digit arithmetic, draws by statistics.

Statistical tests alarm falsely once in 10⁶ or less, each.
"""

import math
import os
from decimal import Decimal, localcontext
from fractions import Fraction

import mpmath  # comes with torch
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.privacy import integers
from strategies.privacy.integers import (
    LARGEST_VARIANCE,
    TABLE_DEVIATION,
    discrete_gaussian,
    rejection,
    skellam,
    split,
    table,
)

LAWS = pytest.mark.parametrize("law", [discrete_gaussian, skellam])
WEIGHTS = {discrete_gaussian: integers._gaussian_weights, skellam: integers._skellam_weights}
VARIANCES = pytest.mark.parametrize(
    "variance", [0.1, 0.5, 1.0, 7.3, 1e3, TABLE_DEVIATION**2, 2e5, 1e7, 2.0**40, LARGEST_VARIANCE]
)
DRAWS = 200_000
SIGMAS = 5.0
"""Of a normal statistic: a false alarm in 1.7 · 10⁶."""


def exact(law, variance: float, reach: int) -> list[mpmath.mpf]:
    """P(x) for x = 0 … reach in 50 digits, by the law's own definition."""
    with mpmath.workdps(50):
        v = mpmath.mpf(variance)
        if law is skellam:
            return [mpmath.exp(-v) * mpmath.besseli(x, v) for x in range(reach + 1)]
        q = mpmath.exp(-1 / (2 * v))
        total = mpmath.jtheta(3, 0, q)
        return [q ** (x * x) / total for x in range(reach + 1)]


def drawn_law(made: integers.Table) -> dict[int, Fraction]:
    """The exact law of a table's draws, from its thresholds."""
    columns, law = len(made.thresholds), {}
    for column, (threshold, alias) in enumerate(zip(made.thresholds, made.aliases, strict=True)):
        own = Fraction(int(threshold), 2**64 * columns)
        law[column - made.reach] = law.get(column - made.reach, 0) + own
        law[int(alias)] = law.get(int(alias), 0) + Fraction(1, columns) - own
    return {value: part for value, part in law.items() if part}


@LAWS
@pytest.mark.parametrize("variance", [1e-3, 0.1, 1.0, 30.0, 2_000.0])
def test_a_tables_law_is_the_promised_one_to_two_to_the_minus_64(law, variance):
    made = integers._table(WEIGHTS[law], Fraction(variance))
    found = drawn_law(made)
    assert max(map(abs, found)) == made.reach
    probabilities = exact(law, variance, made.reach)
    with mpmath.workdps(50):
        cut = 1 - 2 * mpmath.fsum(probabilities) + probabilities[0]
        off = mpmath.fsum(
            abs(probabilities[abs(x)] - mpmath.mpf(part.numerator) / part.denominator)
            for x, part in found.items()
        )
        assert (off + cut) / 2 < mpmath.mpf(2) ** -64


@given(st.lists(st.integers(1, 2**70), min_size=1, max_size=16))
def test_an_alias_table_gives_each_value_exactly_its_count(half):
    weights = [*half[:0:-1], *half]
    columns = 1 << (len(weights) - 1).bit_length()
    whole = columns << 64
    counts = [max(1, weight * whole // (2 * sum(weights))) for weight in weights]
    counts[0] += whole - sum(counts)
    law = drawn_law(table(counts + [0] * (columns - len(counts))))
    assert law == {x - len(half) + 1: Fraction(count, whole) for x, count in enumerate(counts)}


@pytest.mark.parametrize("variance", [TABLE_DEVIATION**2 + 1, 2e5, 1e7, 2.0**40, LARGEST_VARIANCE])
def test_a_wide_discrete_gaussian_is_composed_of_the_right_parts(variance):
    factor, rest = split(Fraction(variance))
    assert factor**2 * rest + 4 * factor**2 == Fraction(variance)
    assert rest >= 8
    assert 2 * factor <= TABLE_DEVIATION


@pytest.mark.parametrize("rest", [8.0, 9.5])
def test_a_composition_is_a_discrete_gaussian_to_two_to_the_minus_73(rest):
    """P(k·A + B = x) in 50 digits, for the smallest σ_A, against exp(−x²/2σ²)."""
    factor = 7
    variance = factor**2 * rest + 4 * factor**2
    with mpmath.workdps(50):
        ratios = [
            mpmath.fsum(
                mpmath.exp(-mpmath.mpf(a) ** 2 / (2 * rest) - (x - factor * a) ** 2 / mpmath.mpf(8 * factor**2))
                for a in range(-60, 61)
            )
            / mpmath.exp(-mpmath.mpf(x) ** 2 / (2 * variance))
            for x in range(-40, 41)
        ]  # fmt: skip
        assert max(ratios) / min(ratios) - 1 < 2 * mpmath.mpf(2) ** -73


@pytest.mark.parametrize("variance", [TABLE_DEVIATION**2, 10**6])
def test_what_is_kept_of_a_wide_proposal_is_skellam_to_two_to_the_minus_62(variance):
    """(1 − rejection)·exp(−x²/2(v + 8)) over I_x(v), from the recurrence, is the same for all x up to 9.7·√v."""
    places = np.arange(0, int(9.7 * math.sqrt(variance)), 7)
    refused = rejection(places, float(variance))
    with localcontext(integers._PRECISE):
        bessel = integers._skellam_weights(Fraction(variance))
        off = Decimal(0)
        for x, part in zip(places.tolist(), refused.tolist(), strict=True):
            proposal = (-Decimal(x * x) / (2 * (variance + 8))).exp()
            law = bessel[x] / bessel[0]
            off += abs((1 - Decimal(part)) * proposal - law) * 7 * 2
        assert off / Decimal(variance * 6).sqrt() < Decimal(2) ** -62
    assert refused[0] == 0
    assert 0 < refused[len(places) // 10] < 100 / variance
    assert refused.max() < 1_000 / variance
    np.testing.assert_array_equal(rejection(-places, float(variance)), refused)


@LAWS
@VARIANCES
def test_draws_fit_the_law(law, variance):
    """χ² over about 40 bins of equal width against exact or, where wide, normal probabilities."""
    from scipy.stats import chi2, norm

    values = law(variance, DRAWS)
    width = max(1, int(0.2 * math.sqrt(variance)))
    half = max(1, int(3 * math.sqrt(variance) / width))  # bins to either side of the middle one
    bins = np.clip((values + (width // 2)) // width, -half - 1, half + 1)
    edges = width * np.arange(-half, half + 2) - width // 2
    if variance <= 1_000:
        reach = int(max(abs(edges[0]), edges[-1])) + 1
        p = np.array([float(one) for one in exact(law, variance, reach)])
        both = np.concatenate([p[:0:-1], p])
        below = np.concatenate([[0.0], np.cumsum(both)])[edges + reach]
        below += (1 - both.sum()) / 2
    else:  # the sum over integers is the integral to within (1/σ²)/24, below the statistic's resolution
        below = norm.cdf((edges - 0.5) / math.sqrt(variance))
    share = np.diff(np.concatenate([[0.0], below, [1.0]]))
    seen = np.bincount((bins + half + 1).astype(int), minlength=len(share))
    keep = share * DRAWS > 20
    rest = (seen[~keep].sum(), share[~keep].sum())
    found, expected = seen[keep], DRAWS * share[keep]
    if rest[1] * DRAWS > 20:
        found, expected = np.append(found, rest[0]), np.append(expected, DRAWS * rest[1])
    statistic = ((found - expected) ** 2 / expected).sum()
    assert statistic < chi2.isf(1e-6, len(found))


@LAWS
@VARIANCES
def test_moments_are_the_laws(law, variance):
    values = law(variance, DRAWS).astype(np.float64) / math.sqrt(variance)
    second, fourth = 1.0, 3.0 + (1 / variance if law is skellam else 0)
    if law is discrete_gaussian and variance < 1:
        p = np.array([float(one) for one in exact(law, variance, 30)])
        second, fourth = (
            2 * (p * np.arange(31.0) ** n).sum() / variance ** (n / 2) for n in (2, 4)
        )
    root = math.sqrt(DRAWS)
    assert abs(values.mean()) < SIGMAS * math.sqrt(second) / root
    assert abs((values**2).mean() - second) < SIGMAS * math.sqrt(fourth - second**2) / root
    assert abs(np.sign(values).mean()) < SIGMAS / root
    # E x⁸ ≤ 105 σ⁸ of a normal variable; a Skellam's 8th moment at v = 0.1 is 1/v³ times as large, and more.
    eighth = 105 * (1 + 2 / variance) ** 3 if law is skellam else 105
    if variance >= 1:
        assert abs((values**4).mean() - fourth) < SIGMAS * math.sqrt(eighth) / root


@LAWS
@VARIANCES
def test_tails_are_neither_cut_nor_heavy(law, variance):
    """None of 200,000 beyond 8σ + 8 (a false alarm in 10⁹); beyond 3σ as many as a normal law's, where wide."""
    values = np.abs(law(variance, DRAWS))
    assert values.max() < 8 * math.sqrt(variance) + 8
    if variance >= 10_000:
        expected = DRAWS * 0.0026998
        beyond = np.count_nonzero(values > 3 * math.sqrt(variance))
        assert abs(beyond - expected) < SIGMAS * math.sqrt(expected) + 0.02 * expected


@LAWS
def test_a_wide_law_is_not_made_of_multiples(law):
    """x mod 200, the factor of the composition, is uniform: χ² at 10⁻⁶."""
    from scipy.stats import chi2

    seen = np.bincount(law(2.0**40, DRAWS) % 200, minlength=200)
    assert ((seen - 1_000) ** 2 / 1_000).sum() < chi2.isf(1e-6, 199)


@LAWS
@pytest.mark.parametrize("variance", [2.5, 1e6])
def test_elements_are_independent_across_blocks(law, variance):
    values = law(variance, 3 * integers._ELEMENTS + 5).astype(np.float64) / math.sqrt(variance)
    for lag in (1, 2, integers._ELEMENTS):
        products = values[lag:] * values[:-lag]
        assert abs(products.mean()) < 5.5 / math.sqrt(len(products))


@LAWS
@settings(max_examples=30)
@given(size=st.integers(0, 50_000), variance=st.floats(0.01, 1e9))
def test_one_key_gives_one_vector(law, size, variance):
    key = os.urandom(32)
    one, again = (law(variance, size, lambda count: key[:count]) for _ in range(2))
    assert one.dtype == np.int64
    assert one.shape == (size,)
    np.testing.assert_array_equal(one, again)


@LAWS
def test_two_calls_share_nothing(law):
    assert not np.array_equal(law(4.0, 100), law(4.0, 100))


@LAWS
def test_a_vanishing_variance_is_no_noise(law):
    np.testing.assert_array_equal(law(1e-30, 1_000), np.zeros(1_000))


@LAWS
@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf, 2.0**81])
def test_a_variance_outside_its_range_is_refused(law, variance):
    with pytest.raises(ValueError, match="variance = "):
        law(variance, 3)


@LAWS
def test_a_negative_size_is_refused(law):
    with pytest.raises(ValueError, match="size = -1"):
        law(1.0, -1)


def test_the_discrete_gaussians_variance_is_its_parameter_but_for_little():
    p = exact(discrete_gaussian, 1.0, 30)
    assert 0 < 1 - 2 * sum(x * x * p[x] for x in range(31)) < 2.2e-7
