"""Ranks that no client of a round has: a round of small clients takes nothing away of what larger ones trained."""

import weakref
from collections.abc import Mapping, Sequence
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
from strategies.pipeline import Pipeline
from strategies.schedulers import Buffered, Synchronous
from strategies.server_models import ServerModel
from strategies.update import DELTA
from tests.support.adapters import (
    ALPHA,
    RANK,
    Federation,
    M,
    federation,
    layout_of,
    model_product,
    part_of,
)

LAYERS = ("h_0_q", "h_1_v")
LAYOUT = layout_of(LAYERS, residual=M)
"""Residuals with room for any matrix: nothing is cut off that a rule would have to lose."""

RULES = {
    "mean": LoraMean(),
    "zero_pad": LoraZeroPad(),
    "sparsity": LoraZeroPad(sparsity=True),
    "svd": LoraSvd(),
    "svd_at_random": LoraSvd(svd="randomized"),
    "partitioned": LoraPartitioned(),
    "stack": LoraStack(alpha=ALPHA, rank=RANK),
    "fedex": LoraFedEx(alpha=ALPHA, rank=RANK),
}
every = pytest.mark.parametrize("name", RULES)
BY_RANK = ("mean", "partitioned", "fedex")
"""Rules that average each rank over those who have it, so that unequal clients who change nothing change nothing."""

ranks_of_layers = st.fixed_dictionaries({layer: st.integers(0, RANK) for layer in LAYERS})


def still(ranks: Sequence[Mapping[str, int] | int], seed: int = 0) -> Federation:
    """Clients of these ranks who have changed nothing."""
    one = federation([part_of(LAYOUT, own) for own in ranks], LAYOUT, seed=seed)
    zero = np.zeros_like(one.sent)
    updates = [
        update.with_section(DELTA, replace(update.delta, vector=zero)) for update in one.updates
    ]
    return Federation(LAYOUT, one.sent, updates)


def moved(one: Federation, rule) -> float:
    """The largest ‖change of s·B·A + left·right‖ / ‖s·B·A + left·right‖ of a layer in one round."""
    found, _ = one.combined(rule)
    before, after = one.layout.views(one.sent.astype(np.float64)), one.after(found)
    return max(
        float(
            np.linalg.norm(model_product(after, layer) - model_product(before, layer))
            / np.linalg.norm(model_product(before, layer))
        )
        for layer in one.layers
    )


@every
@settings(max_examples=30)
@given(ranks=ranks_of_layers, clients=st.integers(1, 4), seed=st.integers(0, 1000))
def test_clients_of_small_ranks_who_change_nothing_move_nothing(name, ranks, clients, seed):
    one = still([ranks] * clients, seed)
    assert moved(one, RULES[name]) < 1e-6
    figures = one.combined(RULES[name])[1].figures()
    assert all(value < 1e-6 for figure, value in figures.items() if figure != "lora_rank")


@pytest.mark.parametrize("name", BY_RANK)
@settings(max_examples=30)
@given(ranks=st.lists(ranks_of_layers, min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_averaged_by_rank_clients_of_any_ranks_who_change_nothing_move_nothing(name, ranks, seed):
    assert moved(still(ranks, seed), RULES[name]) < 1e-6


@every
def test_round_after_round_of_small_clients_the_model_stays(name):
    one = still([2, 2])
    start = one.layout.views(one.sent.astype(np.float64))
    sent = one.sent
    for number in range(1, 21):
        found, _ = Federation(LAYOUT, sent, one.updates).combined(RULES[name], round=number)
        sent = (sent.astype(np.float64) + found.delta.vector).astype(np.float32)
    after = LAYOUT.views(sent.astype(np.float64))
    for layer in one.layers:
        before = model_product(start, layer)
        distance = np.linalg.norm(model_product(after, layer) - before)
        assert distance < 1e-5 * np.linalg.norm(before)


@pytest.mark.parametrize("name", ["mean", "zero_pad", "sparsity", "fedex"])
@settings(max_examples=20)
@given(ranks=st.lists(st.integers(1, RANK - 1), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_where_factors_are_averaged_elements_that_nobody_has_stay_bit_for_bit(name, ranks, seed):
    """With zeros in both A and B neither would ever have a gradient again."""
    one = federation([part_of(LAYOUT, rank) for rank in ranks], LAYOUT, seed=seed)
    found, _ = one.combined(RULES[name])
    change, top = LAYOUT.views(found.delta.vector), max(ranks)
    for layer in one.layers:
        assert not change[layer.b][:, top:].any()
        assert not change[layer.a][top:].any()
        assert change[layer.b][:, :top].all()
        assert change[layer.a][:top].all()


@every
def test_a_round_without_a_client_that_has_any_adapter_moves_none(name):
    one = federation([part_of(LAYOUT, 0)] * 2, LAYOUT)
    found, held = one.combined(RULES[name])
    change = LAYOUT.views(found.delta.vector)
    assert {n for n, view in change.items() if view.any()} == {"head.weight", "head.bias"}
    assert set(held.figures().values()) <= {0.0}


@pytest.mark.parametrize("scheduler", [Synchronous(), Buffered()], ids=["rounds", "buffered"])
def test_only_in_rounds_is_there_one_model_that_was_sent(scheduler):
    """Updates that started from several versions have no factors together: no figure, and none is held for one."""
    pipeline = Pipeline(combiner=LoraMean(), factors="both", scheduler=scheduler)
    pipeline.check()
    one = still([2, RANK])
    arrays = {name: view.copy() for name, view in LAYOUT.views(one.sent).items()}
    held = pipeline.begin(pipeline.job(ServerModel(arrays, pipeline.optimizer)), 2)
    for update in one.updates:
        held.add(update)
    seen = weakref.ref(one.updates.pop())
    del update
    in_rounds = isinstance(scheduler, Synchronous)
    assert (seen() is not None) is in_rounds
    assert held.result() is not None
    assert ("lora_cross_term" in held.figures()) is in_rounds
