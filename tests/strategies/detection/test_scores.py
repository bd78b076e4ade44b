"""Scores against their definitions in float64, written with the vectors themselves and no Gram matrix."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.detection.scores import (
    Scores,
    deviation,
    grams,
    groups,
    inner_products,
    reference_weights,
    score,
)
from strategies.update import BUFFERS, COUNTERS, DELTA, Layout, Section, Update

LAYOUT = Layout(("weight", "bias", "head"), ((4, 6), (4,), (3, 4)))
FIELDS = ("norm", "distance", "cosine", "excess", "agreement")


def update(vector, client: int, **others) -> Update:
    sections = {DELTA: Section(np.asarray(vector, np.float32), LAYOUT)}
    return Update(sections | others, 1.0, (client,), 0)


def scores_of(rows) -> Scores:
    return score(grams([update(row, client) for client, row in enumerate(rows)]))


@st.composite
def rounds(draw, least: int = 3):
    n, seed = draw(st.integers(least, 9)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    common = draw(st.floats(0, 3))
    rows = rng.standard_normal((n, LAYOUT.size)) + common * rng.standard_normal(LAYOUT.size)
    return np.float32(rows * 10.0 ** rng.uniform(-1, 1, (n, 1)))


def cosine(x, y) -> float:
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


@given(rounds())
def test_every_score_is_what_its_definition_says(rows):
    found, x = scores_of(rows), rows.astype(np.float64)
    reference = reference_weights(x @ x.T) @ x
    norm, residual = np.linalg.norm(x, axis=1), x - reference
    cosines = np.array([cosine(row, reference) for row in x])
    np.testing.assert_allclose(found.norm, norm, rtol=1e-9)
    np.testing.assert_allclose(found.cosine, cosines, atol=1e-9)
    np.testing.assert_allclose(
        found.distance, np.linalg.norm(residual, axis=1), rtol=1e-6, atol=2e-6 * norm.max()
    )  # a distance of a millionth of the length is none
    floor = np.maximum(cosines, 0.02)
    excess = np.log(norm / np.median(norm)) + np.log(max(np.median(cosines), 0.02) / floor)
    np.testing.assert_allclose(found.excess, excess, atol=1e-6)


@given(rounds())
def test_agreement_is_with_the_others_only_and_each_has_one_voice(rows):
    found, n = scores_of(rows).agreement, len(rows)
    for client in range(n):
        each = []
        for part in (slice(0, 24), slice(28, 40)):  # the two matrices; the bias has no say
            unit = rows[:, part].astype(np.float64)
            unit /= np.linalg.norm(unit, axis=1, keepdims=True)
            each.append(cosine(unit[client], np.delete(unit, client, axis=0).sum(0)))
        assert found[client] == pytest.approx(np.mean(each), abs=1e-6)


@given(rounds(least=5))
def test_correlation_is_the_cosine_of_what_is_left_beside_the_reference_or_of_the_whole(rows):
    found, x = scores_of(rows), rows.astype(np.float64)
    residual = x - reference_weights(x @ x.T) @ x
    length = np.linalg.norm(residual, axis=1)
    near = length < 0.25 * np.median(length)
    for one in range(len(x)):
        for other in range(len(x)):
            if near[one] != near[other]:
                assert found.correlation[one, other] <= 0
            elif min(length[one], length[other]) > 1e-3 * length.max():
                expected = min(cosine(residual[one], residual[other]), cosine(x[one], x[other]))
                assert found.correlation[one, other] == pytest.approx(expected, abs=1e-4)


@given(rounds(), st.randoms(use_true_random=False))
def test_the_order_of_the_clients_does_not_matter(rows, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    one, other = scores_of(rows), scores_of(rows[order])
    for name in FIELDS:
        np.testing.assert_allclose(
            getattr(one, name)[order], getattr(other, name), atol=1e-6, rtol=1e-6
        )


@given(rounds(), st.integers(-20, 20))
def test_the_unit_of_the_parameters_does_not_matter(rows, power):
    one, other = scores_of(rows), scores_of(rows * np.float32(2.0**power))
    for name in ("cosine", "excess", "agreement"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-9)
    np.testing.assert_allclose(one.norm * 2.0**power, other.norm)


@given(rounds(least=6), st.floats(1e3, 1e9))
def test_a_liar_changes_the_others_scores_no_more_the_longer_its_lie_is(rows, factor):
    first, second = rows.copy(), rows.copy()
    first[0] *= np.float32(1e3)
    second[0] *= np.float32(factor)
    one, other = scores_of(first), scores_of(second)
    np.testing.assert_allclose(one.cosine[1:], other.cosine[1:], atol=0.05)
    np.testing.assert_allclose(one.agreement[1:], other.agreement[1:], atol=1e-6)


@given(rounds())
def test_the_reference_has_the_least_sum_of_distances(rows):
    x = rows.astype(np.float64)
    weights = reference_weights(x @ x.T)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()

    def total(point):
        return np.linalg.norm(x - point, axis=1).sum()

    reference = weights @ x
    candidates = [*x, x.mean(0), *(reference + 0.1 * (row - reference) for row in x)]
    assert total(reference) <= min(map(total, candidates)) * (1 + 1e-3)


def test_inner_products_do_not_depend_on_the_blocks():
    rows = np.random.default_rng(0).standard_normal((3, 100_000)).astype(np.float32)
    exact = rows.astype(np.float64) @ rows.astype(np.float64).T
    np.testing.assert_allclose(inner_products(list(rows)), exact, rtol=1e-12)


def test_all_float_sections_count_and_counters_do_not():
    row = np.zeros(LAYOUT.size)
    one = Layout(("x",), ((2,),))
    extra = {
        BUFFERS: Section(np.float32([3, 4]), one),
        COUNTERS: Section(np.float32([7, 7]), one),
    }
    found = grams([update(row, 0, **extra), update(row + 1, 1, **extra)])
    np.testing.assert_allclose(found.whole, [[25, 25], [25, 65]])
    assert len(found.arrays) == 2


def test_a_model_without_matrices_is_judged_by_its_vectors():
    layout = Layout(("x",), ((2,),))
    sections = [{DELTA: Section(np.float32(row), layout)} for row in ([1, 0], [1, 1], [0, 2])]
    found = grams([Update(one, 1.0, (0,), 0) for one in sections])
    np.testing.assert_allclose(found.arrays[0], found.whole)


def test_zeros_have_no_direction_and_equal_updates_are_copies():
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((6, LAYOUT.size)).astype(np.float32)
    rows[0] = 0
    found = scores_of(rows)
    assert (found.norm[0], found.cosine[0], found.agreement[0]) == (0, 0, 0)
    same = scores_of(np.repeat(rows[1:2], 5, axis=0))
    np.testing.assert_array_equal(same.correlation, np.ones((5, 5)))
    assert found.correlation[0].max() == 0
    nothing = scores_of(np.zeros((5, LAYOUT.size), np.float32))
    assert np.isfinite(nothing.excess).all()
    mostly = np.zeros((5, LAYOUT.size), np.float32)
    mostly[0] = 1
    assert scores_of(mostly).excess[0] == np.inf


def linked(n: int, *pairs: tuple[int, int]) -> np.ndarray:
    links = np.eye(n)
    for one, other in pairs:
        links[one, other] = links[other, one] = 0.9
    return links


def test_every_two_of_a_group_are_alike():
    alike = linked(6, (0, 3), (3, 5), (0, 5), (1, 2))
    assert groups(alike, 0.85) == [[0, 3, 5], [1, 2]]
    assert groups(alike, 0.95) == []


def test_who_is_like_several_does_not_make_a_group_of_them():
    """A liar may mix the updates of three honest clients: it is grouped with one of them, not with all."""
    framed = linked(6, (5, 0), (5, 1), (5, 2))
    (group,) = groups(framed, 0.85)
    assert len(group) == 2
    assert 5 in group


@pytest.mark.parametrize("huge", [1e10, 1e18])
@pytest.mark.parametrize("liars", [1, 4])
def test_a_huge_lie_does_not_hide_the_others(huge, liars):
    """However long it is, the reference stays among the majority, and the others' cosines to it as they were."""
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(20, 40)) + 2 * rng.normal(size=40)
    before = scores_of(rows).cosine
    rows[:liars] = huge
    after = scores_of(rows)
    assert np.allclose(after.cosine[liars:], before[liars:], atol=0.1)
    assert (after.excess[:liars] > 10).all()


def test_the_deviation_is_that_of_the_lower_half():
    values = np.random.default_rng(0).normal(5, 2, 100_000)
    assert deviation(values) == pytest.approx(2, rel=0.02)
    spoilt = np.concatenate([values, np.full(25_000, 1e9)])
    assert deviation(spoilt) < 1.3 * deviation(values)
