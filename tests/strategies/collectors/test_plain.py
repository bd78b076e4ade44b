"""The plain collector's session, fed replies by hand: no grid, no clock."""

import numpy as np
import pytest

from strategies.collectors import Plain
from strategies.contract import Claim, Visibility
from strategies.mod import kinds_of, layouts_of
from strategies.protocols import Job, Reply
from strategies.replies import write_update
from strategies.update import CONTROL, DELTA
from strategies.wire import ARRAYS, CONFIG, METRICS, NUM_EXAMPLES, Refused, pack_model
from tests.support.grids import numbers
from tests.support.updates import parameters, update

MODEL = parameters(1, 2, 3)
KINDS = kinds_of(MODEL, [])
JOB = Job(
    round=4,
    version=3,
    records={ARRAYS: pack_model(MODEL)},
    config={"lr": 0.1},
    included={7: 2},
    layouts=layouts_of(MODEL, KINDS),
    kinds=KINDS,
)


def honest(request, values=(1, 1, 1)) -> Reply:
    one = update(values, weight=5, client=request.client, version=3)
    return Reply(request, write_update(one, client=request.client, round_number=4))


def refused(session, reply: Reply) -> str:
    with pytest.raises(Refused) as caught:
        list(session.receive(reply))
    return caught.value.reason


def test_each_client_is_asked_once_and_told_who_it_is():
    session = Plain().open(JOB, [7, 9])
    requests = session.start()
    assert [request.client for request in requests] == [7, 9]
    assert {request.kind for request in requests} == {"train"}
    assert dict(requests[0].content[CONFIG]) == {
        "lr": 0.1,
        "server-round": 4,
        "version": 3,
        "client": 7,
        "included": 2,
        "phase": 0,
        "phases": 1,
    }
    assert requests[1].content[CONFIG]["included"] == 0


def test_requests_share_the_records_of_the_model():
    requests = Plain().open(JOB, [7, 9]).start()
    assert requests[0].content[ARRAYS] is requests[1].content[ARRAYS] is JOB.records[ARRAYS]


def test_a_session_gives_an_update_for_each_reply_and_is_done_with_the_last():
    session = Plain().open(JOB, [7, 9])
    first, second = session.start()
    (one,) = session.receive(honest(second))
    assert one.members == (9,)
    assert not session.done
    (other,) = session.receive(honest(first))
    assert other.members == (7,)
    assert session.done


def test_a_second_answer_is_refused_even_after_a_bad_first():
    session = Plain().open(JOB, [7, 9])
    request, _ = session.start()
    assert refused(session, Reply(request, numbers(1))) == "missing"
    assert refused(session, honest(request)) == "duplicate"
    assert not session.done


def test_a_client_that_was_not_asked_is_refused():
    session, other = Plain().open(JOB, [7]), Plain().open(JOB, [8])
    assert refused(session, honest(other.start()[0])) == "duplicate"
    assert not session.done


@pytest.mark.parametrize(
    ("error", "detail"), [("out of memory", "out of memory"), (None, "the client gave no reason")]
)
def test_a_clients_error_is_a_refusal_with_its_reason(error, detail):
    session = Plain().open(JOB, [7])
    with pytest.raises(Refused, match=f"client_error: {detail}"):
        session.receive(Reply(session.start()[0], None, error))
    assert session.done


def test_those_who_have_not_answered_by_the_deadline_are_named_once():
    session = Plain().open(JOB, [9, 7, 8])
    session.receive(honest(session.start()[2]))
    late = session.expire()
    assert [(one.client, one.refused.reason) for one in late] == [
        (7, "timeout"),
        (9, "timeout"),
    ]
    assert session.done
    assert session.expire() == []
    assert refused(session, honest(session.start()[0])) == "duplicate"


def test_an_empty_cohort_is_done_at_once():
    session = Plain().open(JOB, [])
    assert session.start() == []
    assert session.done


def test_a_vanilla_clients_weights_become_an_update():
    session = Plain(vanilla=True).open(JOB, [7])
    content = numbers(5)
    content[ARRAYS] = pack_model(parameters(2, 2, 2))
    (one,) = session.receive(Reply(session.start()[0], content))
    np.testing.assert_array_equal(one.delta.vector, [1, 0, -1])
    assert (one.weight, one.members, one.version) == (5, (7,), 3)


def test_each_kind_of_client_is_refused_where_the_other_is_expected():
    weights = numbers(5)
    weights[ARRAYS] = pack_model(MODEL)
    plain = Plain().open(JOB, [7])
    assert refused(plain, Reply(plain.start()[0], weights)) == "missing"
    vanilla = Plain(vanilla=True).open(JOB, [7])
    assert refused(vanilla, honest(vanilla.start()[0])) == "shape"


@pytest.mark.parametrize("vanilla", [False, True])
def test_the_server_sees_each_update_and_what_travels_in_clear(vanilla):
    claim = Plain(vanilla=vanilla).check(Claim(sections=frozenset({DELTA, CONTROL})))
    assert claim.visibility is Visibility.EACH
    assert claim.clear == {NUM_EXAMPLES, METRICS}
    assert claim.client_half is not vanilla
    assert claim.source("client_half") == "collector plain"
