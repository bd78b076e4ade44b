import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.combiners import Mean
from strategies.contract import Claim
from strategies.server_models import SGD, ServerModel
from strategies.update import BUFFERS, COUNTERS, DELTA, Update
from tests.strategies.combiners.test_summation import wide_values
from tests.support.updates import plan_of, update

WEIGHTINGS = ["examples", "uniform"]


def combine(mean: Mean, updates: list[Update]) -> Update:
    accumulator = mean.begin(plan_of(updates[0], cohort=len(updates)))
    for one in updates:
        accumulator.add(one)
    result = accumulator.result()
    assert result is not None
    return result


def thousand_clients(size: int = 50) -> list[Update]:
    values = wide_values(1000, size, seed=5)
    weights = np.random.default_rng(6).integers(1, 100_000, 1000)
    pairs = zip(values, weights, strict=True)
    return [
        update(row, weight=float(weight), client=index) for index, (row, weight) in enumerate(pairs)
    ]


def test_by_examples_a_client_counts_as_often_as_it_has_examples():
    result = combine(Mean(), [update([1, 0], weight=1), update([5, 4], weight=3, client=1)])
    np.testing.assert_array_equal(result.delta.vector, [4, 3])


def test_uniformly_every_client_counts_once():
    mean = Mean(weighting="uniform")
    result = combine(mean, [update([1, 0], weight=1), update([5, 4], weight=999, client=1)])
    np.testing.assert_array_equal(result.delta.vector, [3, 2])


def test_the_mean_knows_its_members_their_examples_and_their_version():
    updates = [update([1], weight=10.0 + client, client=client, version=4) for client in (7, 2, 5)]
    result = combine(Mean(), updates)
    assert result.members == (2, 5, 7)
    assert result.weight == 17 + 12 + 15
    assert result.version == 4
    assert result.metrics == {}


def test_nothing_added_is_nothing_combined():
    assert Mean().begin(plan_of(update([1, 2]), cohort=5)).result() is None


def test_counters_take_the_largest_increase_and_never_go_back():
    updates = [
        update([0], weight=1e6, **{COUNTERS: [3, -9]}),
        update([0], client=1, **{COUNTERS: [8, -1]}),
    ]
    np.testing.assert_array_equal(combine(Mean(), updates).sections[COUNTERS].vector, [8, 0])


def test_float_buffers_are_averaged_like_the_parameters():
    updates = [
        update([0], weight=1, **{BUFFERS: [4]}),
        update([0], weight=3, client=1, **{BUFFERS: [8]}),
    ]
    assert combine(Mean(), updates).sections[BUFFERS].vector == 7


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_error_of_a_thousand_clients_is_that_of_one_float32_rounding(weighting):
    updates = thousand_clients()
    found = combine(Mean(weighting=weighting), updates).delta.vector
    weights = [one.weight if weighting == "examples" else 1.0 for one in updates]
    for column in range(len(found)):
        terms = [
            weight * float(one.delta.vector[column])
            for weight, one in zip(weights, updates, strict=True)
        ]
        exact = math.fsum(terms) / math.fsum(weights)
        scale = math.fsum(map(abs, terms)) / math.fsum(weights)
        assert abs(float(found[column]) - exact) <= 2.0**-23 * abs(exact)
        assert abs(float(found[column]) - exact) / scale < 1e-6


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_thousand_clients_in_any_order_give_the_same_bits(weighting):
    updates = thousand_clients()
    forwards = combine(Mean(weighting=weighting), updates)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(updates))
        shuffled = combine(Mean(weighting=weighting), [updates[index] for index in order])
        assert shuffled.delta.vector.tobytes() == forwards.delta.vector.tobytes()
        assert (shuffled.members, shuffled.weight) == (forwards.members, forwards.weight)


@given(
    st.lists(
        st.tuples(
            st.lists(st.floats(-1e10, 1e10, width=32), min_size=3, max_size=3), st.floats(1, 1e6)
        ),
        min_size=1,
        max_size=10,
    ),
    st.sampled_from(WEIGHTINGS),
    st.randoms(use_true_random=False),
)
def test_the_order_of_clients_never_shows_even_with_fractional_weights(clients, weighting, random):
    updates = [
        update(values, weight=weight, client=index, **{COUNTERS: values})
        for index, (values, weight) in enumerate(clients)
    ]
    forwards = combine(Mean(weighting=weighting), updates)
    random.shuffle(updates)
    backwards = combine(Mean(weighting=weighting), updates)
    for name in (DELTA, COUNTERS):
        assert backwards.sections[name].vector.tobytes() == forwards.sections[name].vector.tobytes()
    assert backwards.weight == forwards.weight


@given(st.lists(st.floats(-1e10, 1e10, width=32), min_size=1), st.integers(1, 20))
def test_equal_clients_have_themselves_for_a_mean(values, count):
    updates = [update(values, weight=3.0 + client, client=client) for client in range(count)]
    np.testing.assert_array_equal(combine(Mean(), updates).delta.vector, np.float32(values))


def test_the_largest_values_that_admission_lets_in_do_not_overflow():
    updates = [update([1e10, -1e10], weight=1e6, client=client) for client in range(100)]
    np.testing.assert_array_equal(combine(Mean(), updates).delta.vector, np.float32([1e10, -1e10]))


def test_memory_does_not_grow_with_the_number_of_clients():
    def peak(clients: int) -> int:
        vector = np.ones(100_000, np.float32)
        tracemalloc.start()
        accumulator = Mean().begin(plan_of(update(vector), cohort=clients))
        for client in range(clients):
            accumulator.add(update(vector, client=client))
        accumulator.result()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(10), peak(1000)
    assert many - few < 100_000 * 4, "990 more clients cost less than one vector"


def test_a_thousand_rounds_do_not_drift_where_float32_does():
    rng = np.random.default_rng(7)
    start = rng.normal(0, 1, 100).astype(np.float32)
    model = ServerModel({"w": start}, SGD())
    in_float32, deltas = start.copy(), []
    for number in range(1000):
        updates = [
            update(rng.normal(1e-5, 1e-4, 100), weight=1.0 + client, client=client, version=number)
            for client in range(3)
        ]
        aggregate = combine(Mean(), updates)
        model.apply(aggregate)
        in_float32 += aggregate.delta.vector
        deltas.append(aggregate.delta.vector.astype(np.float64))
    exact = np.array(
        [math.fsum([float(a), *b]) for a, b in zip(start, np.array(deltas).T, strict=True)]
    )
    assert np.abs(model.parameters - exact).max() < 1e-13
    assert np.abs(in_float32 - exact).max() > 1e-6
    np.testing.assert_array_equal(model.view()["w"], exact.astype(np.float32))


def test_a_uniform_mean_of_clipped_updates_has_the_sensitivity_c_over_the_cohort():
    claim = Claim(cohort=50, bounds={DELTA: 2.0}, set_by={"cohort": "Uniform"})
    assert Mean(weighting="uniform", denominator="cohort").check(claim).sensitivity == 2.0 / 50


@pytest.mark.parametrize(
    ("mean", "claim"),
    [
        (Mean(), Claim(cohort=50, bounds={DELTA: 2.0})),
        (Mean(weighting="uniform"), Claim(cohort=50, bounds={DELTA: 2.0})),
        (Mean(weighting="uniform", denominator="cohort"), Claim(cohort=50)),
        (Mean(weighting="uniform", denominator="cohort"), Claim(bounds={DELTA: 2.0})),
        (
            Mean(weighting="uniform", denominator="cohort"),
            Claim(cohort=50, bounds={DELTA: 2.0}, sections=frozenset({DELTA, "control"})),
        ),
    ],
    ids=[
        "by examples",
        "over replies",
        "not clipped",
        "no planned cohort",
        "one section not clipped",
    ],
)
def test_any_other_mean_has_no_sensitivity(mean, claim):
    assert mean.check(claim).sensitivity is None


def test_the_joint_sensitivity_of_two_clipped_sections_is_their_root_sum_of_squares():
    claim = Claim(
        cohort=10, bounds={DELTA: 3.0, "control": 4.0}, sections=frozenset({DELTA, "control"})
    )
    assert Mean(weighting="uniform", denominator="cohort").check(
        claim
    ).sensitivity == pytest.approx(5.0 / 10)


def test_a_mean_leaves_its_updates_as_they_were():
    one = update([1, 2], weight=3)
    one.sections[DELTA].vector.flags.writeable = False
    combine(Mean(), [one, update([3, 4], client=1)])
    np.testing.assert_array_equal(one.delta.vector, [1, 2])


def test_a_cohort_for_denominator_does_not_depend_on_who_replies():
    mean = Mean(weighting="uniform", denominator="cohort")
    accumulator = mean.begin(plan_of(update([0.0]), cohort=10))
    for client in range(4):
        accumulator.add(update([5.0], client=client))
    np.testing.assert_array_equal(accumulator.result().delta.vector, [2.0])


def test_the_cohort_is_no_denominator_of_weights_by_examples():
    with pytest.raises(ValueError, match="uniform"):
        Mean(denominator="cohort")
