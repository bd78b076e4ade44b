"""Greedy ranks: never over budget, no layer loses when the budget or its importance grows, and ties are decided."""

from itertools import pairwise
from math import log1p

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.lora.allocation import CHOICES, BudgetError, allocate, check_budget, uniform

NAMES = ("a", "b", "c", "d")
BASE = 1000
LAYERS = st.fixed_dictionaries({n: st.floats(0, 100) for n in NAMES})
COSTS = st.fixed_dictionaries(
    {n: st.tuples(st.integers(0, 500), st.integers(1, 50)) for n in NAMES}
)
BUDGETS = st.integers(BASE, BASE + 12_000)


def additive(costs):
    """So much for a layer that has an adapter, and so much for each unit of its rank."""

    def memory(ranks):
        return BASE + sum(bool(r) * costs[n][0] + r * costs[n][1] for n, r in ranks.items())

    return memory


def nested(costs):
    """As in a model: all layers above the lowest with an adapter save what the backward pass takes."""

    def memory(ranks):
        lowest = next((place for place, n in enumerate(NAMES) if ranks[n]), len(NAMES))
        opened = sum(costs[n][0] for n in NAMES[lowest:])
        return BASE + opened + sum(r * costs[n][1] for n, r in ranks.items())

    return memory


KINDS = pytest.mark.parametrize("kind", [additive, nested])


@KINDS
@given(importance=LAYERS, costs=COSTS, budget=BUDGETS)
def test_it_is_never_over_budget_and_gives_ranks_that_there_are(kind, importance, costs, budget):
    memory = kind(costs)
    for ranks in (allocate(importance, memory, budget), uniform(NAMES, memory, budget)):
        assert memory(ranks) <= budget
        assert set(ranks) == set(NAMES)
        assert set(ranks.values()) <= set(CHOICES)


@KINDS
@given(importance=LAYERS, costs=COSTS, budget=BUDGETS, more=st.integers(0, 5000))
def test_no_layer_loses_rank_when_the_budget_grows(kind, importance, costs, budget, more):
    memory = kind(costs)
    less, larger = (allocate(importance, memory, b) for b in (budget, budget + more))
    assert all(less[name] <= larger[name] for name in NAMES)


@given(importance=LAYERS, costs=COSTS, budget=BUDGETS, data=st.data())
def test_a_layer_that_matters_more_never_gets_less(importance, costs, budget, data):
    name = data.draw(st.sampled_from(NAMES))
    raised = {**importance, name: importance[name] + data.draw(st.floats(0, 100))}
    before, after = (allocate(i, additive(costs), budget) for i in (importance, raised))
    assert after[name] >= before[name]


@given(importance=LAYERS, cost=st.tuples(st.integers(0, 500), st.integers(1, 50)), budget=BUDGETS)
def test_of_layers_that_cost_alike_the_one_that_matters_more_has_as_much_at_least(
    importance, cost, budget
):
    ranks = allocate(importance, additive(dict.fromkeys(NAMES, cost)), budget)
    by_worth = sorted(NAMES, key=lambda name: (-importance[name], name))
    assert all(ranks[a] >= ranks[b] for a, b in pairwise(by_worth))


@given(importance=LAYERS, costs=COSTS, budget=BUDGETS, order=st.permutations(NAMES))
def test_the_order_in_which_layers_are_named_decides_nothing(importance, costs, budget, order):
    memory = additive(costs)
    other = allocate({name: importance[name] for name in order}, memory, budget)
    assert other == allocate(importance, memory, budget)


def test_ties_go_to_the_first_name():
    memory = additive(dict.fromkeys(NAMES, (0, 10)))
    ranks = allocate(dict.fromkeys(NAMES, 1.0), memory, BASE + 80)
    assert ranks == {"a": 4, "b": 4, "c": 0, "d": 0}


@settings(max_examples=30)
@given(
    importance=st.fixed_dictionaries({n: st.floats(1, 10) for n in ("a", "b")}),
    costs=st.fixed_dictionaries({n: st.integers(1, 50) for n in ("a", "b")}),
)
def test_it_is_as_good_as_the_best_of_all_but_for_one_step(importance, costs):
    """Costs are in proportion to ranks, so worth is concave: greedy is behind the optimum by less than a step."""
    memory = additive({n: (0, c) for n, c in costs.items()})
    budget = BASE + 1500

    def worth(ranks):
        return sum(importance[n] * log1p(r) for n, r in ranks.items())

    every = [{"a": x, "b": y} for x in CHOICES for y in CHOICES]
    best = max(worth(ranks) for ranks in every if memory(ranks) <= budget)
    step = max(importance.values()) * log1p(4)
    assert worth(allocate(importance, memory, budget)) >= best - step


def test_a_budget_below_the_base_says_what_is_needed_and_what_there_is():
    memory = additive(dict.fromkeys(NAMES, (0, 10)))
    with pytest.raises(
        BudgetError, match=r"takes 0\.0 MB without a single adapter, and the budget"
    ):
        allocate(dict.fromkeys(NAMES, 1.0), memory, BASE - 1)
    with pytest.raises(BudgetError, match=r"takes 20\.0 MB .* budget is 19\.5 MB: raise it"):
        check_budget(lambda ranks: 20_000_000, NAMES, 19_500_000)
    check_budget(memory, NAMES, BASE)


def test_a_budget_that_holds_no_uniform_rank_still_opens_what_fits():
    costs = {"a": (900, 1), "b": (300, 1), "c": (300, 1), "d": (100, 1)}
    ranks = uniform(NAMES, nested(costs), BASE + 300)
    assert ranks == {"a": 0, "b": 0, "c": 0, "d": 64}


def test_only_ranks_to_choose_from_are_given():
    memory = additive(dict.fromkeys(NAMES, (0, 1)))
    assert set(allocate(dict.fromkeys(NAMES, 1.0), memory, 10**9, [8, 2]).values()) == {8}


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_importance_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="importance must be a number of at least 0"):
        allocate({"a": value}, lambda ranks: 0, 1)
    with pytest.raises(ValueError, match="ranks to choose from"):
        allocate({"a": 1.0}, lambda ranks: 0, 1, [-1])
