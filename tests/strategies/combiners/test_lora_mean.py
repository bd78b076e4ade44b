import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.combiners import LoraMean, Mean
from strategies.parts import covered
from strategies.protocols import Plan
from strategies.update import BUFFERS, DELTA, Layout, Update
from tests.strategies.combiners.test_mean import thousand_clients
from tests.support.adapters import RANK, federation, layout_of, part_of
from tests.support.updates import plan_of, update

LAYOUT = layout_of()
EQUAL = [part_of(LAYOUT, RANK)] * 5
UNEQUAL = [part_of(LAYOUT, rank) for rank in (1, 2, 4, 2, 0)]


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_where_all_train_everything_it_is_the_mean_bit_for_bit(weighting):
    updates = thousand_clients()
    plan = plan_of(updates[0], cohort=len(updates))
    found = []
    for rule in (LoraMean(weighting=weighting), Mean(weighting=weighting)):
        held = rule.begin(plan)
        for one in updates:
            held.add(one)
        result = held.result()
        found.append((result.delta.vector.tobytes(), result.members, result.weight))
    assert found[0] == found[1]


def test_divided_by_the_cohort_it_is_the_mean_divided_by_the_cohort():
    updates = [update([1.0, 2.0], client=1), update([4.0, 0.0], client=2)]
    for rule in (LoraMean, Mean):
        held = rule(weighting="uniform", denominator="cohort").begin(plan_of(updates[0], cohort=10))
        for one in updates:
            held.add(one)
        np.testing.assert_array_equal(held.result().delta.vector, np.float32([0.5, 0.2]))


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_each_element_is_the_mean_over_those_who_have_it(weighting):
    one = federation(UNEQUAL, LAYOUT)
    found, _ = one.combined(LoraMean(weighting=weighting))
    weights = one.weights(weighting)
    has = np.stack([covered(part, LAYOUT) for part in UNEQUAL])
    vectors = np.stack([each.delta.vector for each in one.updates]).astype(np.float64)
    wanted = (weights[:, None] * vectors).sum(0) / np.maximum(
        (weights[:, None] * has).sum(0), 1e-300
    )
    np.testing.assert_allclose(found.delta.vector, wanted, rtol=1e-6, atol=1e-7)


def test_what_nobody_trains_stays():
    one = federation([part_of(LAYOUT, 2, heads=[])] * 3, LAYOUT)
    found, _ = one.combined(LoraMean())
    views = LAYOUT.views(found.delta.vector)
    assert not views["head.weight"].any()
    assert not views["adapters.h_0_q.A.weight"][2:].any()
    assert views["adapters.h_0_q.A.weight"][:2].all()


def test_a_residual_stays_whatever_a_client_says():
    layout = layout_of(residual=2)
    one = federation([layout, layout], layout)
    found, _ = one.combined(LoraMean())
    changes = layout.views(found.delta.vector)
    assert {name for name, view in changes.items() if not view.any()} == {
        name for name in layout.names if name.startswith("residual")
    }


def test_by_head_tasks_weigh_alike_whatever_their_number_of_clients():
    layout = layout_of(heads=("heads.topic", "heads.kind"))
    topic, kind = (part_of(layout, RANK, heads=[f"heads.{task}"]) for task in ("topic", "kind"))
    one = federation([topic, topic, topic, kind], layout, weights=[1, 2, 3, 50])
    found, _ = one.combined(LoraMean(by_head=True))
    name = "adapters.h_0_q.B.weight"
    mine = [layout.views(each.delta.vector) for each in one.updates]
    of_topic = sum(w * each[name] for w, each in zip((1, 2, 3), mine[:3], strict=True)) / 6
    wanted = (of_topic + mine[3][name]) / 2
    np.testing.assert_allclose(layout.views(found.delta.vector)[name], wanted, rtol=1e-5, atol=1e-6)
    head = layout.views(found.delta.vector)["heads.kind.weight"]
    np.testing.assert_allclose(head, mine[3]["heads.kind.weight"], rtol=1e-6)


@pytest.mark.parametrize("parts", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("by_head", [False, True])
def test_the_cross_term_is_that_of_dense_matrices(parts, by_head):
    one = federation(parts, LAYOUT)
    found, held = one.combined(LoraMean(by_head=by_head))
    after = LAYOUT.views(one.sent.astype(np.float64) + found.delta.vector)
    error = size = 0.0
    for layer in one.layers:
        exact = one.mean_of(LoraMean(), layer)
        error += np.linalg.norm(exact - after[layer.b] @ after[layer.a]) ** 2
        size += np.linalg.norm(exact) ** 2
    assert held.figures() == {"lora_cross_term": pytest.approx((error / size) ** 0.5, rel=1e-5)}
    assert held.figures()["lora_cross_term"] > 0.1


def test_with_a_shared_a_the_mean_of_b_is_exact():
    """FFA-LoRA: a part without A is one in which A is frozen, as it was sent."""
    names = [name for name in LAYOUT.names if not name.endswith("A.weight")]
    shapes = dict(zip(LAYOUT.names, LAYOUT.shapes, strict=True))
    part = Layout(tuple(names), tuple(shapes[name] for name in names))
    one = federation([part] * 5, LAYOUT)
    found, held = one.combined(LoraMean())
    after = LAYOUT.views(one.sent.astype(np.float64) + found.delta.vector)
    sent = LAYOUT.views(one.sent.astype(np.float64))
    weights = one.weights() / one.weights().sum()
    for layer in one.layers:
        exact = sum(
            weight * (sent[layer.b] + LAYOUT.views(each.delta.vector)[layer.b]) @ sent[layer.a]
            for weight, each in zip(weights, one.updates, strict=True)
        )
        np.testing.assert_array_equal(after[layer.a], sent[layer.a])
        np.testing.assert_allclose(after[layer.b] @ after[layer.a], exact, rtol=1e-5, atol=1e-6)
    assert held.figures()["lora_cross_term"] < 1e-7


def test_where_a_does_not_travel_there_is_nothing_to_cross():
    layout = Layout(("adapters.q.B.weight",), ((3, 2),))
    one = federation([layout] * 2, layout)
    found, held = one.combined(LoraMean())
    assert held.figures() == {}
    assert found is not None


@pytest.mark.parametrize(
    ("rule", "changed"),
    [
        (LoraMean(report=False), {}),
        (LoraMean(), {"sent": None}),
        (LoraMean(weighting="uniform", denominator="cohort"), {}),
    ],
    ids=["asked not to", "unknown what was sent", "before noise"],
)
def test_without_a_report_the_mean_is_the_same(rule, changed):
    one = federation(EQUAL, LAYOUT)
    found, held = one.combined(rule, **changed)
    wanted, _ = one.combined(LoraMean(weighting=rule.weighting))
    assert held.figures() == {}
    assert found.delta.vector.tobytes() == wanted.delta.vector.tobytes()


def test_sums_and_stale_updates_have_no_cross_term():
    one = federation(EQUAL[:2], LAYOUT)
    first = one.updates[0]
    for changed in (
        Update(first.sections, first.weight, (0, 7), first.version),
        Update(first.sections, first.weight, (0,), first.version, {}, 0.5),
    ):
        held = LoraMean().begin(one.plan())
        held.add(changed)
        held.add(one.updates[1])
        assert held.result() is not None
        assert held.figures() == {}


def test_stale_updates_are_scaled_and_not_what_they_are_divided_by():
    first, second = update([4.0], client=0), update([2.0], client=1)
    held = LoraMean().begin(plan_of(first, cohort=2))
    held.add(Update(first.sections, 1.0, (0,), 0, {}, 0.5))
    held.add(second)
    assert held.result().delta.vector == 2.0


def test_other_sections_are_averaged_as_ever():
    updates = [
        update([1.0], weight=1, **{BUFFERS: [4]}),
        update([3.0], weight=3, client=1, **{BUFFERS: [8]}),
    ]
    held = LoraMean().begin(plan_of(updates[0], cohort=2))
    for one in updates:
        held.add(one)
    found = held.result()
    assert found.sections[BUFFERS].vector == 7
    assert list(found.sections) == list(updates[0].sections)


def test_nothing_added_is_nothing_combined():
    held = LoraMean().begin(Plan({DELTA: LAYOUT}, 3, 3))
    assert held.result() is None
    assert held.figures() == {}


@settings(max_examples=25)
@given(st.permutations(range(5)), st.booleans())
def test_the_order_of_replies_never_shows(order, by_head):
    one = federation(UNEQUAL, LAYOUT)
    rule = LoraMean(by_head=by_head)
    (wanted, first), (found, second) = one.combined(rule), one.combined(rule, order)
    assert found.delta.vector.tobytes() == wanted.delta.vector.tobytes()
    assert (found.members, found.weight) == (wanted.members, wanted.weight)
    assert second.figures() == first.figures()


@pytest.mark.parametrize("report", [True, False])
def test_updates_are_held_only_for_a_report(report):
    one = federation(EQUAL[:1], LAYOUT)
    held = LoraMean(report=report).begin(one.plan())
    held.add(one.updates[0])
    seen = weakref.ref(one.updates.pop())
    assert (seen() is not None) is report


def test_the_cohort_is_no_divisor_of_tasks():
    with pytest.raises(ValueError, match="needs by_head = False"):
        LoraMean(weighting="uniform", denominator="cohort", by_head=True)
