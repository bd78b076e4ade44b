"""What a server remembers of the sums on a model, killed at whatever moment."""

import pytest

from strategies.collectors import Masked
from strategies.collectors.once import Once, Settled
from strategies.protocols import Void
from strategies.update import DELTA
from tests.support.masked import cohort
from tests.support.updates import flat, update

MODEL, OTHER = b"m" * 32, b"o" * 32
FIRST, SECOND = b"1" * 16, b"2" * 16
LAYOUTS = {DELTA: flat(3)}


def a_sum():
    return update([1.0, 2.0, 3.0], client=1, version=4)


def test_a_session_that_was_begun_and_came_to_nothing_is_void_for_a_later_process(tmp_path):
    once = Once(tmp_path)
    assert once.void(MODEL) == b""
    once.begin(MODEL, FIRST)
    again = Once(tmp_path)
    assert again.run == once.run
    assert (again.void(MODEL), again.void(OTHER)) == (FIRST, b"")


def test_a_sum_is_kept_for_a_later_process_and_its_session_is_never_void(tmp_path):
    once = Once(tmp_path)
    once.begin(MODEL, FIRST)
    once.begin(MODEL, SECOND)
    once.keep(MODEL, FIRST, a_sum())
    for known in (once, Once(tmp_path)):
        assert known.void(MODEL) == SECOND
        (found,) = known.recall(MODEL, LAYOUTS)
        assert (found.members, found.weight, found.version) == ((1,), a_sum().weight, 4)
        assert found.delta.vector.tolist() == [1, 2, 3]
        assert known.recall(OTHER, LAYOUTS) == []


def test_the_sums_of_the_last_models_are_there(tmp_path):
    """A torn checkpoint sends a run back to the one before, and sums of several versions may be under way."""
    once = Once(tmp_path)
    models = [bytes([number]) * 32 for number in range(18)]
    for model in models:
        once.begin(model, FIRST)
        once.keep(model, FIRST, a_sum())
    again = Once(tmp_path)
    assert [len(again.recall(model, LAYOUTS)) for model in models[2:]] == [1] * 16
    assert len(list(tmp_path.glob("*.safetensors"))) == 16


def test_a_session_of_which_something_was_seen_is_not_void(tmp_path):
    once = Once(tmp_path)
    once.begin(MODEL, FIRST)
    once.seen(MODEL, FIRST)
    assert Once(tmp_path).void(MODEL) == b""


def test_without_a_folder_the_state_tells_what_was_void():
    once, again = Once(), Once()
    once.begin(MODEL, FIRST)
    once.begin(MODEL, SECOND)
    once.keep(MODEL, SECOND, a_sum())
    again.load_state_dict(once.state_dict())
    assert (again.run, again.void(MODEL)) == (once.run, FIRST)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"run": 3}', '{"run": "zz", "models": {}}'])
def test_a_book_that_cannot_be_read_is_told_of(tmp_path, caplog, content):
    (tmp_path / "sessions.json").write_text(content)
    assert len(Once(tmp_path).run) == 16
    assert "can't be read" in caplog.text


def test_sums_that_cannot_be_read_are_told_of(tmp_path, caplog):
    once = Once(tmp_path)
    once.begin(MODEL, FIRST)
    once.keep(MODEL, FIRST, a_sum())
    next(tmp_path.glob("*.safetensors")).write_bytes(b"torn")
    assert Once(tmp_path).recall(MODEL, LAYOUTS) == []
    assert "can't be read" in caplog.text


def test_a_cohort_in_which_nobody_can_hide_is_void_at_once():
    with cohort(5) as clients:
        session = clients.collector.open(clients.job(), [3, 4])
        assert isinstance(session, Settled)
        assert session.start() == []
        (void,) = session.expire()
        assert isinstance(void, Void)
        assert "2 clients cannot hide" in void.reason
        assert session.done


def test_a_sum_that_is_none_is_void_and_the_next_session_completes():
    """One flipped byte of one client: nothing can be made of the sum, and nobody is kept from the next one by it."""
    with cohort(5) as clients:

        def flip(step, client, content):
            if step == "upload" and client == 2:
                array = content["upload"]["masked"]
                array.data = array.data[:-1] + bytes([array.data[-1] ^ 1])
            return content

        assert clients.run(reply=flip).update is None
        assert clients.run().update.members == (0, 1, 2, 3, 4)


def test_a_collector_says_how_many_clients_it_takes():
    assert Masked().least_clients() == 3
    assert Masked(groups=5).least_clients() == 15
