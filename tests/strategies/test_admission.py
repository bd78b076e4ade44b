import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.admission import Admission, is_wrong
from strategies.contract import Claim, ContractError
from strategies.update import BUFFERS
from strategies.wire import Refused
from tests.support.updates import update

NAN, INF = float("nan"), float("inf")


def reason(one, admission: Admission | None = None) -> str | None:
    try:
        (admission or Admission()).admit(one)
    except Refused as refusal:
        return refusal.reason
    return None


@pytest.mark.parametrize("examples", [0, -1, 0.999, NAN, INF, -INF, 1e18, 1_000_001, -(2.0**70)])
def test_an_absurd_number_of_examples_is_refused(examples):
    assert reason(update([1], weight=examples)) == "num_examples"


@pytest.mark.parametrize("examples", [1, 1.5, 1_000_000])
def test_a_number_of_examples_up_to_the_limit_is_taken(examples):
    assert reason(update([1], weight=examples)) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, NAN], "not_finite"),
        ([NAN, NAN], "not_finite"),
        ([INF], "not_finite"),
        ([-INF, 0], "not_finite"),
        ([NAN, INF, -INF], "not_finite"),
        ([1e11], "too_large"),
        ([0, -1e11], "too_large"),
        ([3.4e38, -3.4e38], "too_large"),
        ([1e10, -1e10], None),
        ([0, 0], None),
        ([1e-45], None),
        ([], None),
    ],
)
def test_values_are_taken_when_finite_and_within_the_limit(values, expected):
    assert reason(update(values)) == expected


@pytest.mark.parametrize("value", [NAN, INF, 1e11])
def test_every_section_is_looked_at(value):
    assert reason(update([0], **{BUFFERS: [0, value]})) is not None


@given(st.lists(st.floats(width=32), max_size=20), st.floats(2.0**-10, 2.0**80, width=32))
def test_what_is_admitted_is_exactly_what_is_finite_and_within_the_limit(values, limit):
    good = all(abs(value) <= limit for value in values)
    assert (reason(update(values), Admission(max_value=limit)) is None) == good


def test_refusals_strike_the_client_and_are_counted_by_reason(caplog):
    admission = Admission()
    for client, why in ((3, "shape"), (3, "dtype"), (8, "shape")):
        admission.record(client, Refused(why, "it was wrong"))
    assert admission.refusals == {"shape": 2, "dtype": 1}
    assert admission.strikes == {3: 2, 8: 1}
    assert "client 8 refused (shape): it was wrong" in caplog.text


def test_counts_survive_a_restart():
    before, after = Admission(), Admission()
    before.record(3, Refused("shape", ""))
    before.record(12, Refused("round", ""))
    after.record(1, Refused("forgotten", ""))
    after.load_state_dict(before.state_dict())
    assert after.refusals == before.refusals
    assert after.strikes == before.strikes
    after.record(3, Refused("shape", ""))
    assert (after.strikes[3], before.strikes[3]) == (2, 1)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "'refusals' should be a mapping"),
        ({"refusals": {}, "strikes": 3}, "'strikes' should be a mapping"),
        ({"refusals": {"shape": 1.5}, "strikes": {}}, "'shape' should be a whole number, not 1.5"),
        ({"refusals": {}, "strikes": {"3": True}}, "'3' should be a whole number, not True"),
    ],
)
def test_another_parts_state_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        Admission().load_state_dict(state)


def test_a_quorum_that_no_cohort_can_reach_is_refused():
    claim = Claim(cohort=4, set_by={"cohort": "Uniform"})
    assert Admission(quorum=4).check(claim).quorum == 4
    with pytest.raises(ContractError, match="a quorum of 5 can never be met by a cohort of 4"):
        Admission(quorum=5).check(claim)


def test_any_quorum_goes_where_the_cohort_is_not_planned():
    assert Admission(quorum=10**6).check(Claim()).cohort is None


def test_an_update_is_not_changed_at_the_door():
    one = update([1, -2, 3])
    one.delta.vector.flags.writeable = False
    Admission().admit(one)
    np.testing.assert_array_equal(one.delta.vector, [1, -2, 3])


@pytest.mark.parametrize(
    ("reason", "wrong"),
    [
        ("not_finite", True), ("too_large", True), ("malformed", True), ("shape", True), ("timeout", False),
        ("client_error", False), ("paused", False), ("duplicate", False), ("num_examples", False),
    ],
)  # fmt: skip
def test_an_update_that_came_and_was_wrong_is_told_from_misfortune(reason, wrong):
    assert is_wrong(Refused(reason, "")) is wrong


@pytest.mark.parametrize("limit", [1e-30, 1e-9, 1.0, 1e30])
def test_the_fast_pass_lets_nothing_through_that_the_slow_one_would_not(limit):
    admission = Admission(max_value=limit)
    largest = np.float32(limit)
    admission.admit(update([np.nextafter(largest, np.float32(0)), 0.0]))
    for beyond in (np.nextafter(largest, np.float32(np.inf)), -2 * largest):
        with pytest.raises(Refused, match="too_large"):
            admission.admit(update([0.0, beyond]))
