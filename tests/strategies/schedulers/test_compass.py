"""Local steps by measured speed: Q_min ≤ steps ≤ Q_max, and groups that arrive together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.schedulers import Buffered, Compass

PACES = st.lists(st.floats(0.01, 100), min_size=1, max_size=12)


def arrivals(compass: Compass, paces: list[float], now: float = 0.0) -> list[tuple[int, float]]:
    """Steps and arrival of each client, which all begin now."""
    for client, pace in enumerate(paces):
        compass.measured(client, pace * 10, 10)
    given_steps = [compass.steps(client, now) for client in range(len(paces))]
    return [(steps, now + steps * pace) for steps, pace in zip(given_steps, paces, strict=True)]


def test_a_client_whose_speed_is_not_known_is_given_the_most():
    assert Compass(least_steps=2, most_steps=20).steps(3, 0.0) == 20


def test_clients_up_to_a_factor_of_most_over_least_apart_arrive_together():
    """The fastest begins a group with the most steps; slower ones take as many as fit before its arrival."""
    found = arrivals(Compass(least_steps=5, most_steps=50), [1.0, 2.0, 5.0, 10.0])
    assert [steps for steps, _ in found] == [50, 25, 10, 5]
    assert [arrival for _, arrival in found] == [50.0] * 4


def test_one_that_would_need_fewer_than_the_least_begins_a_group_that_others_join():
    compass = Compass(least_steps=5, most_steps=50)
    found = arrivals(compass, [1.0, 20.0])
    assert found[0] == (50, 50.0)
    steps, arrival = found[1]
    # With the group that comes when the fast one comes again (50 + 50 · 1 s): 100 s at 20 s a step.
    assert (steps, arrival) == (5, 100.0)


@given(PACES, st.integers(1, 10), st.integers(0, 90), st.floats(0, 1e4))
def test_steps_stay_within_their_bounds(paces, least, more, now):
    compass = Compass(least_steps=least, most_steps=least + more)
    for steps, _ in arrivals(compass, paces, now):
        assert least <= steps <= least + more


@given(PACES)
def test_whoever_joins_a_group_arrives_no_later_than_its_slack(paces):
    compass = Compass(least_steps=1, most_steps=50, slack=0.5)
    arrivals(compass, paces)
    for client, (expected, steps) in compass._arrivals.items():
        assert steps * paces[client] <= expected + 0.5 + 1e-9 * expected


def test_speed_follows_the_measurements():
    compass = Compass()
    compass.measured(1, 10.0, 10)
    compass.measured(1, 30.0, 10)
    assert compass._seconds[1] == pytest.approx(2.0)
    compass.measured(1, 20.0, 10)
    assert compass._seconds[1] == pytest.approx(2.0)


@given(PACES, st.floats(0, 100))
def test_a_later_process_gives_the_same_steps(paces, now):
    one, other = Compass(), Compass()
    arrivals(one, paces)
    other.load_state_dict(one.state_dict())
    clients = [*range(len(paces)), 99]
    assert [one.steps(c, now) for c in clients] == [other.steps(c, now) for c in clients]


@pytest.mark.parametrize("state", [{}, {"clients": 1}, {"clients": np.zeros(1)}])
def test_another_parts_state_is_refused(state):
    with pytest.raises(ValueError, match="compass"):
        Compass().load_state_dict(state)


def test_settings_that_no_steps_are_in_are_refused():
    with pytest.raises(ValueError, match="least_steps = 9 is above most_steps = 8"):
        Compass(least_steps=9, most_steps=8)
    with pytest.raises(ValueError, match="members of one sum train alike"):
        Buffered(pace=Compass(), cohort=3)
