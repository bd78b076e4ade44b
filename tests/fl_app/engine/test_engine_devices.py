"""Statistical tests: the draws are a function of fixed seeds, so these pass always or never.

For seeds drawn afresh, each would fail a right implementation with the probability given as FALSE_ALARM.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fl_app.engine import DeviceModel, Occasion

FALSE_ALARM = 1e-6

occasions = st.builds(
    Occasion,
    seed=st.integers(0, 2**64),
    client=st.integers(0, 10**6),
    round=st.integers(1, 10**6),
    attempt=st.integers(0, 5),
)


def test_a_duration_is_latency_transfer_and_computing() -> None:
    devices = DeviceModel(seconds_per_example=0.5, latency=0.25, bandwidth_mbps=8.0)
    duration = devices.duration(
        Occasion(0, 0, 1), examples=10, down_bytes=3_000_000, up_bytes=1_000_000
    )
    assert duration == pytest.approx(2 * 0.25 + 4.0 + 5.0)


def test_a_slow_device_is_slow_in_every_round_by_its_own_factor() -> None:
    devices = DeviceModel(
        seconds_per_example=1.0, speed_sigma=1.0, latency=0.0, bandwidth_mbps=math.inf
    )
    for client in range(5):
        durations = {
            devices.duration(Occasion(3, client, round_), examples=2, down_bytes=9, up_bytes=9)
            for round_ in range(1, 4)
        }
        assert durations == {2 * devices.slowness(3, client)}


def test_jitter_differs_from_round_to_round_and_from_attempt_to_attempt() -> None:
    devices = DeviceModel(seconds_per_example=1.0, jitter_sigma=0.5)
    durations = {
        devices.duration(Occasion(0, 4, round_, attempt), examples=1, down_bytes=0, up_bytes=0)
        for round_ in (1, 2, 3)
        for attempt in (0, 1)
    }
    assert len(durations) == 6


def test_a_message_that_trains_nothing_takes_the_networks_time_only() -> None:
    devices = DeviceModel(seconds_per_example=1e6, speed_sigma=2.0, jitter_sigma=2.0, latency=0.1)
    assert devices.duration(
        Occasion(0, 0, 1), examples=0, down_bytes=0, up_bytes=0
    ) == pytest.approx(0.2)


def test_slowness_is_log_normal_with_median_one() -> None:
    devices = DeviceModel(speed_sigma=0.7)
    logs = [math.log(devices.slowness(11, client)) / 0.7 for client in range(5_000)]
    assert stats.kstest(logs, "norm").pvalue > FALSE_ALARM


def test_jitter_is_log_normal_over_clients_and_rounds() -> None:
    devices = DeviceModel(
        seconds_per_example=1.0, jitter_sigma=0.3, latency=0.0, bandwidth_mbps=math.inf
    )
    logs = [
        math.log(devices.duration(Occasion(5, c, r), examples=1, down_bytes=0, up_bytes=0)) / 0.3
        for c in range(50)
        for r in range(1, 61)
    ]
    assert stats.kstest(logs, "norm").pvalue > FALSE_ALARM


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_clients_drop_out_at_the_stated_rate(rate: float) -> None:
    devices = DeviceModel(dropout=rate)
    drops = sum(
        devices.drops_at(Occasion(1, client, round_)) is not None
        for client in range(100)
        for round_ in range(1, 101)
    )
    assert stats.binomtest(drops, 10_000, rate).pvalue > FALSE_ALARM


def test_the_phase_of_a_drop_out_is_uniform() -> None:
    devices = DeviceModel(dropout=1.0)
    phases = [devices.drops_at(Occasion(2, client, 1), phases=4) for client in range(8_000)]
    counts = np.bincount(np.array(phases), minlength=4)
    assert len(counts) == 4
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_a_drop_out_in_one_round_says_nothing_about_the_next() -> None:
    devices = DeviceModel(dropout=0.5)
    dropped = np.array(
        [[devices.drops_at(Occasion(9, c, r)) is not None for r in (1, 2)] for c in range(4_000)]
    )
    table = [[np.sum((dropped == (a, b)).all(axis=1)) for b in (0, 1)] for a in (0, 1)]
    assert stats.chi2_contingency(table).pvalue > FALSE_ALARM


def test_a_repeated_round_meets_new_luck() -> None:
    devices = DeviceModel(dropout=0.5)
    draws = {
        tuple(devices.drops_at(Occasion(0, c, 1, attempt)) is None for c in range(64))
        for attempt in range(4)
    }
    assert len(draws) == 4


@given(occasions, st.integers(1, 12))
def test_all_messages_of_a_round_agree_on_who_dropped(occasion: Occasion, phases: int) -> None:
    devices = DeviceModel(dropout=0.5)
    phase = devices.drops_at(occasion, phases)
    assert (phase is None) == (devices.drops_at(occasion) is None)
    assert phase is None or 0 <= phase < phases
    assert devices.drops_at(occasion, phases) == phase


@given(occasions)
def test_nobody_drops_out_at_rate_zero_and_everybody_at_rate_one(occasion: Occasion) -> None:
    assert DeviceModel(dropout=0.0).drops_at(occasion) is None
    assert DeviceModel(dropout=1.0).drops_at(occasion) == 0


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("seconds_per_example", -1.0),
        ("speed_sigma", -0.1),
        ("jitter_sigma", math.nan),
        ("latency", -1.0),
        ("bandwidth_mbps", 0.0),
        ("dropout", 1.5),
        ("dropout", -0.5),
        ("detection_seconds", -2.0),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value(setting: str, value: float) -> None:
    settings: dict[str, Any] = {setting: value}
    with pytest.raises(ValueError, match=f"{setting}={value!r}"):
        DeviceModel(**settings)
