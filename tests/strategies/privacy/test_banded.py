"""The matrix is the root of the workload, its sensitivity the worst of all schedules, its noise the rows of C⁻¹Z."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.privacy.banded import _BLOCK, BandedNoise, BandedToeplitz
from strategies.privacy.events import GaussianRelease

momenta = st.sampled_from([0.0, 0.3, 0.9, 0.99])


def dense(matrix: BandedToeplitz, rounds: int) -> np.ndarray:
    """C, (rounds, rounds), by its definition."""
    found = np.zeros((rounds, rounds))
    for lag, value in enumerate(matrix.coefficients()[:rounds]):
        found += np.diag(np.full(rounds - lag, value), -lag)
    return found


def workload(momentum: float, rounds: int) -> np.ndarray:
    """A, by the server's own loop: m ← βm + g, x ← x + m, for each unit vector of aggregates."""
    found = np.zeros((rounds, rounds))
    for place in range(rounds):
        velocity = model = 0.0
        for number in range(rounds):
            velocity = momentum * velocity + (number == place)
            model += velocity
            found[number, place] = model
    return found


def schedules(rounds: int, participations: int, separation: int):
    """Every way to take part at most so often and so far apart."""
    for count in range(participations + 1):
        for chosen in combinations(range(rounds), count):
            if all(after - before >= separation for before, after in pairwise(chosen)):
                yield list(chosen)


@given(st.integers(1, 40), momenta)
def test_with_all_bands_the_matrix_is_the_square_root_of_the_workload(rounds, momentum):
    root = dense(BandedToeplitz(rounds, momentum), rounds)
    np.testing.assert_allclose(root @ root, workload(momentum, rounds), rtol=1e-12)


@given(st.integers(1, 60), momenta)
def test_fewer_bands_are_the_same_root_cut_off_and_coefficients_decrease(bands, momentum):
    few, many = (
        BandedToeplitz(bands, momentum).coefficients(),
        BandedToeplitz(90, momentum).coefficients(),
    )
    np.testing.assert_allclose(few, many[:bands], rtol=1e-12)
    assert few[0] == 1
    assert (np.diff(many) < 0).all()
    assert (many > 0).all()
    with pytest.raises(ValueError, match="read-only"):
        few[0] = 2.0


def test_the_first_coefficients_are_those_of_the_paper():
    """Binomial(2j, j) / 4^j for prefix sums (Kalinin & Lampert 2024, Theorem 1 with α = 1, β = 0)."""
    paper = [math.comb(2 * j, j) / 4**j for j in range(20)]
    np.testing.assert_allclose(BandedToeplitz(20).coefficients(), paper, rtol=1e-14)


@settings(deadline=None)
@given(
    st.integers(0, 11),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 4),
    momenta,
    st.integers(0, 2**32 - 1),
)
def test_the_sensitivity_is_the_worst_of_every_schedule(
    rounds, participations, separation, fewer, momentum, seed
):
    """By trial of all of them, with contributions of norm 1 that all point the same way, and at random."""
    matrix = BandedToeplitz(max(1, separation - fewer), momentum)
    strategy, rng, worst = dense(matrix, rounds), np.random.default_rng(seed), 0.0
    sensitivity = matrix.sensitivity(rounds, participations, separation)
    for chosen in schedules(rounds, participations, separation):
        alike = np.zeros((rounds, 3))
        alike[chosen, 0] = 1
        worst = max(worst, float(np.linalg.norm(strategy @ alike)))
        unlike = np.zeros((rounds, 3))
        unlike[chosen] = rng.standard_normal((len(chosen), 3))
        unlike[chosen] /= np.maximum(1, np.linalg.norm(unlike[chosen], axis=1, keepdims=True))
        assert np.linalg.norm(strategy @ unlike) <= sensitivity + 1e-12
    assert sensitivity == pytest.approx(worst, abs=1e-12)


def test_one_participation_of_a_long_run_costs_the_first_columns_norm_and_k_cost_root_k():
    matrix = BandedToeplitz(8)
    norm = float(np.linalg.norm(matrix.coefficients()))
    assert matrix.sensitivity(1000, 1, 8) == pytest.approx(norm, rel=1e-14)
    assert matrix.sensitivity(1000, 9, 8) == pytest.approx(3 * norm, rel=1e-14)
    # 124 whole columns fit before round 993, and one that begins there still has its 8 rows.
    assert matrix.sensitivity(1000, 500, 8) == pytest.approx(math.sqrt(125) * norm, rel=1e-14)
    assert BandedToeplitz(1).sensitivity(1000, 9, 8) == 3


@given(
    st.integers(1, 60), st.integers(1, 6), st.integers(1, 12), st.integers(0, 11),
    momenta, st.floats(0.1, 50),
)  # fmt: skip
def test_what_rounds_are_charged_sums_to_what_the_prefix_costs_after_every_round(
    rounds, participations, separation, fewer, momentum, z
):
    matrix = BandedToeplitz(max(1, separation - fewer), momentum)
    terms = {
        "participations": participations,
        "separation": separation,
        "noise_multiplier": z,
    }
    spent = 0.0
    for number in range(1, rounds + 1):
        more = matrix.increment(number, **terms)
        assert more >= 0
        spent += more
        assert spent == pytest.approx(matrix.prefix_cost(number, **terms), rel=1e-12)
        release = matrix.release(number, **terms)
        if more:
            assert release == GaussianRelease(1 / math.sqrt(more))
        else:
            assert release is None
    assert matrix.prefix_cost(0, **terms) == 0


def test_the_charges_compose_to_the_gaussian_of_the_whole():
    """By dp_accounting's PLD, against Balle & Wang 2018, Theorem 8: δ(ε) of a Gaussian with μ, exact."""
    from dp_accounting import ComposedDpEvent, GaussianDpEvent
    from dp_accounting.pld import PLDAccountant
    from scipy.stats import norm

    matrix = BandedToeplitz(4)
    terms = {"participations": 3, "separation": 5, "noise_multiplier": 4.0}
    releases = [matrix.release(number, **terms) for number in range(1, 21)]
    charged = [release.noise_multiplier for release in releases if release]
    assert len(charged) == 12
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    accountant.compose(ComposedDpEvent([GaussianDpEvent(noise) for noise in charged]))
    mu = math.sqrt(matrix.prefix_cost(20, **terms))
    assert mu == pytest.approx(matrix.sensitivity(20, 3, 5) / 4)
    epsilon = accountant.get_epsilon(1e-5)
    delta = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
    assert delta == pytest.approx(1e-5, rel=0.01)


@given(
    st.integers(1, 12), st.integers(1, 30), st.integers(1, 5), momenta, st.integers(0, 2**32 - 1)
)
def test_streamed_noise_is_the_dense_inverse_times_the_noise(bands, rounds, size, momentum, seed):
    matrix = BandedToeplitz(bands, momentum)
    normal = np.random.default_rng(seed).standard_normal((rounds, size))
    stream = BandedNoise(matrix, size)
    rows = np.array([stream.next(row.copy()) for row in normal])
    expected = np.linalg.solve(dense(matrix, rounds), normal)
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-10)
    assert stream.rows == rounds


def test_blocks_make_no_difference_and_the_row_that_is_given_is_the_callers():
    matrix, size = BandedToeplitz(5, 0.5), 2 * _BLOCK + 7
    normal = np.random.default_rng(3).standard_normal((12, size))
    stream, rows = BandedNoise(matrix, size), []
    for row in normal:
        given_row = row.copy()
        made = stream.next(given_row)
        assert made is given_row
        rows.append(made.copy())
        made[:] = np.nan  # what becomes of it later changes nothing that follows
    expected = np.linalg.solve(dense(matrix, 12), normal)
    np.testing.assert_allclose(np.array(rows), expected, rtol=0, atol=1e-10)


def test_a_thousand_rounds_stay_exact():
    """C⁻¹ is stable, so rounding errors die out."""
    matrix = BandedToeplitz(32, 0.9)
    normal = np.random.default_rng(1).standard_normal((1000, 2))
    stream = BandedNoise(matrix, 2)
    rows = np.array([stream.next(row.copy()) for row in normal])
    np.testing.assert_allclose(dense(matrix, 1000) @ rows, normal, rtol=0, atol=1e-10)


def test_a_release_gives_the_gaussian_mechanism_back_and_neighbours_differ_in_it_by_the_sensitivity():
    """Both directions of the proof: C(G + C⁻¹Z) = CG + Z, and without one client's rounds 1, 6, 11 that moves by s."""
    matrix, rounds = BandedToeplitz(4), 14
    rng = np.random.default_rng(8)
    others, own = rng.standard_normal((rounds, 6)), np.zeros((rounds, 6))
    own[[0, 5, 10]] = np.eye(6)[[1, 1, 4]]
    normal = 2.0 * rng.standard_normal((rounds, 6))
    released = []
    for aggregates in (others + own, others):
        stream = BandedNoise(matrix, 6)
        released.append(
            np.array([g + stream.next(z.copy()) for g, z in zip(aggregates, normal, strict=True)])
        )
    strategy = dense(matrix, rounds)
    np.testing.assert_allclose(
        strategy @ released[1], strategy @ others + normal, rtol=0, atol=1e-10
    )
    moved = float(np.linalg.norm(strategy @ (released[0] - released[1])))
    assert moved == pytest.approx(matrix.sensitivity(rounds, 3, 5), rel=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_error_is_what_the_formula_says_and_what_streams_show(momentum):
    """20,000 columns: a mean square with a relative standard deviation of √(2/20,000) = 1% at most, held to 6%."""
    matrix, rounds, size = BandedToeplitz(6, momentum), 40, 20_000
    rms, worst = matrix.errors(rounds, 5, 8)
    sums = workload(momentum, rounds)
    rows = np.linalg.norm(sums @ np.linalg.inv(dense(matrix, rounds)), axis=1)
    scale = matrix.sensitivity(rounds, 5, 8)
    assert rms == pytest.approx(scale * math.sqrt(np.mean(rows**2)), rel=1e-10)
    assert worst == pytest.approx(scale * rows.max(), rel=1e-10)
    rng, stream = np.random.default_rng(4), BandedNoise(matrix, size)
    noise = np.array([stream.next(scale * rng.standard_normal(size)) for _ in range(rounds)])
    seen = np.square(sums @ noise).mean()
    assert seen == pytest.approx(rms**2, rel=0.06)


@given(st.integers(1, 200), st.integers(1, 9))
def test_one_band_errs_as_independent_noise_does(rounds, participations):
    rms, worst = BandedToeplitz(1).errors(rounds, participations, 1)
    k = min(participations, rounds)
    assert rms == pytest.approx(math.sqrt(k * (rounds + 1) / 2), rel=1e-10)
    assert worst == pytest.approx(math.sqrt(k * rounds), rel=1e-10)


def test_the_error_falls_with_each_band():
    found = [BandedToeplitz(bands).errors(320, 10, 32)[0] for bands in range(1, 33)]
    assert (np.diff(found) < 0).all()
    assert found[-1] < found[0] / 3


@pytest.mark.parametrize(("bands", "rounds", "factor"), [(300, 300, 1.1), (30, 300, 1.4)])
def test_the_error_is_near_what_no_factor_undercuts(bands, rounds, factor):
    """rms ≥ ‖A‖_*/√(b·T), as derived in benchmarks/dp_ftrl.py; singular values 1/(2·sin((2i - 1)π/(4T + 2)))."""
    places = np.arange(1, rounds + 1)
    nuclear = (0.5 / np.sin((2 * places - 1) * np.pi / (4 * rounds + 2))).sum()
    bound = nuclear / math.sqrt(bands * rounds)
    rms, _ = BandedToeplitz(bands).errors(rounds, rounds // bands, bands)
    assert bound <= rms <= factor * bound


TERMS = {"participations": 1, "separation": 3, "noise_multiplier": 1.0}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: BandedToeplitz(0), "bands = 0: must be at least 1"),
        (lambda: BandedToeplitz(2, 1.0), "momentum = 1.0: must be less than 1"),
        (lambda: BandedToeplitz(2, -0.1), "momentum = -0.1"),
        (lambda: BandedToeplitz(4).sensitivity(9, 1, 3), "bands = 4: .* at most 3 bands"),
        (lambda: BandedToeplitz(4).increment(9, **TERMS), "bands = 4"),
        (lambda: BandedToeplitz(2).sensitivity(-1, 1, 3), "-1 rounds"),
        (lambda: BandedToeplitz(2).sensitivity(9, 0, 3), "0 participations"),
        (lambda: BandedToeplitz(2).sensitivity(9, 1, 0), "0 rounds apart"),
        (lambda: BandedToeplitz(2).increment(0, **TERMS), "count from 1"),
        (lambda: BandedToeplitz(2).release(9, **TERMS | {"noise_multiplier": 0.0}), "noise_mult"),
        (lambda: BandedToeplitz(2).prefix_cost(9, **TERMS | {"noise_multiplier": math.nan}), "nan"),
        (lambda: BandedToeplitz(2).prefix_cost(9, **TERMS | {"noise_multiplier": math.inf}), "inf"),
        (lambda: BandedToeplitz(2).errors(0, 1, 3), "rounds = 0"),
        (lambda: BandedNoise(BandedToeplitz(2), 0), "size = 0"),
        (lambda: BandedNoise(BandedToeplitz(2), 3).next(np.zeros(4)), r"shape \(4,\)"),
        (lambda: BandedNoise(BandedToeplitz(2), 3).next(np.zeros(3, np.float32)), "float32"),
    ],
)
def test_what_cannot_be_right_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
