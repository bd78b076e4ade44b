"""Each rule over products, against dense float64 arithmetic."""

from dataclasses import replace

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
from strategies.lora import Layer
from strategies.update import DELTA
from tests.support.adapters import (
    ALPHA,
    RANK,
    Federation,
    N,
    federation,
    layout_of,
    model_product,
    part_of,
    unequal,
)

ranks_of_clients = st.lists(st.integers(0, RANK), min_size=1, max_size=5).filter(any)


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def unheld(one: Federation, layer: Layer, ranks: list[int]) -> np.ndarray:
    """The product of ranks that none of these clients has, as it was sent, dense."""
    sent, top = one.layout.views(one.sent.astype(np.float64)), max(ranks)
    return sent[layer.b][:, top:] @ sent[layer.a][top:]


@settings(max_examples=30)
@given(ranks_of_clients, st.integers(0, 100), st.sampled_from(["examples", "uniform"]))
def test_svd_is_the_best_of_the_dense_mean_product_at_every_rank(ranks, seed, weighting):
    one = unequal(ranks, seed=seed)
    found, held = one.combined(LoraSvd(weighting=weighting))
    after, error, size = one.after(found), 0.0, 0.0
    for layer in one.layers:
        exact = one.mean_product(layer, one.weights(weighting)) + unheld(one, layer, ranks)
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
    for layer in one.layers:  # as B begins: nobody has trained ranks 3 and 4 yet
        one.layout.views(one.sent)[layer.b][:, 2:] = 0
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
        exact = unheld(one, layer, ranks)
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
        sent, top = one.layout.views(one.sent.astype(np.float64)), max(ranks)
        b[:, top:], a[top:] = sent[layer.b][:, top:], sent[layer.a][top:]
        np.testing.assert_allclose(after[layer.b], b, atol=1e-5)
        np.testing.assert_allclose(after[layer.a], a, atol=1e-5)
        exact = sum(w * f[0] @ f[1] for w, f in zip(weights, own.values(), strict=True))
        exact = exact + unheld(one, layer, ranks)
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
    "rule",
    [LoraStack(alpha=ALPHA, rank=RANK), LoraFedEx(alpha=ALPHA, rank=RANK)],
    ids=["stack", "fedex"],
)
@settings(max_examples=30)
@given(ranks=ranks_of_clients, seed=st.integers(0, 100), q=st.integers(1, 9))
def test_the_model_is_the_mean_of_the_clients_models_but_for_what_q_cuts_off(rule, ranks, seed, q):
    """And what none of them has, as it was sent."""
    one = unequal(ranks, residual=q, seed=seed)
    found, held = one.combined(rule)
    after, sent = one.after(found), one.layout.views(one.sent.astype(np.float64))
    error = size = 0.0
    for layer in one.layers:
        product = one.mean_of(rule, layer) + unheld(one, layer, ranks)
        exact = ALPHA / RANK * product + sent[layer.left] @ sent[layer.right]
        adapter = ALPHA / RANK * after[layer.b] @ after[layer.a]
        rest = exact - adapter
        wanted = np.linalg.norm(rest - best(rest, q))
        scale = np.linalg.norm(exact) + np.linalg.norm(adapter)
        assert np.linalg.norm(exact - model_product(after, layer)) == pytest.approx(
            wanted, abs=1e-5 * scale
        )
        error, size = error + wanted**2, size + np.linalg.norm(exact) ** 2
    assert held.figures()["lora_error"] == pytest.approx((error / size) ** 0.5, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "rule",
    [LoraStack(alpha=ALPHA, rank=RANK), LoraFedEx(alpha=ALPHA, rank=RANK)],
    ids=["stack", "fedex"],
)
def test_where_q_has_room_nothing_is_lost(rule):
    one = unequal([1, 2, 4], residual=7)
    found, held = one.combined(rule)
    after, sent = one.after(found), one.layout.views(one.sent.astype(np.float64))
    assert held.figures()["lora_error"] < 1e-12
    for layer in one.layers:
        exact = ALPHA / RANK * one.mean_of(rule, layer) + sent[layer.left] @ sent[layer.right]
        np.testing.assert_allclose(model_product(after, layer), exact, atol=1e-4)


def test_stack_begins_adapters_anew_each_round():
    one = unequal([1, 2, 4])
    (first, _), (again, _), (other, _) = (
        one.combined(LoraStack(rank=RANK), round=number) for number in (1, 1, 2)
    )
    assert first.delta.vector.tobytes() == again.delta.vector.tobytes()
    layer = one.layers[0]
    views = (
        one.after(first),
        one.after(other),
        one.after(one.combined(LoraStack(rank=RANK, seed=5), round=1)[0]),
    )
    for view in views:
        assert np.abs(view[layer.b]).max() < 1e-6
        assert 0.5 / np.sqrt(N) < np.abs(view[layer.a]).max() <= (1 + 1e-6) / np.sqrt(N)
        assert np.linalg.matrix_rank(view[layer.a]) == RANK
    assert len({np.round(view[layer.a], 5).tobytes() for view in views}) == 3


def test_fedex_averages_each_rank_over_those_who_have_it_and_leaves_the_others():
    one = unequal([1, 2, 2])
    (found, _), (mean, _) = (
        one.combined(LoraFedEx(alpha=ALPHA, rank=RANK)),
        one.combined(LoraMean()),
    )
    for layer in one.layers:
        for name in (layer.a, layer.b):
            ours, theirs = (one.layout.views(each.delta.vector)[name] for each in (found, mean))
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    "rule", [LoraStack(rank=RANK), LoraFedEx(rank=RANK)], ids=["stack", "fedex"]
)
def test_without_a_residual_what_is_left_over_has_no_place(rule):
    one = unequal([2], residual=0)
    with pytest.raises(ValueError, match=r"h_0_q, h_1_v has not: set model.residual_rank"):
        rule.begin(one.plan())


@pytest.mark.parametrize("rule", [LoraStack(rank=3), LoraFedEx(rank=3)], ids=["stack", "fedex"])
def test_a_rank_that_can_t_be_the_models_is_refused(rule):
    with pytest.raises(ValueError, match=r"rank = 3, and the model has a layer of rank 4"):
        rule.begin(unequal([2]).plan())


@pytest.mark.parametrize("rule", [LoraStack(alpha=ALPHA, rank=8), LoraFedEx(alpha=ALPHA, rank=8)])
def test_the_scale_is_that_of_the_models_rank_whatever_a_layer_has(rule):
    one = unequal([1, 2, 4], residual=7)
    found, _ = one.combined(rule)
    after, sent = one.after(found), one.layout.views(one.sent.astype(np.float64))
    for layer in one.layers:
        ours = ALPHA / 8 * after[layer.b] @ after[layer.a] + after[layer.left] @ after[layer.right]
        exact = ALPHA / 8 * one.mean_of(rule, layer) + sent[layer.left] @ sent[layer.right]
        np.testing.assert_allclose(ours, exact, atol=1e-4)
