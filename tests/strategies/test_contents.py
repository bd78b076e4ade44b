"""What a sum holds: the weighted mean comes back, numbers are within their ranges, and a wrong sum is noticed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.contents import FIXED_POINT_ERROR, SATURATED, Contents
from strategies.secagg.fixed_point import FixedPoint
from strategies.secagg.masking import room
from strategies.update import CONTROL, DELTA, Layout, Section, Update
from strategies.wire import Refused
from tests.support.updates import flat, update

ODD = st.sampled_from([np.nan, np.inf, -np.inf, 1e300, -1e300])


def contents(
    size: int = 3, max_weight: float | None = None, metrics=("loss",), limit=10.0
) -> Contents:
    return Contents({DELTA: flat(size)}, metrics, limit, max_weight)


def summed(one: Contents, updates, saturated: int = 0):
    """Exact sums of vectors and tails, as a ring without rounding would give them."""
    sums = np.zeros(one.size)
    for client in updates:
        for place, vector in one.vectors(client):
            sums[place] += one.factor(client) * vector.astype(np.float64)
    tail = sum(one.tail(client, saturated) for client in updates)
    return sums, tail


@given(data=st.data())
def test_the_weighted_mean_comes_back(data):
    size, members = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    most = data.draw(st.none() | st.integers(1, 50).map(float))
    rows = st.lists(st.floats(-5, 5, width=32), min_size=size, max_size=size)
    losses = st.floats(-10, 10)
    updates = [
        update(
            data.draw(rows),
            weight=float(data.draw(st.integers(1, 80))),
            client=client,
            metrics={"loss": data.draw(losses)},
        )
        for client in range(members)
    ]
    one = contents(size, most)
    found = one.update(*summed(one, updates), tuple(range(members)), 4)
    weights = np.array([1.0 if most is None else min(u.weight, most) for u in updates])
    exact = np.average(
        [u.delta.vector.astype(np.float64) for u in updates], axis=0, weights=weights
    )
    np.testing.assert_allclose(found.delta.vector, exact, rtol=1e-6, atol=1e-6)
    loss = np.average([u.metrics["loss"] for u in updates], weights=weights)
    assert found.metrics["loss"] == pytest.approx(loss, abs=1e-12 * 10)
    assert found.weight == pytest.approx(weights.sum(), rel=1e-12)
    assert (found.members, found.version) == (tuple(range(members)), 4)
    assert found.delta.layout == one.layouts[DELTA]


@given(data=st.data())
def test_the_mean_is_within_its_bound_of_the_exact_one(data):
    """n members through the ring: |error| ≤ (n / 2³²)·C·w_max / mean(w), weights being whole numbers."""
    members = data.draw(st.integers(1, 200), "members")
    present = data.draw(st.integers(1, min(members, 12)), "present")
    limit = data.draw(st.sampled_from([2.0**-10, 1.0, 50.0]), "limit")
    most = data.draw(st.integers(1, 1000), "most")
    weights = [data.draw(st.integers(1, most)) for _ in range(present)]
    rows = st.lists(st.floats(-limit, limit, width=32), min_size=3, max_size=3)
    one = contents(3, float(most))
    coding, steps = room(members, limit, 0.0, most)
    total, tail = np.zeros(3, np.uint32), np.zeros(one.tail_size, np.int64)
    updates = [update(data.draw(rows), weight=float(weight)) for weight in weights]
    for client in updates:
        out = np.empty(3, np.uint32)
        coding.encode(client.delta.vector, out, factor=one.factor(client))
        total += out
        tail += np.rint(one.tail(client, 0) * steps).astype(np.int64)
    sums = coding.decode(total)
    divisor = float(tail[-2] / steps)
    assert divisor * most == pytest.approx(sum(weights), rel=1e-15)
    exact = np.average(
        [u.delta.vector.astype(np.float64) for u in updates], axis=0, weights=weights
    )
    spread = most / float(np.mean(weights))
    error = np.abs(sums / divisor - exact).max()
    assert error <= FixedPoint(limit, members).error(spread)
    # The closed form, with what float64 and the ring's whole steps add to it.
    assert error <= members / 2**32 * limit * spread * (1 + 1e-4)
    assert one.update(sums, tail / steps, tuple(range(present)), 0).weight == sum(weights)


@pytest.mark.parametrize(
    ("weight", "most", "factor"), [(5, None, 1), (5, 10, 0.5), (10, 10, 1), (99, 10, 1)]
)
def test_no_weight_counts_more_than_the_largest(weight, most, factor):
    assert contents(max_weight=most).factor(update(weight=weight)) == factor


@pytest.mark.parametrize("weight", [0.0, 0.5, -3.0, np.nan])
def test_a_weight_below_one_makes_no_contribution(weight):
    with pytest.raises(Refused, match="num_examples"):
        contents(1, 10.0).factor(update(weight=weight))


@given(st.dictionaries(st.sampled_from(["loss", "accuracy", "other"]), ODD | st.floats(-5, 5)))
def test_no_metric_leaves_its_range(metrics):
    """NaN, infinities and what is missing count as 0; the rest is cut at the limit."""
    one = contents(metrics=("accuracy", "loss"), limit=2.0)
    tail = one.tail(update(metrics=metrics), 1)
    assert np.isfinite(tail).all()
    assert np.abs(tail).max() <= 1
    for place, name in enumerate(one.metrics):
        value = metrics.get(name, 0.0)
        expected = np.clip(value / 2.0, -1, 1) if np.isfinite(value) else 0.0
        assert tail[place] == expected
    assert tail[2] == pytest.approx(1 / 3)
    assert tuple(tail[3:]) == (1, 1)


@pytest.mark.parametrize(
    ("tail", "most"),
    [
        ([0, 0, 3, 2], None),  # three are said to be there, two are counted
        ([0, 0, 3, 4], 9.0),
        ([0, 0, 2, 3.6], 9.0),
        ([0, 0, 0, 3], 9.0),
        ([0, 0, -1, 3], 9.0),
        ([0, 0, 3.6, 3], 9.0),
    ],
)
def test_a_sum_that_is_not_that_of_so_many_is_refused(tail, most):
    with pytest.raises(Refused, match="corrupt: the sum of 3 clients counts"):
        contents(2, most).update(np.zeros(2), np.array(tail, float), (0, 1, 2), 0)


def test_sections_stand_in_the_order_of_their_names():
    layouts = {DELTA: flat(2), CONTROL: flat(1, "c")}
    one = Contents(layouts, (), 1.0, None)
    sections = {DELTA: Section(np.array([1, 2], np.float32), flat(2)),
                CONTROL: Section(np.array([7], np.float32), flat(1, "c"))}  # fmt: skip
    client = Update(sections, 1.0, (0,), 0)
    assert [(place, list(vector)) for place, vector in one.vectors(client)] == [
        (slice(0, 1), [7]), (slice(1, 3), [1, 2]),
    ]  # fmt: skip
    sums, tail = summed(one, [client, client])
    back = one.update(sums, tail, (0, 1), 0)
    assert {name: list(s.vector) for name, s in back.sections.items()} == {
        CONTROL: [7],
        DELTA: [1, 2],
    }


def test_other_sections_or_layouts_than_the_servers_are_refused():
    with pytest.raises(Refused, match=r"missing: sections \['control', 'delta'\] were made"):
        list(contents(1).vectors(update([1.0], **{CONTROL: [2.0]})))
    other = Layout(("v",), ((3,),))
    wrong = Update({DELTA: Section(np.zeros(3, np.float32), other)}, 1.0, (0,), 0)
    with pytest.raises(Refused, match="shape: section 'delta' is laid out otherwise"):
        list(contents(3).vectors(wrong))


def test_the_expected_error_is_told_relative_to_the_mean():
    one = contents(4)
    sums, tail = summed(one, [update([3.0, 0, 0, 4.0], client=c) for c in range(9)])
    found = one.update(sums, tail, tuple(range(9)), 0, noise=0.01)
    # √(9·4) elements' errors of 0.01, over Σf = 9, beside a mean of length 5.
    assert found.metrics[FIXED_POINT_ERROR] == pytest.approx(0.01 * 6 / 9 / 5)
    assert found.metrics[SATURATED] == 0


def test_a_mean_of_zero_has_no_relative_error():
    one = contents(2)
    sums, tail = summed(one, [update([0.0, 0.0])])
    assert one.update(sums, tail, (0,), 0, noise=0.01).metrics[FIXED_POINT_ERROR] == 0
