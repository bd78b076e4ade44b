"""Rules over products, against dense float64 arithmetic."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.combiners import (
    LoraFedEx,
    LoraMean,
    LoraPartitioned,
    LoraStack,
    LoraSvd,
    LoraZeroPad,
)
from strategies.lora import effective_rank
from strategies.protocols import Plan
from strategies.update import BUFFERS, COUNTERS, DELTA, Layout, Section, Update
from tests.support.adapters import RANK, Federation, M, N, federation, layout_of, part_of

ALPHA = 6.0
PRODUCT_RULES = [
    LoraZeroPad(), LoraZeroPad(sparsity=True), LoraSvd(), LoraPartitioned(), LoraStack(alpha=ALPHA),
    LoraFedEx(alpha=ALPHA),
]  # fmt: skip
IDS = ["zero_pad", "sparsity", "svd", "partitioned", "stack", "fedex"]
every = pytest.mark.parametrize("rule", PRODUCT_RULES, ids=IDS)

ranks_of_clients = st.lists(st.integers(0, RANK), min_size=1, max_size=5).filter(any)


def unequal(ranks, *, residual: int = 3, seed: int = 0) -> Federation:
    layout = layout_of(residual=residual)
    return federation([part_of(layout, rank) for rank in ranks], layout, seed=seed)


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def model_product(one: Federation, views, layer) -> np.ndarray:
    """s·B·A + left·right, dense."""
    product = ALPHA / layer.rank * views[layer.b] @ views[layer.a]
    return product + views[layer.left] @ views[layer.right]


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


@settings(max_examples=30)
@given(ranks_of_clients, st.integers(0, 100), st.sampled_from(["examples", "uniform"]))
def test_svd_is_the_best_of_the_dense_mean_product_at_every_rank(ranks, seed, weighting):
    one = unequal(ranks, seed=seed)
    found, held = one.combined(LoraSvd(weighting=weighting))
    after, error, size = one.after(found), 0.0, 0.0
    for layer in one.layers:
        exact = one.mean_product(layer, one.weights(weighting))
        for rank in range(RANK + 1):
            block = after[layer.b][:, :rank] @ after[layer.a][:rank]
            wanted = np.linalg.norm(exact - best(exact, rank))
            assert np.linalg.norm(exact - block) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        error += np.linalg.norm(exact - best(exact, RANK)) ** 2
        size += np.linalg.norm(exact) ** 2
    assert held.figures()["lora_error"] == pytest.approx((error / size) ** 0.5, rel=1e-6, abs=1e-7)


def test_svd_leaves_ranks_that_have_nothing_so_that_they_can_be_trained():
    """B's columns 0 and A's rows not: the product is exact, and B has a gradient."""
    one = unequal([2])
    found, held = one.combined(LoraSvd())
    after = one.after(found)
    for layer in one.layers:
        exact = one.mean_product(layer)
        np.testing.assert_allclose(after[layer.b] @ after[layer.a], exact, atol=1e-5)
        assert np.abs(after[layer.b][:, 2:]).max() < 1e-6
        assert (np.abs(after[layer.a][2:]).max(axis=1) > 0.01).all()
        assert np.abs(after[layer.a][2:]).max() <= 1 / np.sqrt(N)
    assert held.figures()["lora_error"] < 1e-12
    again, _ = one.combined(LoraSvd())
    assert again.delta.vector.tobytes() == found.delta.vector.tobytes()
    other, _ = one.combined(LoraSvd(), round=2)
    assert other.delta.vector.tobytes() != found.delta.vector.tobytes()


def test_svd_at_random_comes_near_the_exact_one():
    one = unequal([4, 3, 2, 4, 1])
    exact, first = one.combined(LoraSvd(svd="exact"))
    random, second = one.combined(LoraSvd(svd="randomized"))
    np.testing.assert_allclose(random.delta.vector, exact.delta.vector, atol=1e-3)
    assert second.figures()["lora_error"] == pytest.approx(first.figures()["lora_error"], rel=1e-4)


@settings(max_examples=30)
@given(ranks_of_clients, st.integers(0, 100))
def test_partitioned_averages_each_rank_over_those_who_have_it(ranks, seed):
    one = unequal(ranks, seed=seed)
    found, held = one.combined(LoraPartitioned())
    after, weights, error, size = one.after(found), one.weights(), 0.0, 0.0
    for layer in one.layers:
        exact = np.zeros((M, N))
        for k in range(max(ranks)):
            has = [index for index, rank in enumerate(ranks) if rank > k]
            for index in has:
                b, a = one.factors(index, layer)
                exact += weights[index] / weights[has].sum() * np.outer(b[:, k], a[k])
        np.testing.assert_allclose(after[layer.b] @ after[layer.a], best(exact, RANK), atol=2e-4)
        error += np.linalg.norm(exact - best(exact, RANK)) ** 2
        size += np.linalg.norm(exact) ** 2
    assert held.figures()["lora_error"] == pytest.approx((error / size) ** 0.5, rel=1e-6, abs=1e-7)


def test_with_equal_ranks_partitioned_is_svd():
    one = unequal([3, 3, 3])
    (first, _), (second, _) = one.combined(LoraSvd()), one.combined(LoraPartitioned())
    np.testing.assert_allclose(first.delta.vector, second.delta.vector, atol=1e-5)


def collapse(rule, rounds: int) -> list[float]:
    """Rounds in which nobody changes anything, one client of four of full rank: the norm of ranks 3 and 4, relative."""
    layout = layout_of(["q"])
    ranks = (2, 2, 2, 4)
    one = federation([part_of(layout, rank) for rank in ranks], layout, weights=[1] * 4)
    sent, norms = one.sent, []
    for number in range(rounds + 1):
        views = layout.views(sent.astype(np.float64))
        layer = one.layers[0]
        s = np.linalg.svd(views[layer.b] @ views[layer.a])[1]
        norms.append(float(np.linalg.norm(s[2:])))
        still = [
            replace(u, sections={DELTA: replace(u.delta, vector=np.zeros_like(sent))})
            for u in one.updates
        ]
        found, _ = Federation(layout, sent, still).combined(rule, round=number + 1)
        # All clients of rank 2 hold the same leading block: nothing in them pulls ranks 3 and 4 down.
        sent = (sent.astype(np.float64) + found.delta.vector).astype(np.float32)
    return [norm / norms[1] for norm in norms[1:]]


def test_ranks_that_few_have_collapse_under_svd_and_not_when_partitioned():
    """Nobody trains: over all, ranks that a quarter has shrink to a quarter each round; partitioned, not."""
    assert collapse(LoraSvd(weighting="uniform"), 4) == pytest.approx(
        [4.0**-k for k in range(4)], rel=1e-3
    )
    assert collapse(LoraPartitioned(weighting="uniform"), 4) == pytest.approx([1.0] * 4, rel=1e-3)


@settings(max_examples=30)
@given(ranks_of_clients, st.integers(0, 100), st.booleans())
def test_zero_padded_factors_are_averaged_with_their_zeros(ranks, seed, sparsity):
    one = unequal(ranks, seed=seed)
    found, held = one.combined(LoraZeroPad(sparsity=sparsity))
    after, error, size = one.after(found), 0.0, 0.0
    for layer in one.layers:
        own = {index: one.factors(index, layer) for index, rank in enumerate(ranks) if rank}
        weights = np.array([one.weights()[index] for index in own])
        if sparsity:
            weights = np.array([np.linalg.norm(b @ a) for b, a in own.values()])
        weights = weights / weights.sum()
        pads = [RANK - b.shape[1] for b, _ in own.values()]
        b = sum(
            w * np.pad(f[0], ((0, 0), (0, p)))
            for w, f, p in zip(weights, own.values(), pads, strict=True)
        )
        a = sum(
            w * np.pad(f[1], ((0, p), (0, 0)))
            for w, f, p in zip(weights, own.values(), pads, strict=True)
        )
        np.testing.assert_allclose(after[layer.b], b, atol=1e-5)
        np.testing.assert_allclose(after[layer.a], a, atol=1e-5)
        exact = sum(w * f[0] @ f[1] for w, f in zip(weights, own.values(), strict=True))
        error += np.linalg.norm(exact - b @ a) ** 2
        size += np.linalg.norm(exact) ** 2
    assert held.figures()["lora_error"] == pytest.approx((error / size) ** 0.5, rel=1e-5, abs=1e-7)


def test_products_that_are_all_zero_weigh_as_without_sparsity():
    layout = layout_of(["q"])
    one = federation([part_of(layout, 2)] * 2, layout)
    b = layout.offsets[1]
    for update in one.updates:
        update.delta.vector[b : layout.offsets[2]] = -one.sent[b : layout.offsets[2]]
    (plain, _), (sparse, _) = one.combined(LoraZeroPad()), one.combined(LoraZeroPad(sparsity=True))
    np.testing.assert_array_equal(plain.delta.vector, sparse.delta.vector)


@pytest.mark.parametrize(
    "rule", [LoraStack(alpha=ALPHA), LoraFedEx(alpha=ALPHA)], ids=["stack", "fedex"]
)
@settings(max_examples=30)
@given(ranks=ranks_of_clients, seed=st.integers(0, 100), q=st.integers(1, 9))
def test_the_model_is_the_mean_of_the_clients_models_but_for_what_q_cuts_off(rule, ranks, seed, q):
    one = unequal(ranks, residual=q, seed=seed)
    found, held = one.combined(rule)
    after, sent = one.after(found), one.layout.views(one.sent.astype(np.float64))
    error = size = 0.0
    for layer in one.layers:
        exact = ALPHA / RANK * one.mean_product(layer) + sent[layer.left] @ sent[layer.right]
        adapter = ALPHA / RANK * after[layer.b] @ after[layer.a]
        rest = exact - adapter
        wanted = np.linalg.norm(rest - best(rest, q))
        scale = np.linalg.norm(exact) + np.linalg.norm(adapter)
        assert np.linalg.norm(exact - model_product(one, after, layer)) == pytest.approx(
            wanted, abs=1e-5 * scale
        )
        error, size = error + wanted**2, size + np.linalg.norm(exact) ** 2
    assert held.figures()["lora_error"] == pytest.approx((error / size) ** 0.5, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "rule", [LoraStack(alpha=ALPHA), LoraFedEx(alpha=ALPHA)], ids=["stack", "fedex"]
)
def test_where_q_has_room_nothing_is_lost(rule):
    one = unequal([1, 2, 4], residual=7)
    found, held = one.combined(rule)
    after, sent = one.after(found), one.layout.views(one.sent.astype(np.float64))
    assert held.figures()["lora_error"] < 1e-12
    for layer in one.layers:
        exact = ALPHA / RANK * one.mean_product(layer) + sent[layer.left] @ sent[layer.right]
        np.testing.assert_allclose(model_product(one, after, layer), exact, atol=1e-4)


def test_stack_begins_adapters_anew_each_round():
    one = unequal([1, 2, 4])
    (first, _), (again, _), (other, _) = (
        one.combined(LoraStack(), round=number) for number in (1, 1, 2)
    )
    assert first.delta.vector.tobytes() == again.delta.vector.tobytes()
    layer = one.layers[0]
    views = (
        one.after(first),
        one.after(other),
        one.after(one.combined(LoraStack(seed=5), round=1)[0]),
    )
    for view in views:
        assert np.abs(view[layer.b]).max() < 1e-6
        assert 0.5 / np.sqrt(N) < np.abs(view[layer.a]).max() <= (1 + 1e-6) / np.sqrt(N)
        assert np.linalg.matrix_rank(view[layer.a]) == RANK
    assert len({np.round(view[layer.a], 5).tobytes() for view in views}) == 3


def test_fedex_averages_each_rank_over_those_who_have_it_and_leaves_the_others():
    one = unequal([1, 2, 2])
    (found, _), (mean, _) = one.combined(LoraFedEx(alpha=ALPHA)), one.combined(LoraMean())
    for layer in one.layers:
        for name in (layer.a, layer.b):
            ours, theirs = (one.layout.views(each.delta.vector)[name] for each in (found, mean))
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


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


@pytest.mark.parametrize("rule", [LoraSvd(), LoraStack(alpha=ALPHA)], ids=["svd", "stack"])
def test_a_clients_basis_does_not_show(rule):
    one = unequal([1, 2, 4, 3], residual=9)
    (first, _), (second, _) = one.combined(rule), rotated(one, 1).combined(rule)
    for layer in one.layers:
        ours, theirs = (model_product(one, one.after(each), layer) for each in (first, second))
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
        whole = model_product(one, after, layer)
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


@pytest.mark.parametrize("rule", [LoraStack(), LoraFedEx()], ids=["stack", "fedex"])
def test_without_a_residual_what_is_left_over_has_no_place(rule):
    one = unequal([2], residual=0)
    with pytest.raises(ValueError, match=r"h_0_q, h_1_v has not: set model.residual_rank"):
        rule.begin(one.plan())


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
