"""A plan of ranks: uniform first, by importance afterwards, parts that are leading blocks, and a state that lasts."""

import numpy as np
import pytest

from clients.lora.allocation import BudgetError
from clients.lora.profile import LayerCost, Piece, Profile, memory_of
from clients.lora.ranks import RankPlan
from strategies.contract import Claim, ContractError
from strategies.parts import check_part
from strategies.update import DELTA, Layout, Section, Update

MB = 1_000_000
WIDTH, RANK = 10, 16
LAYERS = ("low", "middle", "high")
PROFILE = Profile(
    frozen=20 * MB,
    travelling=50,
    layers={name: LayerCost(2 * WIDTH, 0, 100_000) for name in LAYERS},
    pieces=tuple(Piece(10 * MB, place, frozenset()) for place in (1, 2, 3)),
    transient=5 * MB,
    batch=20,
    length=32,
)
NONE = memory_of(PROFILE, dict.fromkeys(LAYERS, 0)) / MB
ADAPTERS = [f"adapters.{name}.{kind}.weight" for name in (*LAYERS, "upper") for kind in "AB"]
WHOLE = Layout(
    (*ADAPTERS, "residual.low.left", "head.weight"),
    ((RANK, WIDTH), (WIDTH, RANK)) * 4 + ((WIDTH, 2), (3, WIDTH)),
)


def plan(*budgets, **settings) -> RankPlan:
    made = RankPlan(budgets, **settings)
    made.measured(PROFILE, RANK)
    return made


def aggregate(worth) -> Update:
    """A change of B, as long as each layer is to be worth."""
    vector = np.zeros(WHOLE.size, np.float32)
    for name, view in WHOLE.views(vector).items():
        if name.endswith(".B.weight"):
            view[...] = worth.get(name.split(".")[1], 0)
    return Update({DELTA: Section(vector, WHOLE)}, 1.0, (0, 1), 1)


SENT = np.zeros(WHOLE.size, np.float32)


def test_each_client_has_the_budget_at_its_place():
    made = plan(NONE, NONE + 36, 500)
    assert made.ranks(0) == dict.fromkeys(LAYERS, 0)
    assert made.ranks(1) == dict.fromkeys(LAYERS, 16)
    assert made.ranks(5) == made.ranks(2) == dict.fromkeys(LAYERS, 16)
    assert plan(NONE + 33).ranks(0) == dict.fromkeys(LAYERS, 8)


def test_in_the_warm_up_ranks_are_uniform_and_then_importance_decides():
    made = plan(NONE + 33, warmup=2)
    first = made.ranks(0)
    made.observe(aggregate({"low": 9, "middle": 1, "high": 1}), SENT)
    assert made.ranks(0) == first
    made.observe(aggregate({"low": 9, "middle": 1, "high": 1}), SENT)
    after = made.ranks(0)
    assert after["low"] > after["middle"]
    assert memory_of(PROFILE, after) <= (NONE + 33) * MB
    made.observe(aggregate({"low": 1, "middle": 9, "high": 1}), SENT)
    assert made.ranks(0) == after  # they stay


def test_without_a_warm_up_nothing_is_observed():
    made = plan(NONE + 33, warmup=0)
    before = made.ranks(0)
    made.observe(aggregate({"low": 9}), SENT)
    assert made.ranks(0) == before


def test_a_small_budget_trains_the_upper_layers():
    ranks = plan(NONE + 12).ranks(0)
    assert ranks["low"] == ranks["middle"] == 0
    assert ranks["high"] > 0


def test_a_part_is_the_leading_blocks_and_all_else_whole():
    made = plan(NONE + 12, NONE + 33)
    for client in (0, 1):
        part, ranks = made.part(client, WHOLE), made.ranks(client)
        check_part(part, WHOLE)
        shapes = dict(zip(part.names, part.shapes, strict=True))
        for layer, rank in ranks.items():
            names = f"adapters.{layer}.A.weight", f"adapters.{layer}.B.weight"
            if rank:
                assert [shapes[name] for name in names] == [(rank, WIDTH), (WIDTH, rank)]
            else:
                assert not shapes.keys() & set(names)
        assert shapes["adapters.upper.A.weight"] == (RANK, WIDTH)  # not measured: the server's
        assert shapes["head.weight"] == (3, WIDTH)
        assert shapes["residual.low.left"] == (WIDTH, 2)


def test_ranks_to_choose_from_end_at_the_model_s():
    assert set(plan(500).ranks(0).values()) == {RANK}


def test_the_contract_wants_adapters_and_says_that_parts_differ():
    with pytest.raises(ContractError, match=r"ranks.*no low-rank adapters.*model=lora"):
        RankPlan([100]).check(Claim())
    claim = RankPlan([100]).check(Claim(factors="both"))
    assert claim.parts
    assert claim.source("parts") == "ranks"


def test_a_budget_that_holds_nothing_is_refused_with_need_and_budget():
    with pytest.raises(BudgetError, match=rf"takes {NONE:.1f} MB .* budget is {NONE - 1:.1f} MB"):
        plan(500, NONE - 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"budgets_mb": []},
        {"budgets_mb": [100, 0]},
        {"budgets_mb": [100], "choices": [-4]},
        {"budgets_mb": [100], "warmup": -1},
        {"budgets_mb": [100], "decay": 1.0},
    ],
)
def test_settings_have_ranges(settings):
    with pytest.raises(ValueError, match=r"RankPlan|budgets|decay"):
        RankPlan(**settings)


def test_it_says_what_it_gave_and_why():
    made = plan(NONE + 12, NONE + 33, warmup=1)
    assert "ranks (rounds 1 to 1; batches of 20 x 32)" in made.table()
    made.observe(aggregate({"low": 9, "middle": 1, "high": 1}), SENT)
    lines = made.table().splitlines()
    assert "by importance" in lines[0]
    for line, budget, client in zip(lines[1:3], made.budgets_mb, (0, 1), strict=True):
        ranks = made.ranks(client)
        total = memory_of(PROFILE, ranks) / MB
        assert f"{total:.1f} of {budget:8.1f} MB: {' '.join(map(str, ranks.values()))}" in line
    assert lines[-1].split() == list(LAYERS)


def test_nothing_is_asked_of_a_plan_that_knows_no_costs():
    with pytest.raises(RuntimeError, match="needs `measured` first"):
        RankPlan([100]).ranks(0)


class TestState:
    def test_a_resumed_plan_goes_on_as_the_other(self):
        first, second = plan(NONE + 33, warmup=2), plan(NONE + 33, warmup=2)
        first.observe(aggregate({"low": 9, "middle": 1, "high": 1}), SENT)
        second.load_state_dict(first.state_dict())
        for made in (first, second):
            made.observe(aggregate({"low": 9, "middle": 2, "high": 1}), SENT)
        assert first.ranks(0) == second.ranks(0)
        assert first.table() == second.table()
        third = plan(NONE + 33, warmup=2)
        third.load_state_dict(first.state_dict())
        assert third.ranks(0) == first.ranks(0)

    def test_another_plan_s_is_refused(self):
        state = plan(NONE + 33, 500).state_dict()
        with pytest.raises(ValueError, match="of another model, or of other budgets"):
            plan(NONE + 33).load_state_dict(state)
