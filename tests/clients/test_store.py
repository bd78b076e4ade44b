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


def number_of(state) -> int | None:
    return int(state["control"][0]) if state else None


def test_proposals_of_rounds_that_were_lost_do_not_push_out_those_that_count(tmp_path):
    """The server went back to round 10 and counts anew; what the disk has of later rounds has the highest numbers."""
    store, states = ClientStore(tmp_path), {n: {"control": vector(n)} for n in range(20)}
    store.propose(0, 9, 10, states[10])
    for number in (12, 14, 16):
        store.propose(0, 10, number, states[number], [10])
    for number in (11, 13, 15, 17):  # asked again and again before the first of them is taken
        store.propose(0, 10, number, states[number], [10])
        assert number_of(store.load(0, 11)) == 11
        assert number_of(store.load(0, 10)) == 10
    assert number_of(store.load(0, 17)) == 17
    assert [store.load(0, number) for number in (12, 14, 16)] == [{}, {}, {}]


def test_what_a_checkpoint_holds_is_kept_among_proposals_of_rounds_that_were_lost(tmp_path):
    store = ClientStore(tmp_path)
    for included, number in ((0, 4), (4, 8), (8, 12), (8, 14), (8, 16), (4, 5), (4, 6), (4, 7)):
        store.propose(0, included, number, {"control": vector(number)}, [4, 8])
    assert [number_of(store.load(0, number)) for number in (4, 8, 5, 6, 7)] == [4, 8, 5, 6, 7]


@given(st.lists(st.sampled_from(["ask", "rush", "take", "save", "back"]), max_size=30), st.data())
def test_the_state_follows_a_server_that_goes_back(tmp_path_factory, steps, data):
    """Up to four replies are under way; two checkpoints are kept, and any of them may be the newest that is whole."""
    store = ClientStore(tmp_path_factory.mktemp("store"))
    held: dict[int, int] = {0: 0}  # by round: the number within the state
    number, included, count, under_way = 0, 0, 0, []
    checkpoints = [(0, 0, 0)]
    for step in steps:
        for _ in range({"ask": 1, "rush": 4}.get(step, 0)):
            number, count = number + 1, count + 1
            kept = [one for _, one, _ in checkpoints]
            store.propose(0, included, number, {"control": vector(count)}, kept)
            held[number], under_way = count, [*under_way, number][-4:]
        if step == "take" and under_way:
            included = data.draw(st.sampled_from(under_way))
            under_way = [one for one in under_way if one > included]
        elif step == "save" and number > checkpoints[-1][0]:
            checkpoints = [*checkpoints, (number, included, held[included])][-2:]
        elif step == "back":
            del checkpoints[data.draw(st.integers(1, len(checkpoints))) :]
            number, included, was = checkpoints[-1]
            held, under_way = {**held, included: was}, []
        for one in (included, *under_way):  # any of which may be the next that counts
            assert number_of(store.load(0, one)) == (held[one] or None)
