"""Whether a device has the power to train: its battery, and the guard that has training wait for it.

A guard is asked often, between two batches, and looks at the battery at most every few seconds. What it answers is for
the device's own log: a server is told `paused` and no figure. A battery that cannot be read when the device's operator
said where it stands is as good as a low one, since going on is what may not be undone; a device without any battery
has no reason to wait. This file knows nothing of training, nor of what becomes of a job that waits.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Protocol

import psutil
from annotated_types import Ge, Gt, Le

from strategies import plain_json
from strategies.ranges import Ranged

log = logging.getLogger(__name__)

LEAST_BATTERY: Final = 15.0
"""Percent, below which a device that nobody told otherwise does not train on its battery."""

_MOST_BYTES: Final = 4096
"""A longer file holds something else than a battery's state."""


class PowerError(RuntimeError):
    """A battery's state that cannot be read, or is none; says where it was looked for."""


@dataclass(frozen=True)
class Power:
    """A battery at some moment.

    Attributes:
        percent: of its charge, 0 to 100.
        plugged: whether it is being charged, or would be.
    """

    percent: float
    plugged: bool


class PowerSource(Protocol):
    """What tells of a device's battery."""

    def read(self) -> Power | None:
        """Its state now; None where the device has none.

        Raises:
            PowerError: there is one, and what it tells can't be read.
        """
        ...


@dataclass(frozen=True)
class SystemPower:
    """The battery that the operating system knows of."""

    def read(self) -> Power | None:
        """As `PowerSource.read`; None as well where the system has no way to tell."""
        sensor: Callable[[], Any] | None = getattr(psutil, "sensors_battery", None)
        try:
            found = None if sensor is None else sensor()
        except (OSError, ValueError, NotImplementedError):  # of a kernel without that table
            return None
        if found is None:
            return None
        # Where the system can't say whether it is plugged, a battery is taken to be in use.
        return Power(float(found.percent), found.power_plugged is True)


@dataclass(frozen=True)
class FilePower:
    """A battery whose state somebody else writes down, for devices without a system's own.

    Attributes:
        path: a JSON file such as `{"percent": 57, "plugged": false}`; whoever writes it puts it there whole, by a
            rename.
    """

    path: Path

    def read(self) -> Power:
        """As `PowerSource.read`; a device with such a file has a battery."""
        try:
            with self.path.open("rb") as file:
                text = file.read(_MOST_BYTES + 1)
            found: Any = plain_json.loads(text) if len(text) <= _MOST_BYTES else None
        except (OSError, ValueError, RecursionError) as error:
            raise PowerError(f"the battery's file {self.path} can't be read: {error}") from error
        percent: Any = found.get("percent") if isinstance(found, dict) else None
        plugged = found.get("plugged") if isinstance(found, dict) else None
        number = isinstance(percent, int | float) and not isinstance(percent, bool)
        if not number or not 0 <= percent <= 100:  # NaN is not, either
            raise PowerError(f"{self.path} should say percent, a battery's, from 0 to 100")
        if not isinstance(plugged, bool):
            raise PowerError(f"{self.path} should say plugged, true or false, of a battery")
        return Power(float(percent), plugged)


@dataclass
class PowerGuard(Ranged):
    """Says whether training has to wait, and for what; called as often as one likes.

    Attributes:
        source: the battery.
        least: percent of charge that training on the battery needs.
        every: seconds between two looks at it.
        clock: seconds of a clock that never steps back.
    """

    source: PowerSource
    least: Annotated[float, Gt(0), Le(100)] = LEAST_BATTERY
    every: Annotated[float, Ge(0)] = 2.0
    clock: Callable[[], float] = time.monotonic
    _looked: float = field(default=-math.inf, init=False)
    _reason: str | None = field(default=None, init=False)

    def __call__(self) -> str | None:
        """Why training waits; None where it may go on."""
        now = self.clock()
        if now - self._looked >= self.every:
            reason, self._looked = self._look(), now
            if (reason is None) is not (self._reason is None):
                log.warning("%s", reason or "there is power again: this device trains")
            self._reason = reason
        return self._reason

    def _look(self) -> str | None:
        try:
            power = self.source.read()
        except PowerError as error:
            return f"this device does not train: {error}"
        if power is None or power.plugged or power.percent >= self.least:
            return None
        return (
            f"this device does not train: its battery is at {power.percent:.0f} %, and device-least-battery is"
            f" {self.least:g}"
        )
