"""When a device trains on its battery, and when it waits: what its guard says of every state of a battery's file."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.power import FilePower, Power, PowerError, PowerGuard, SystemPower


class Clock:
    """Time that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def battery(tmp_path: Path):
    path = tmp_path / "battery.json"

    def write(percent: object, plugged: object = False) -> FilePower:
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({"percent": percent, "plugged": plugged}))
        fresh.rename(path)
        return FilePower(path)

    return write


def test_a_file_says_what_was_written_into_it(battery):
    assert battery(57.5, True).read() == Power(57.5, True)
    assert battery(0).read() == Power(0.0, False)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "7", "null", "{}", '{"percent": 50}', "[" * 4000, "9" * 5000),
        '{"percent": "50", "plugged": false}',
        '{"percent": -1, "plugged": false}',
        '{"percent": 101, "plugged": false}',
        '{"percent": NaN, "plugged": false}',
        '{"percent": 1e999, "plugged": false}',
        '{"percent": true, "plugged": false}',
        '{"percent": 50, "plugged": 1}',
    ],
)
def test_a_file_that_says_something_else_is_no_battery(tmp_path, text):
    path = tmp_path / "battery.json"
    path.write_text(text)
    with pytest.raises(PowerError, match="battery"):
        FilePower(path).read()
    assert "does not train" in (PowerGuard(FilePower(path))() or "")


def test_a_file_that_is_not_there_has_training_wait(tmp_path):
    guard = PowerGuard(FilePower(tmp_path / "gone.json"))
    assert f"{tmp_path}/gone.json can't be read" in (guard() or "")


def test_the_systems_battery_is_taken_as_it_is(monkeypatch):
    for found, power in (
        (None, None),
        (SimpleNamespace(percent=41, power_plugged=True), Power(41.0, True)),
        (SimpleNamespace(percent=41, power_plugged=None), Power(41.0, False)),
    ):
        monkeypatch.setattr(psutil, "sensors_battery", lambda found=found: found, raising=False)
        assert SystemPower().read() == power
    monkeypatch.delattr(psutil, "sensors_battery")
    assert SystemPower().read() is None


@given(
    percent=st.floats(0, 100),
    plugged=st.booleans(),
    least=st.floats(0, 100, exclude_min=True),
)
def test_training_waits_for_a_low_battery_that_is_in_use_and_for_nothing_else(
    percent, plugged, least
):
    source = SimpleNamespace(read=lambda: Power(percent, plugged))
    waits = PowerGuard(source, least=least)() is not None
    assert waits is (percent < least and not plugged)


def test_a_device_without_a_battery_trains():
    assert PowerGuard(SimpleNamespace(read=lambda: None))() is None


def test_the_battery_is_looked_at_every_few_seconds_however_often_one_asks(battery, caplog):
    clock = Clock()
    guard = PowerGuard(battery(80), least=15, every=2.0, clock=clock)
    assert guard() is None
    battery(10)
    clock.now += 1.9
    assert guard() is None
    clock.now += 0.2
    with caplog.at_level(logging.WARNING):
        assert "battery is at 10 %, and device-least-battery is 15" in (guard() or "")
        battery(16)
        assert guard() is not None
        clock.now += 2.0
        assert guard() is None
        clock.now += 2.0
        assert guard() is None
    assert len(caplog.messages) == 2  # one when it waits, one when it goes on


@pytest.mark.parametrize(("name", "value"), [("least", 0), ("least", 101), ("every", -1)])
def test_a_guards_settings_have_ranges(battery, name, value):
    with pytest.raises(ValueError, match=rf"PowerGuard\.{name} = {value}"):
        PowerGuard(battery(50), **{name: value})
