"""What a client remembers is what the server has, whatever was lost on the way."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from clients.store import ClientStore


def vector(value: float) -> np.ndarray:
    return np.full(3, value, np.float32)


def value_of(state) -> float:
    return float(state["control"][0]) if state else 0.0


def test_a_client_without_a_state_starts_with_none(tmp_path):
    assert ClientStore(tmp_path / "new").load(3, included=0) == {}
    assert not (tmp_path / "new").exists()


def test_a_proposed_state_holds_once_the_server_has_the_update(tmp_path):
    store = ClientStore(tmp_path)
    store.propose(1, included=0, round_number=4, state={"control": vector(4)})
    assert value_of(store.load(1, included=4)) == 4


def test_a_proposed_state_is_dropped_when_the_server_never_took_the_update(tmp_path):
    store = ClientStore(tmp_path)
    store.propose(1, included=0, round_number=2, state={"control": vector(2)})
    store.propose(1, included=2, round_number=5, state={"control": vector(5)})
    assert value_of(store.load(1, included=2)) == 2


def test_clients_do_not_share_states(tmp_path):
    store = ClientStore(tmp_path)
    store.propose(1, included=0, round_number=1, state={"control": vector(1)})
    assert store.load(2, included=0) == {}


@given(st.lists(st.booleans(), max_size=12))
def test_the_state_follows_the_server_through_any_losses(tmp_path_factory, taken):
    """Each round's state counts the updates that the server has; a lost reply must not be counted."""
    store = ClientStore(tmp_path_factory.mktemp("store"))
    included, count = 0, 0
    for number, was_taken in enumerate(taken, 1):
        assert value_of(store.load(0, included)) == count
        store.propose(0, included, number, {"control": vector(count + 1)})
        if was_taken:
            included, count = number, count + 1
    assert value_of(store.load(0, included)) == count


def test_a_server_that_went_further_back_finds_the_client_afresh_and_is_told(tmp_path, caplog):
    store = ClientStore(tmp_path)
    store.propose(1, included=0, round_number=7, state={"control": vector(7)})
    assert store.load(1, included=3) == {}
    assert "starts afresh" in caplog.text


def test_a_torn_file_is_told_of_and_replaced(tmp_path, caplog):
    store = ClientStore(tmp_path)
    store.propose(1, included=0, round_number=1, state={"control": vector(1)})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-4])
    assert store.load(1, included=1) == {}
    assert "can't be read" in caplog.text
    store.propose(1, included=1, round_number=2, state={"control": vector(2)})
    assert value_of(store.load(1, included=2)) == 2


def test_nothing_is_left_beside_the_state(tmp_path):
    store = ClientStore(tmp_path)
    for number in range(1, 4):
        store.propose(
            1, included=number - 1, round_number=number, state={"control": vector(number)}
        )
    assert [path.name for path in tmp_path.iterdir()] == ["client-1.safetensors"]


def test_a_late_proposal_of_an_earlier_round_does_not_displace_a_later_one(tmp_path):
    store = ClientStore(tmp_path)
    store.propose(0, included=1, round_number=3, state={"control": vector(3)})
    store.propose(0, included=1, round_number=2, state={"control": vector(2)})
    assert value_of(store.load(0, included=3)) == 3
    assert value_of(store.load(0, included=2)) == 2


def test_a_client_that_is_never_included_keeps_a_few_proposals_only(tmp_path):
    store = ClientStore(tmp_path)
    for number in range(1, 30):
        store.propose(0, included=0, round_number=number, state={"control": vector(number)})
    assert value_of(store.load(0, included=29)) == 29
    assert store.load(0, included=20) == {}


def test_what_the_server_may_be_sent_back_to_is_kept_whatever_follows(tmp_path):
    store = ClientStore(tmp_path)
    for number in range(1, 30):
        store.propose(
            0,
            number - 1,
            number,
            {"control": vector(number)},
            kept=[n for n in (5, 10) if n < number],
        )
    assert [value_of(store.load(0, included=number)) for number in (5, 10, 28)] == [5, 10, 28]
    assert store.load(0, included=7) == {}
