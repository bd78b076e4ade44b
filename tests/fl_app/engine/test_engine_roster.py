from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_app.engine import Roster


def test_every_client_has_a_node_id_of_its_own() -> None:
    roster = Roster(10_000)
    nodes = list(roster.values())
    assert len(set(nodes)) == 10_000
    assert [roster.client_of(node) for node in nodes] == list(range(10_000))


def test_node_ids_are_never_logical_ids_and_tell_nothing_of_their_order() -> None:
    roster = Roster(1_000)
    nodes = list(roster.values())
    assert min(nodes) > 1_000
    assert nodes != sorted(nodes)
    assert max(nodes) < 2**63


@given(st.integers(-(2**65), 2**65))
def test_an_id_that_no_client_has_is_nobody(node: int) -> None:
    roster = Roster(5)
    assert roster.client_of(node) is None or node in roster.values()


@pytest.mark.parametrize("client", [-1, 5])
def test_a_client_beyond_the_last_is_not_there(client: int) -> None:
    roster = Roster(5)
    assert client not in roster
    with pytest.raises(KeyError):
        roster[client]


def test_a_million_clients_take_no_more_memory_than_ten() -> None:
    tracemalloc.start()
    roster = Roster(1_000_000)
    assert roster.client_of(roster[999_999]) == 999_999
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000


def test_no_clients_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Roster(0)
