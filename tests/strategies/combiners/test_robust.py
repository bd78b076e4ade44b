"""Robust combiners at work on a round: who counts, what f means when replies are missing or refused, what lasts."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.combiners import (
    Bucketing,
    Bulyan,
    CenteredClipping,
    FLTrust,
    Krum,
    Median,
    MultiKrum,
    NearestNeighborMixing,
    TrimmedMean,
    functional,
)
from strategies.protocols import Learner
from strategies.update import BUFFERS, CONTROL, COUNTERS, DELTA, Update
from tests.support.updates import plan_of, update


def drawn(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d), dtype=np.float32)


def combined(rule, updates: list[Update], *, planned: int | None = None, refused: int = 0, **plan):
    held = rule.begin(plan_of(updates[0], cohort=planned or len(updates), **plan))
    for one in updates:
        held.add(one)
    return held.result(refused)


def clients(matrix: np.ndarray, **keywords) -> list[Update]:
    return [update(row, client=index, **keywords) for index, row in enumerate(matrix)]


@settings(max_examples=50)
@given(st.permutations(range(9)))
def test_the_order_of_replies_changes_no_bit_even_where_rules_tie(order):
    matrix = np.repeat(drawn(3, 40), 3, axis=0)  # every update has equals: all scores tie
    updates = clients(matrix)
    for rule in (
        Krum(f=2),
        MultiKrum(f=2),
        Bulyan(f=1),
        TrimmedMean(f=2),
        NearestNeighborMixing(f=2),
    ):
        wanted = combined(rule, updates)
        found = combined(rule, [updates[index] for index in order])
        assert found.delta.vector.tobytes() == wanted.delta.vector.tobytes()
        assert found.members == tuple(range(9))


def test_a_tie_goes_to_the_lowest_logical_id():
    updates = [update([float(client % 2)], client=client) for client in (5, 4, 3, 2, 1, 0)]
    chosen = combined(Krum(f=0), updates)
    assert chosen.delta.vector[0] == 0.0  # clients 0, 2, 4 tie with 1, 3, 5


@given(st.lists(st.floats(1, 1e6), min_size=7, max_size=7))
def test_a_declared_weight_buys_no_influence(weights):
    matrix = drawn(7, 12)
    light = clients(matrix)
    heavy = [replace(one, weight=weight) for one, weight in zip(light, weights, strict=True)]
    for rule in (MultiKrum(f=1), TrimmedMean(f=1), Median(), CenteredClipping(), Bucketing(seed=1)):
        vector = combined(rule, heavy).delta.vector
        assert vector.tobytes() == combined(rule, light).delta.vector.tobytes()


@pytest.mark.parametrize(
    ("rule", "n", "f"),
    [
        (Krum(), 10, 3), (Krum(), 20, 6), (Krum(), 8, 2), (Krum(), 3, 0), (MultiKrum(), 10, 3), (Bulyan(), 20, 4),
        (Bulyan(), 6, 0), (Median(), 10, 3), (TrimmedMean(), 20, 6), (NearestNeighborMixing(), 20, 6),
        (NearestNeighborMixing(rule=Krum()), 10, 3), (Bucketing(), 20, 4), (Bucketing(size=1), 20, 6),
        (Krum(f=1), 20, 1), (NearestNeighborMixing(rule=Krum(f=2)), 20, 2),
    ],
)  # fmt: skip
def test_f_is_30_percent_or_the_most_that_the_rule_bears(rule, n, f):
    assert rule.tolerance(n) == f
    assert rule.least(f) <= n
    assert rule.least_inputs(n) == rule.least(f)


def test_too_few_replies_make_no_aggregate_and_do_not_lower_f():
    updates = clients(drawn(9, 4))
    assert combined(Krum(f=3), updates, planned=10) is not None
    assert combined(Krum(f=3), updates[:8], planned=10) is None
    assert combined(Krum(), updates[:8], planned=10) is None  # f = 3 of 10, not 2 of 8
    assert combined(TrimmedMean(f=3), updates[:6], planned=10) is None
    assert Median().begin(plan_of(updates[0], cohort=3)).result() is None


def test_a_refused_reply_is_one_of_the_liars():
    matrix = drawn(8, 4)
    updates = clients(matrix)
    found = combined(Krum(f=3), updates, planned=10, refused=2)
    assert np.array_equal(found.delta.vector, functional.krum(matrix, f=1))
    assert combined(Krum(f=3), updates[:4], planned=10, refused=2) is None  # 5 are needed for f = 1
    assert (
        combined(Krum(f=3), updates[:5], planned=10, refused=4) is None
    )  # more than f: no promise holds


def test_refusals_do_not_lower_f_where_enough_replies_are_left():
    matrix = drawn(14, 6)
    found = combined(TrimmedMean(f=6), clients(matrix), planned=20, refused=6)
    assert np.allclose(found.delta.vector, functional.trimmed_mean(matrix, f=6))


def test_sections_are_judged_jointly():
    """A client whose control variate alone is a lie is left out with its delta."""
    honest, lie = drawn(6, 5) * np.float32(0.01) + 1, np.full(5, 100, np.float32)
    updates = [update(row, client=index, control=row) for index, row in enumerate(honest)]
    updates[2] = update(honest[2], client=2, control=lie)
    found = combined(MultiKrum(f=1), updates)
    others = np.delete(honest, 2, axis=0).mean(axis=0)
    for name in (DELTA, CONTROL):
        assert np.allclose(found.sections[name].vector, others, atol=1e-6)


def test_sections_of_unequal_length_are_one_vector():
    deltas, buffers = drawn(7, 9), drawn(7, 2, 1)
    updates = [
        update(delta, client=index, **{BUFFERS: buffer})
        for index, (delta, buffer) in enumerate(zip(deltas, buffers, strict=True))
    ]
    found = combined(Krum(f=2), updates)
    joint = functional.krum(np.concatenate([deltas, buffers], axis=1), f=2)
    assert found.sections[DELTA].vector.tolist() == joint[:9].tolist()
    assert found.sections[BUFFERS].vector.tolist() == joint[9:].tolist()


@given(st.lists(st.integers(0, 50), min_size=5, max_size=9), st.integers(0, 2))
def test_counters_grow_by_no_more_than_an_honest_client_said(honest, f):
    counts = honest + [10_000] * f
    updates = [
        update([0.0], client=index, **{COUNTERS: [float(count)]})
        for index, count in enumerate(counts)
    ]
    found = combined(TrimmedMean(f=f), updates).sections[COUNTERS].vector
    assert found.tolist() == [max(honest)]


def test_a_root_update_reaches_the_rule_that_asks_for_one():
    matrix, root = drawn(5, 8), drawn(1, 8, 7)[0]
    found = combined(FLTrust(f=1), clients(matrix), root=update(root))
    assert np.array_equal(found.delta.vector, functional.fltrust(matrix, root=root))
    with pytest.raises(ValueError, match="needs the server's own update"):
        combined(FLTrust(f=1), clients(matrix))


def test_centred_clipping_steps_from_what_the_last_round_came_to():
    rule, matrix = CenteredClipping(tau=0.5), drawn(6, 4)
    assert isinstance(rule, Learner)
    first = combined(rule, clients(matrix))
    assert np.allclose(first.delta.vector, functional.centered_clipping(matrix, tau=0.5), atol=1e-6)
    again = combined(rule, clients(matrix))
    assert again.delta.vector.tobytes() == first.delta.vector.tobytes()  # nothing was applied yet
    rule.learn(first)
    second = combined(rule, clients(matrix))
    wanted = functional.centered_clipping(matrix, centre=first.delta.vector, tau=0.5)
    assert np.allclose(second.delta.vector, wanted, atol=1e-6)
    anew = CenteredClipping(tau=0.5)
    anew.load_state_dict(rule.state_dict())
    found = combined(anew, clients(matrix))
    assert found.delta.vector.tobytes() == second.delta.vector.tobytes()


def test_a_wrapper_keeps_what_its_rule_remembers():
    outer = NearestNeighborMixing(f=1, rule=CenteredClipping(tau=0.5))
    updates = clients(drawn(6, 4))
    outer.learn(combined(outer, updates))
    anew = NearestNeighborMixing(f=1, rule=CenteredClipping(tau=0.5))
    anew.load_state_dict(outer.state_dict())
    assert (
        combined(anew, updates).delta.vector.tobytes()
        == combined(outer, updates).delta.vector.tobytes()
    )
    plain = NearestNeighborMixing(f=1)
    plain.learn(combined(plain, updates))
    plain.load_state_dict(plain.state_dict())
    assert plain.memory() is None


def test_a_fixed_denominator_is_the_planned_cohort():
    matrix = drawn(6, 4)
    rule = CenteredClipping(f=1, tau=1e6, denominator="cohort")
    found = combined(rule, clients(matrix), planned=10).delta.vector
    assert np.allclose(found, matrix.sum(axis=0) / 10, atol=1e-6)


def test_buckets_change_from_round_to_round_and_repeat_with_the_run():
    rule, updates = Bucketing(f=0, seed=3, rule=Krum()), clients(drawn(12, 5))
    rounds = [combined(rule, updates, round=number).delta.vector.tobytes() for number in (1, 2, 1)]
    assert rounds[0] == rounds[2] != rounds[1]
