from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_app.engine import VirtualClock

moments = st.floats(0, 1e9)


def test_time_stands_still_until_somebody_sleeps() -> None:
    clock = VirtualClock(5.0)
    clock.expect(6.0)
    assert clock.now() == clock.now() == 5.0


def test_a_sleep_ends_at_the_next_event_or_after_its_seconds() -> None:
    clock = VirtualClock()
    clock.expect(3.0)
    clock.sleep(10.0)
    assert clock.now() == 3.0
    clock.expect(9.0)
    clock.sleep(2.0)
    assert clock.now() == 5.0


def test_an_event_that_has_passed_does_not_end_a_sleep() -> None:
    clock = VirtualClock(4.0)
    clock.expect(1.0)
    clock.expect(4.0)
    clock.sleep(1.0)
    assert clock.now() == 5.0


def test_an_endless_sleep_with_nothing_to_come_is_an_error() -> None:
    clock = VirtualClock()
    with pytest.raises(RuntimeError, match="never end"):
        clock.sleep(math.inf)
    clock.expect(2.0)
    clock.sleep(math.inf)
    assert clock.now() == 2.0


def test_nan_is_no_time_and_a_negative_one_is_nothing() -> None:
    clock = VirtualClock(1.0)
    with pytest.raises(ValueError, match="NaN"):
        clock.sleep(math.nan)
    clock.sleep(-3.0)
    assert clock.now() == 1.0


@given(st.lists(moments, min_size=1), moments)
def test_sleeping_on_visits_every_event_in_order(events: list[float], start: float) -> None:
    clock = VirtualClock(start)
    for event in events:
        clock.expect(event)
    visited = []
    for _ in {event for event in events if event > start}:
        clock.sleep(math.inf)
        visited.append(clock.now())
    assert visited == sorted({event for event in events if event > start})


@given(moments, moments)
def test_sleeping_until_a_deadline_reaches_it_exactly(now: float, deadline: float) -> None:
    clock = VirtualClock(now)
    for _ in range(3):
        if clock.now() >= deadline:
            return
        clock.sleep(deadline - clock.now())
    assert clock.now() >= deadline
