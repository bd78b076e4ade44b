"""What a device is: cores, memory, power, network, GPU, as far as its operating system tells; and the classes of it.

`measure` looks, `coarse` makes the words of `strategies.profiles` of it, and nothing else of a device ever travels:
numbers stay here. Memory counts no further than the control group of this process allows, on Linux, which is what a
service or a container really has. What no system tells is `unknown`, and never guessed. This file does not know whether
a server may be told: that is the operator's to decide (`fl_app.node`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import psutil
import torch

from clients.free_memory import free_bytes, total_bytes
from clients.power import Power, PowerError, PowerSource, SystemPower
from strategies.profiles import VOCABULARY

Network = Literal["unmetered", "metered", "unknown"]

_GIB: Final = 2**30
_CORES: Final = (2, 4, 8)
"""The most cores of each class but the last."""
_MEMORY: Final = (2, 4, 8, 16)
"""GiB below which a device is of each class but the last."""
_LOW: Final = 20.0
"""Percent of charge below which a battery in use counts as low."""
_ROUTES: Final = "proc/net/route"
_INTERFACES: Final = "sys/class/net"
_MOBILE: Final = ("wwan", "ppp", "rmnet", "ccmni")
"""How names of mobile networks' interfaces begin."""


@dataclass(frozen=True)
class DeviceProfile:
    """A device, in numbers that stay on it.

    Attributes:
        cores: that this process may use.
        memory: bytes of it that this process could have.
        free: bytes of that which nobody uses now.
        power: its battery; None where there is none, or it can't be read.
        network: kind of the network that its traffic takes.
        megabits: a second on that network's link; None where the system does not say.
        gpu: whether torch has a CUDA device.
    """

    cores: int
    memory: int
    free: int
    power: Power | None
    network: Network
    megabits: int | None
    gpu: bool


def measure(source: PowerSource | None = None) -> DeviceProfile:
    """This device, now.

    Args:
        source: of its battery; the operating system's by default.
    """
    try:
        power = (source or SystemPower()).read()
    except PowerError:
        power = None
    network, megabits = network_of(Path("/"))
    return DeviceProfile(
        cores=_cores(),
        memory=total_bytes(),
        free=free_bytes(),
        power=power,
        network=network,
        megabits=megabits,
        gpu=torch.cuda.is_available(),
    )


def coarse(profile: DeviceProfile) -> dict[str, str]:
    """The classes of a device, in the words of `strategies.profiles.VOCABULARY`."""
    words = VOCABULARY
    return {
        "cores": words["cores"][sum(profile.cores > most for most in _CORES)],
        "memory": words["memory"][sum(profile.memory >= least * _GIB for least in _MEMORY)],
        "power": _power_class(profile.power),
        "network": profile.network,
        "gpu": "yes" if profile.gpu else "none",
    }


def network_of(root: Path) -> tuple[Network, int | None]:
    """Kind and megabits a second of the network that has the default route, as far as Linux tells.

    A cable is unmetered and a mobile network metered. Wi-Fi may be either, a telephone's too, so it is unknown, as is
    what has no hardware of its own: bridges, tunnels, a container's end of a pair.

    Args:
        root: below which `/proc` and `/sys` are looked for.
    """
    name = _default_interface(root)
    if name is None:
        return "unknown", None
    folder = root / _INTERFACES / name
    megabits = _whole_number(folder / "speed")
    megabits = megabits if megabits is not None and megabits > 0 else None
    mobile = name.startswith(_MOBILE) or "DEVTYPE=wwan" in _text(folder / "uevent").split()
    if mobile:
        return "metered", megabits
    wireless = (folder / "wireless").exists() or (folder / "phy80211").exists()
    cable = (folder / "device").exists() and not wireless
    return "unmetered" if cable else "unknown", megabits


def _power_class(power: Power | None) -> str:
    if power is None or power.plugged:
        return "mains"
    return "low" if power.percent < _LOW else "battery"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1


def _default_interface(root: Path) -> str | None:
    """The interface of the default route of the least metric."""
    found: list[tuple[int, str]] = []
    for line in _text(root / _ROUTES).splitlines()[1:]:
        fields = line.split()
        if len(fields) >= 8 and fields[1] == fields[7] == "00000000" and fields[6].isdecimal():
            found.append((int(fields[6]), fields[0]))
    return min(found)[1] if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # an interface without a link has no speed to read
        return ""


def _whole_number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdecimal() else None
