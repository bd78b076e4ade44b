"""The circulant graph is what it is said to be, and comes apart no more often than its bounds say."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.secagg.graph import circulant, log2_falls_apart, log2_splits_off


def connected(graph, nodes):
    nodes = set(nodes)
    reached, following = set(), {min(nodes)}
    while following:
        reached |= following
        following = {other for node in following for other in graph[node]} & nodes - reached
    return reached == nodes


@given(st.permutations(range(100, 117)), st.integers(1, 8))
def test_all_have_the_nearest_on_either_side_of_the_circle(order, half):
    graph = circulant(order, 2 * half)
    for place, node in enumerate(order):
        assert set(graph[node]) == {
            order[(place + step) % 17] for step in range(-half, half + 1)
        } - {node}
        assert len(graph[node]) == 2 * half
        assert list(graph[node]) == sorted(graph[node])
        assert all(node in graph[other] for other in graph[node])


@pytest.mark.parametrize("members", [2, 3, 4, 7, 10])
def test_the_complete_graph(members):
    order = list(range(members))
    assert circulant(order, members - 1) == {i: tuple(j for j in order if j != i) for i in order}


@pytest.mark.parametrize(
    ("order", "degree"), [("abcde", 3), ("abcde", 0), ("abcde", 6), ("abcd", -2)]
)
def test_a_degree_without_a_graph_is_refused(order, degree):
    with pytest.raises(ValueError, match=f"degree {degree} among {len(order)}"):
        circulant(range(len(order)), degree)


def test_a_node_given_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        circulant([1, 2, 2, 3], 2)


@pytest.mark.parametrize(
    ("members", "degree", "removed"), [(12, 2, 4), (13, 4, 6), (14, 4, 7), (14, 6, 8)]
)
def test_how_often_a_circulant_graph_falls_apart_over_all_ways_to_remove_nodes(
    members, degree, removed
):
    """Exact: every set of removed nodes is tried; the bound holds and is not idle."""
    graph = circulant(range(members), degree)
    apart = sum(
        not connected(graph, set(range(members)) - set(gone))
        for gone in itertools.combinations(range(members), removed)
    )
    share = apart / math.comb(members, removed)
    assert 0 < share <= 2 ** log2_falls_apart(members, degree, removed)


def test_too_few_are_removed_to_part_any_two():
    assert log2_falls_apart(20, 8, 7) == -math.inf
    assert log2_falls_apart(20, 19, 19) == -math.inf
    graph = circulant(range(11), 4)
    for gone in itertools.combinations(range(11), 3):
        assert connected(graph, set(range(11)) - set(gone))


def test_how_often_small_sets_draw_their_neighbours_among_themselves():
    """Simulation, seeded: 1,000 random graphs of 9 nodes with out-degree 3, sets of 3 and 4."""
    rng = np.random.default_rng(5)
    rounds, seen = 1_000, {3: 0, 4: 0}
    for _ in range(rounds):
        drawn = [
            frozenset(rng.permutation([j for j in range(9) if j != i])[:3].tolist())
            for i in range(9)
        ]
        for size in seen:
            seen[size] += any(
                all(len(drawn[i] & set(some)) >= 2 for i in some)
                for some in itertools.combinations(range(9), size)
            )
    for size, times in seen.items():
        bound = 2 ** log2_splits_off(9, 3, 2, size)
        assert 0 < times / rounds <= bound + 4 * math.sqrt(bound / rounds)
    assert log2_splits_off(9, 3, 2, 2) == -math.inf
