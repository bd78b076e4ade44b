"""Who is at work on which version: no client twice, deadlines, and what a later process takes up."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from strategies.collectors import Plain
from strategies.protocols import Job
from strategies.schedulers.flight import Flight, Resumed, Wave, sent_before
from strategies.update import DELTA
from strategies.wire import ARRAYS, CONFIG, SENT, config_of, pack_model, unpack_model
from tests.support.updates import flat


def job(version: int) -> Job:
    model = {"w": np.full(3, version, np.float32)}
    return Job(
        version + 1, version, {ARRAYS: pack_model(model)}, {}, {}, {DELTA: flat(3)}, {"w": DELTA}
    )


def wave(clients: set[int], version: int = 0, *, sent: float = 0.0, **settings) -> Wave:
    work = job(version)
    session = Plain().open(work, sorted(clients))
    made = Wave(work, session, set(clients), sent, sent + 10, **settings)
    made.requests = {request.client: request for request in session.start()}
    return made


def test_a_client_is_at_work_until_its_part_is_over():
    flight, one = Flight(), wave({1, 2})
    flight.add(one)
    assert (len(flight), 1 in flight, 3 in flight) == (2, True, False)
    assert flight.of(2) is one
    flight.free(one, [1, 3])
    assert (len(flight), 1 in flight) == (1, False)
    flight.free(one, [2])
    assert (len(flight), bool(flight), flight.deadline) == (0, False, float("inf"))


def test_no_client_is_in_two_sessions():
    flight = Flight()
    flight.add(wave({1, 2}))
    with pytest.raises(ValueError, match="client 2 is at work already"):
        flight.add(wave({2, 3}))
    assert 3 not in flight


def test_sessions_are_due_at_their_own_deadlines():
    flight = Flight()
    early, late = wave({1}, sent=0.0), wave({2}, sent=5.0)
    flight.add(late)
    flight.add(early)
    assert flight.deadline == 10
    assert flight.due(9.9) == []
    assert flight.due(10.0) == [early]
    assert flight.due(15.0) == [late, early]


def test_a_later_process_knows_whom_to_ask_again_and_on_which_model():
    flight = Flight()
    first = wave({5, 2}, version=3, sent=1.5, attempt=7, steps=9)
    flight.add(first)
    flight.add(wave({4}, version=4, sent=2.5, attempt=8))
    flight.free(first, [5])
    resumed = Resumed.of(flight.state_dict())
    told = [(one.client, one.version, one.attempt, one.steps, one.sent) for one in resumed.requests]
    assert told == [(2, 3, 7, 9, 1.5), (4, 4, 8, 0, 2.5)]
    for version in (3, 4):
        again = resumed.job(version, job(6))
        assert (again.version, again.round) == (version, version + 1)
        sent = unpack_model(again.records[ARRAYS])["w"]
        np.testing.assert_array_equal(sent, np.full(3, version, np.float32))


def test_nobody_at_work_is_a_state_too():
    assert Resumed.of(Flight().state_dict()) == Resumed()


def test_sessions_of_several_phases_are_given_up():
    flight, one = Flight(), wave({1})
    (request,) = one.requests.values()
    request.content[CONFIG] = ConfigRecord({**config_of(request.content), "phases": 4})
    flight.add(one)
    assert Resumed.of(flight.state_dict()).requests == ()


@pytest.mark.parametrize(
    "change",
    [
        {"sent": None},
        {"sent": np.zeros(1, np.float32)},
        {"clients": np.zeros(2, np.int64)},
        {"clients": np.zeros(1)},
        {"models": {}},
    ],
    ids=["no times", "float32", "too many", "no whole numbers", "no models"],
)
def test_another_parts_state_is_refused(change):
    flight = Flight()
    flight.add(wave({1}))
    with pytest.raises(ValueError, match="state"):
        Resumed.of({**flight.state_dict(), **change})


def test_a_request_says_when_it_was_sent_before():
    (request,) = wave({1}).requests.values()
    shared = dict(request.content.array_records)
    again = sent_before(request, 12.5)
    assert isinstance(again.content, RecordDict)
    assert config_of(again.content)[SENT] == 12.5
    assert config_of(again.content)["client"] == 1
    assert isinstance(again.content[ARRAYS], ArrayRecord)
    assert dict(again.content.array_records) == shared
