"""What all rules over products promise."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from strategies.combiners import (
    LoraFedEx,
    LoraPartitioned,
    LoraStack,
    LoraSvd,
    LoraZeroPad,
)
from strategies.lora import effective_rank
from strategies.protocols import Plan
from strategies.update import BUFFERS, COUNTERS, DELTA, Layout, Section, Update
from tests.support.adapters import (
    ALPHA,
    RANK,
    Federation,
    federation,
    layout_of,
    model_product,
    part_of,
    unequal,
)

PRODUCT_RULES = [
    LoraZeroPad(), LoraZeroPad(sparsity=True), LoraSvd(), LoraPartitioned(), LoraStack(alpha=ALPHA, rank=RANK),
    LoraFedEx(alpha=ALPHA, rank=RANK),
]  # fmt: skip
IDS = ["zero_pad", "sparsity", "svd", "partitioned", "stack", "fedex"]
every = pytest.mark.parametrize("rule", PRODUCT_RULES, ids=IDS)


def rotated(one: Federation, seed: int, cuts: tuple[int, ...] = (0, RANK)) -> Federation:
    """Every client's factors turned within each interval of ranks; what they mean is the same."""
    rng, updates = np.random.default_rng(seed), []
    for index, update in enumerate(one.updates):
        vector = update.delta.vector.astype(np.float64)
        views = one.layout.views(vector)
        for layer in one.layers:
            own = one.factors(index, layer)
            if own is None:
                continue
            rank = own[1].shape[0]
            turn = np.zeros((rank, rank))
            for begin, end in pairwise(cuts):
                block = slice(begin, min(end, rank))
                size = max(0, block.stop - begin)
                turn[block, block] = np.linalg.qr(rng.standard_normal((size, size)))[0]
            sent = one.layout.views(one.sent)
            views[layer.b][:, :rank] = own[0] @ turn - sent[layer.b][:, :rank]
            views[layer.a][:rank] = turn.T @ own[1] - sent[layer.a][:rank]
        section = replace(update.delta, vector=vector.astype(np.float32))
        updates.append(update.with_section(DELTA, section))
    return Federation(one.layout, one.sent, updates)


@every
def test_the_order_of_replies_never_shows(rule):
    one = unequal([1, 4, 2, 0, 3])
    wanted, first = one.combined(rule)
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        found, second = one.combined(rule, order)
        assert found.delta.vector.tobytes() == wanted.delta.vector.tobytes()
        assert (found.members, found.weight, found.version) == (tuple(range(5)), wanted.weight, 3)
        assert second.figures() == first.figures()


@every
def test_what_is_no_factor_is_the_mean_over_those_who_have_it(rule):
    layout = layout_of(residual=2, heads=("heads.topic", "heads.kind"))
    topic, kind = (part_of(layout, 2, heads=[f"heads.{task}"]) for task in ("topic", "kind"))
    one = federation([topic, kind, topic], layout, weights=[1, 5, 3])
    found, _ = one.combined(rule)
    views, mine = (
        layout.views(found.delta.vector),
        [layout.views(u.delta.vector) for u in one.updates],
    )
    name = "heads.topic.weight"
    np.testing.assert_allclose(views[name], (mine[0][name] + 3 * mine[2][name]) / 4, atol=1e-6)
    np.testing.assert_allclose(views["heads.kind.bias"], mine[1]["heads.kind.bias"], atol=1e-6)


@every
def test_a_layer_that_nobody_trains_stays_and_who_lacks_it_does_not_count(rule):
    layout = layout_of(["q", "k", "v"], residual=2)
    parts = [
        part_of(layout, {"q": 3, "k": 0}),
        part_of(layout, {"q": 2}),
        part_of(layout, {"k": 2}),
    ]
    one = federation(parts, layout)
    found, _ = one.combined(rule)
    views = layout.views(found.delta.vector)
    for layer in one.layers:
        for name in layer.names:
            if layer.name == "v":
                assert not views[name].any()
    alone, _ = Federation(layout, one.sent, one.updates[:2]).combined(rule)
    for name in one.layers[0].names:
        np.testing.assert_allclose(views[name], layout.views(alone.delta.vector)[name], atol=1e-5)


@pytest.mark.parametrize(
    "rule", [LoraSvd(), LoraStack(alpha=ALPHA, rank=RANK)], ids=["svd", "stack"]
)
def test_a_clients_basis_does_not_show(rule):
    one = unequal([1, 2, 4, 3], residual=9)
    (first, _), (second, _) = one.combined(rule), rotated(one, 1).combined(rule)
    for layer in one.layers:
        ours, theirs = (model_product(one.after(each), layer) for each in (first, second))
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_for_partitioned_a_rotation_within_an_interval_of_ranks_does_not_show():
    one = unequal([2, 2, 4])
    (first, _), (same, _), (across, _) = (
        each.combined(LoraPartitioned())
        for each in (one, rotated(one, 1, (0, 2, 4)), rotated(one, 1))
    )
    products = [
        one.after(each)[one.layers[0].b] @ one.after(each)[one.layers[0].a]
        for each in (first, same, across)
    ]
    np.testing.assert_allclose(products[1], products[0], atol=1e-4)
    assert np.abs(products[2] - products[0]).max() > 0.05


@every
def test_a_change_of_the_residual_is_nobodys_to_send(rule):
    one = unequal([2, 3])
    wanted, _ = one.combined(rule)
    lies = []
    for update in one.updates:
        vector = update.delta.vector.copy()
        for name, view in one.layout.views(vector).items():
            if name.startswith("residual"):
                view += 100
        lies.append(update.with_section(DELTA, replace(update.delta, vector=vector)))
    found, _ = Federation(one.layout, one.sent, lies).combined(rule)
    assert found.delta.vector.tobytes() == wanted.delta.vector.tobytes()


@every
def test_by_head_a_task_weighs_as_much_as_another(rule):
    layout = layout_of(residual=2, heads=("heads.topic", "heads.kind"))
    topic, kind = (part_of(layout, 2, heads=[f"heads.{task}"]) for task in ("topic", "kind"))
    one = federation([topic, topic, kind], layout, weights=[1, 3, 40])
    alike = federation([topic, topic, kind], layout, weights=[1, 3, 4])
    (found, _), (wanted, _) = one.combined(replace(rule, by_head=True)), alike.combined(rule)
    np.testing.assert_allclose(found.delta.vector, wanted.delta.vector, atol=1e-4)


@every
def test_the_effective_rank_is_that_of_what_the_model_has(rule):
    one = unequal([4, 4, 3])
    found, held = one.combined(rule)
    after, ranks = one.after(found), []
    for layer in one.layers:
        whole = model_product(after, layer)
        if not rule.needs_residual:
            whole = after[layer.b] @ after[layer.a]
        ranks.append(effective_rank(np.linalg.svd(whole)[1]))
    assert held.figures()["lora_rank"] == pytest.approx(np.mean(ranks), rel=1e-3)


@every
def test_other_sections_are_combined_as_by_the_mean(rule):
    one = unequal([4, 2])
    flat = Layout(("s",), ((2,),))
    updates = [
        update.with_section(BUFFERS, Section(np.float32([i, 2]), flat)).with_section(
            COUNTERS, Section(np.float32([i, 9 - i]), flat)
        )
        for i, update in enumerate(one.updates)
    ]
    layouts = {BUFFERS: flat, DELTA: one.layout, COUNTERS: flat}
    held = rule.begin(Plan(layouts, 2, 2, sent=one.sent))
    for update in updates:
        held.add(update)
    found = held.result()
    assert list(found.sections) == list(layouts)
    share = one.weights()[1] / one.weights().sum()
    np.testing.assert_allclose(found.sections[BUFFERS].vector, [share, 2], rtol=1e-6)
    np.testing.assert_array_equal(found.sections[COUNTERS].vector, [1, 9])
    wanted, _ = one.combined(rule)
    assert found.delta.vector.tobytes() == wanted.delta.vector.tobytes()


@every
def test_nothing_added_is_nothing_combined(rule):
    held = rule.begin(unequal([2]).plan())
    assert held.result() is None
    assert held.figures() == {}


@every
def test_without_factors_or_what_was_sent_there_is_nothing_to_work_on(rule):
    one = unequal([2])
    with pytest.raises(ValueError, match="there are no parameters that were sent"):
        rule.begin(one.plan(sent=None))
    flat = Layout(("w",), ((3,),))
    with pytest.raises(ValueError, match="there are no factors A and B"):
        rule.begin(Plan({DELTA: flat}, 1, 1, sent=np.zeros(3, np.float32)))


def test_a_client_that_trains_everything_needs_no_part():
    layout = layout_of()
    whole = federation([None, None], layout)
    parts = [
        Update(
            {DELTA: replace(u.delta, part=part_of(layout, RANK))}, u.weight, u.members, u.version
        )
        for u in whole.updates
    ]
    (first, _), (second, _) = (
        each.combined(LoraSvd()) for each in (whole, Federation(layout, whole.sent, parts))
    )
    assert first.delta.vector.tobytes() == second.delta.vector.tobytes()
