"""Every robust rule against its paper, written down plainly, and what all of them promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.combiners import (
    CenteredClipping,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NearestNeighborMixing,
    TrimmedMean,
    functional,
)
from strategies.combiners.bulyan import selected
from strategies.combiners.distances import squared_distances
from strategies.combiners.rows import Stack
from tests.support import robust_rules as plain
from tests.support.examples import many

SEEDS = st.integers(0, 2**32 - 1)


def drawn(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d), dtype=np.float32)


@st.composite
def cases(draw, least):
    """Updates and an f for which a rule that needs `least(f)` of them has enough."""
    f = draw(st.integers(0, 6))
    n = draw(st.integers(max(1, least(f)), least(f) + 12))
    return drawn(n, draw(st.integers(2, 40)), draw(SEEDS)), f


def close(found: np.ndarray, wanted: np.ndarray, scale: float = 4.0) -> bool:
    assert found.dtype == np.float32
    return np.allclose(found, wanted, rtol=0, atol=1e-6 * scale)


@settings(max_examples=many(120))
@given(cases(lambda f: 2 * f + 3))
def test_krum_is_the_papers(case):
    updates, f = case
    assert np.array_equal(functional.krum(updates, f=f), plain.krum(updates, f))


@settings(max_examples=many(120))
@given(cases(lambda f: 2 * f + 3), st.data())
def test_multi_krum_is_the_papers_and_averages_n_minus_f(case, data):
    updates, f = case
    assert close(functional.multi_krum(updates, f=f), plain.multi_krum(updates, f))
    keep = data.draw(st.integers(1, len(updates) - f))
    found = functional.multi_krum(updates, f=f, keep=keep)
    assert close(found, plain.multi_krum(updates, f, keep))


@settings(max_examples=many(120))
@given(cases(lambda f: 4 * f + 3))
def test_bulyan_is_the_papers_and_chooses_one_after_the_other(case):
    updates, f = case
    distances = squared_distances(Stack.of(updates).gram)
    assert selected(distances, f).tolist() == plain.bulyan_selection(updates, f)
    assert close(functional.bulyan(updates, f=f), plain.bulyan(updates, f))


def test_bulyans_choice_one_after_the_other_is_not_the_best_at_once():
    """flwr's Bulyan takes the θ best scores at once: another rule, which this tells from the paper's."""
    differ = 0
    for seed in range(50):
        updates = drawn(11, 3, seed)
        at_once = sorted(plain.krum_order(updates, 2)[: 11 - 4])
        differ += at_once != plain.bulyan_selection(updates, 2)
    assert differ > 10


@settings(max_examples=many(100))
@given(cases(lambda f: 2 * f + 1))
def test_the_coordinatewise_rules_are_the_papers(case):
    updates, f = case
    assert close(functional.median(updates), plain.median(updates))
    assert close(functional.trimmed_mean(updates, f=f), plain.trimmed_mean(updates, f))


@settings(max_examples=25)
@given(cases(lambda f: 2 * f + 1), st.sampled_from([1e-6, 0.1, 2.0]))
def test_the_geometric_median_is_where_weiszfelds_steps_end(case, smoothing):
    updates, _ = case
    found = functional.geometric_median(updates, smoothing=smoothing, iterations=5000)
    wanted = plain.geometric_median(updates, smoothing, 5000)

    def way(point):
        return np.sqrt(((updates - point.astype(np.float64)) ** 2).sum(axis=1)).sum()

    # On a line, or at an update, the way is flat or the steps are slow: what is found is as short.
    assert close(found, wanted, 100) or way(found) <= way(wanted) * (1 + 1e-6)


@pytest.mark.parametrize(("n", "f"), [(9, 4), (20, 9), (51, 25)])
@pytest.mark.parametrize("huge", [1e3, 1e10, 3e38])
def test_the_geometric_median_bears_nearly_half_however_long_the_lie(n, f, huge):
    honest = drawn(n - f, 1000) * np.float32(0.01)
    updates = np.vstack([honest, np.full((f, 1000), huge, np.float32)])
    found = functional.geometric_median(updates, f=f)
    # Its displacement is at most 2(n − f)/(n − 2f) times the honest spread (Minsker 2015; Pillutla et al. 2022).
    spread = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    assert np.linalg.norm(found - honest.mean(axis=0)) < 2 * (n - f) / (n - 2 * f) * spread
    assert np.linalg.norm(found - honest.mean(axis=0)) < 5 * spread


@pytest.mark.parametrize("tiny", [1e-15, 4e-23, 1e-30, 1e-40])
def test_a_tiny_update_buys_no_trust_by_squares_that_vanish(tiny):
    root, honest = drawn(1, 10_000, 1)[0], drawn(9, 10_000) + 2 * drawn(1, 10_000, 1)
    lie = np.full(10_000, np.float32(tiny) * np.float32(0.5))
    lie[0] = np.float32(tiny)
    updates = np.vstack([honest, lie])
    found = functional.fltrust(updates, root=root).astype(np.float64)
    without = functional.fltrust(honest, root=root).astype(np.float64)
    assert np.linalg.norm(found) <= np.linalg.norm(root.astype(np.float64)) * (1 + 1e-6)
    assert np.linalg.norm(found - without) < 0.2 * np.linalg.norm(without)


@given(SEEDS)
def test_the_geometric_median_is_where_no_step_shortens_the_way(seed):
    updates = drawn(9, 5, seed)
    found = functional.geometric_median(updates, iterations=10_000).astype(np.float64)

    def way(point):
        return np.sqrt(((updates - point) ** 2).sum(axis=1)).sum()

    for direction in drawn(10, 5, seed + 1).astype(np.float64):
        assert way(found) <= way(found + 1e-2 * direction) + 1e-9


@settings(max_examples=many(100))
@given(cases(lambda f: 2 * f + 1), st.integers(1, 4), st.floats(0.05, 20), SEEDS)
def test_centred_clipping_is_the_papers(case, iterations, tau, seed):
    updates, _ = case
    centre = drawn(1, updates.shape[1], seed)[0]
    found = functional.centered_clipping(updates, centre=centre, tau=tau, iterations=iterations)
    assert close(found, plain.centered_clipping(updates, centre, tau, iterations), 10)
    about_zero = functional.centered_clipping(updates, tau=tau)
    assert close(about_zero, plain.centered_clipping(updates, 0 * centre, tau, 1), 10)


@settings(max_examples=60)
@given(cases(lambda f: 2 * f + 1), st.floats(0.05, 20))
def test_norm_bounding_is_one_step_of_clipping_about_the_origin(case, bound):
    updates, _ = case
    origin = np.zeros(updates.shape[1], np.float32)
    found = functional.norm_bounding(updates, bound=bound)
    assert close(found, plain.centered_clipping(updates, origin, bound, 1), 10)
    typical = float(np.median(np.linalg.norm(updates.astype(np.float64), axis=1)))
    by_median = functional.norm_bounding(updates)
    assert close(by_median, plain.centered_clipping(updates, origin, typical, 1), 10)


@settings(max_examples=60)
@given(cases(lambda f: f + 1), SEEDS)
def test_fltrust_is_the_papers(case, seed):
    updates, _ = case
    root = drawn(1, updates.shape[1], seed)[0]
    found = functional.fltrust(updates, root=root)
    if (updates.astype(np.float64) @ root.astype(np.float64) <= 0).all():
        assert not found.any()
    else:
        assert close(found, plain.fltrust(updates, root), 10)


@pytest.mark.parametrize("root", [[0.0, 0.0], [-1.0, 0.0]], ids=["no root update", "no trust"])
def test_fltrust_leaves_the_model_where_it_trusts_nobody(root):
    updates = np.float32([[1, 0], [2, 0], [0, 0]])
    assert functional.fltrust(updates, root=np.float32(root)).tolist() == [0, 0]


@settings(max_examples=60)
@given(cases(lambda f: 2 * f + 1))
def test_nearest_neighbour_mixing_is_the_papers_alone_and_round_a_rule(case):
    updates, f = case
    mixed = functional.nnm(updates, f=f)
    assert close(mixed, plain.nnm(updates, f))
    found = functional.nnm(updates, f=f, rule=TrimmedMean())
    assert close(found, plain.trimmed_mean(plain.nnm(updates, f), f))


@settings(max_examples=40)
@given(cases(lambda f: 2 * f + 3))
def test_a_rule_over_distances_within_mixing_sees_the_mixed_updates(case):
    updates, f = case
    inner = functional.multi_krum(functional.nnm(updates, f=f), f=f)
    found = functional.nnm(updates, f=f, rule=MultiKrum())
    # Mixed updates that are equal but for rounding tie: then any of them will do.
    apart = plain.pairwise(plain.nnm(updates, f))[np.triu_indices(len(updates), 1)]
    if np.diff(np.sort(apart)).min(initial=1) > 1e-4:
        assert close(found, inner)


def test_a_rule_over_distances_within_mixing_is_the_rule_on_the_mixed_updates():
    """The same without a condition, on updates that are drawn once."""
    for seed in range(20):
        updates = drawn(13, 30, seed)
        mixed = functional.nnm(updates, f=3)
        for rule, alone in (
            (MultiKrum(), functional.multi_krum(mixed, f=3)),
            (GeometricMedian(), functional.geometric_median(mixed, f=3)),
            (CenteredClipping(tau=1), functional.centered_clipping(mixed, f=3, tau=1)),
        ):
            assert close(functional.nnm(updates, f=3, rule=rule), alone), (seed, rule)


@given(st.integers(1, 30), st.integers(1, 6), SEEDS)
def test_buckets_are_a_partition_and_repeat_with_their_seed(n, size, seed):
    updates = drawn(n, 4, seed)
    buckets = functional.bucketing(updates, size=size, seed=seed)
    assert buckets.shape == (-(-n // size), 4)
    sizes = np.full(len(buckets), size)
    sizes[-1] = n - size * (len(buckets) - 1)
    assert np.allclose(sizes @ buckets, updates.sum(axis=0), atol=1e-4)
    assert np.array_equal(buckets, functional.bucketing(updates, size=size, seed=seed))
    found = functional.bucketing(updates, size=size, seed=seed, rule=Median(), f=0)
    assert np.allclose(found, np.median(buckets, axis=0), atol=1e-6)


def test_buckets_without_a_seed_cannot_be_foreseen():
    updates = drawn(12, 1)
    drawings = {functional.bucketing(updates).tobytes() for _ in range(20)}
    assert (
        len(drawings) == 20
    )  # 12!/2^6 ordered partitions: two alike in 20 drawings about once in 40,000


RULES = {
    "krum": lambda x, f: functional.krum(x, f=f),
    "multi_krum": lambda x, f: functional.multi_krum(x, f=f),
    "bulyan": lambda x, f: functional.bulyan(x, f=f),
    "median": lambda x, f: functional.median(x, f=f),
    "trimmed_mean": lambda x, f: functional.trimmed_mean(x, f=f),
    "geometric_median": lambda x, f: functional.geometric_median(x, f=f),
    "centered_clipping": lambda x, f: functional.centered_clipping(x, f=f),
    "norm_bounding": lambda x, f: functional.norm_bounding(x, f=f),
    "fltrust": lambda x, f: functional.fltrust(x, root=np.ones(x.shape[1], np.float32), f=f),
    "nnm": lambda x, f: functional.nnm(x, f=f, rule=TrimmedMean()),
    "bucketing": lambda x, f: functional.bucketing(x, f=f, rule=Median(), seed=0),
}
N, F = 20, 4


@pytest.fixture(params=RULES)
def rule(request):
    return RULES[request.param]


@pytest.mark.parametrize("lie", ["scaling", "sign flip", "far constant", "one huge element"])
def test_four_liars_of_twenty_do_not_carry_a_rule_away(rule, lie):
    honest = drawn(N, 200, 3) * np.float32(0.1) + np.float32(1)
    updates = honest.copy()
    if lie == "scaling":
        updates[:F] *= 1e6
    elif lie == "sign flip":
        updates[:F] *= -10
    elif lie == "far constant":
        updates[:F] = 1e9
    else:
        updates[:F, 7] = 1e10
    found = rule(updates, F)
    wanted = honest.mean(axis=0)
    assert np.linalg.norm(found - wanted) < 0.5 * np.linalg.norm(wanted)


def test_a_rule_leaves_its_input_alone_and_gives_the_same_twice(rule):
    updates = drawn(N, 300)
    before = updates.copy()
    first = rule(updates, F)
    assert updates.tobytes() == before.tobytes()
    assert first.dtype == np.float32
    assert first.shape == (300,)
    assert rule(updates, F).tobytes() == first.tobytes()
    assert not np.shares_memory(first, updates)


def test_equal_updates_are_their_own_aggregate(rule):
    updates = np.tile(np.abs(drawn(1, 50)), (N, 1))
    found = rule(updates, F)
    if rule is RULES["fltrust"]:  # which scales to the server's own length
        found *= np.linalg.norm(updates[0]) / np.sqrt(50)
    assert np.allclose(found, updates[0], atol=1e-5)


def test_a_rule_follows_a_shift_or_a_scale_of_everything():
    updates = drawn(N, 60)
    for name in (
        "krum",
        "multi_krum",
        "bulyan",
        "median",
        "trimmed_mean",
        "geometric_median",
        "nnm",
    ):
        at = RULES[name](updates, F)
        assert np.allclose(RULES[name](updates + np.float32(2), F), at + 2, atol=1e-5), name
        assert np.allclose(RULES[name](updates * np.float32(4), F), at * 4, atol=1e-5), name


def test_a_list_and_other_numbers_are_taken_too(rule):
    updates = drawn(N, 30)
    wanted = rule(updates, F)
    assert np.array_equal(rule(np.asarray(updates, np.float64), F), wanted)
    assert np.array_equal(rule(np.asfortranarray(updates), F), wanted)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_its_row(rule, bad):
    updates = drawn(N, 30)
    updates[13, 4] = bad
    with pytest.raises(ValueError, match="update 13 holds NaN or an infinity"):
        rule(updates, F)


def test_huge_numbers_are_numbers(rule):
    updates = drawn(N, 30)
    updates[3] = 3e38
    assert np.isfinite(rule(updates, F)).all()


@pytest.mark.parametrize(
    ("name", "n", "f"),
    [
        ("krum", 10, 4), ("multi_krum", 10, 4), ("bulyan", 10, 2), ("median", 8, 4), ("trimmed_mean", 8, 4),
        ("geometric_median", 8, 4), ("centered_clipping", 8, 4), ("norm_bounding", 8, 4), ("fltrust", 4, 4),
        ("nnm", 8, 4), ("bucketing", 16, 4),
    ],
)  # fmt: skip
def test_too_few_updates_for_f_are_refused_and_one_more_is_enough(name, n, f):
    with pytest.raises(ValueError, match=rf"f = {f} needs at least {n + 1} updates and got {n}"):
        RULES[name](drawn(n, 5), f)
    RULES[name](drawn(n + 1, 5), f)


@pytest.mark.parametrize("updates", [np.zeros(3), np.zeros((0, 3)), np.zeros((2, 2, 2))])
def test_what_is_no_matrix_of_updates_is_refused(rule, updates):
    with pytest.raises((ValueError, IndexError), match=r"matrix \(n, d\)|tuple index"):
        rule(updates, 0)


def test_vectors_beside_the_updates_must_fit_them():
    with pytest.raises(ValueError, match="root should be 5 finite numbers"):
        functional.fltrust(drawn(3, 5), root=np.ones(4, np.float32))
    with pytest.raises(ValueError, match="centre should be 5 finite numbers"):
        functional.centered_clipping(drawn(3, 5), centre=np.float32([1, 2, 3, 4, np.nan]))


def test_f_belongs_to_a_wrapper_or_its_rule_but_not_twice():
    assert NearestNeighborMixing(rule=Krum(f=2)).f == 2
    with pytest.raises(ValueError, match="f = 3, but its rule has f = 2"):
        NearestNeighborMixing(f=3, rule=Krum(f=2))


@pytest.mark.parametrize(
    "make", [lambda: Krum(f=-1), lambda: CenteredClipping(tau=0), lambda: MultiKrum(keep=0)]
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()


def test_f_is_a_whole_number():
    with pytest.raises(ValueError, match=r"f = 1\.5: a number of clients is a whole number"):
        functional.trimmed_mean(drawn(7, 3), f=1.5)
