"""A machine: what is installed, its processors, memory, disks, descriptors, ports, battery, and what died on it before.

Nothing here knows of a server, a key or a run; limits below which it warns are what a ClientApp was seen to need.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Final

import psutil
from packaging.requirements import Requirement

from clients.free_memory import free_bytes, total_bytes
from clients.power import LEAST_BATTERY, PowerError, PowerSource
from fl_app.checks.check import Finding, together
from fl_app.checks.place import nearest_existing
from fl_app.cli.console import human_bytes
from fl_app.identity import code_hash

_DISTRIBUTION: Final = "trellis-fl"
_SHOWN: Final = ("flwr", "torch")
_ROOMY: Final = 2_000_000_000
_CRAMPED: Final = 200_000_000
"""Bytes of a disk below which it warns, and below which it is a no-go."""
_MANY_FILES: Final = 1024
_FEW_FILES: Final = 256
_TIGHT: Final = 0.9
_LISTED: Final = 4
_ROOT: Final = Path(__file__).resolve().parents[2]


def versions(constraints: Path = _ROOT / "constraints.txt") -> Finding:
    """What is installed, against what Trellis needs and was tested with; and the code's hash, for comparison.

    Args:
        constraints: exact versions, a line each; where there is no such file, nothing is held against it.
    """
    shown = ", ".join(f"{name} {_version(name) or 'missing'}" for name in _SHOWN)
    said = (
        f"Python {platform.python_version()}, trellis {_version(_DISTRIBUTION) or '(not installed)'}, {shown};"
        f" code {code_hash()[:12]}"
    )
    wrong = list(_unmet())
    if wrong:
        told = f"{said}; {_few(wrong)}"
        return Finding("failed", told, "pip install with the versions of constraints.txt")
    apart = [
        f"{name} is {_version(name)}, not {wanted}"
        for name, wanted in _pinned(constraints)
        if (_version(name) or wanted).partition("+")[0] != wanted  # 2.13.0+cpu is 2.13.0
    ]
    if apart:
        return Finding(
            "warning",
            f"{said}; {_few(apart)} of constraints.txt",
            "pip install -c constraints.txt, as on the server",
        )
    return Finding("ok", said)


def _unmet() -> Iterator[str]:
    try:
        needed = requires(_DISTRIBUTION) or []
    except PackageNotFoundError:
        return
    for text in needed:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None:
            yield f"{requirement.name} is missing"
        elif not requirement.specifier.contains(found, prereleases=True):
            yield f"{requirement.name} is {found}, and {requirement.specifier} is needed"


def _pinned(path: Path) -> Iterator[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        name, equals, wanted = line.partition("#")[0].strip().partition("==")
        if equals:
            yield name, wanted


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _few(items: Sequence[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return "; ".join(items[:_LISTED]) + more


def processors() -> Finding:
    """Processors that this process may use, and how busy they are."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0]
    said = f"{count} processors, load {load:.2g}"
    if load > 1.5 * (count or 1):
        return Finding("warning", said, "end what else runs here, or expect slow rounds")
    return Finding("ok", said)


def memory(needed: int | None) -> Finding:
    """Memory there is and memory that is free, against what a ClientApp takes.

    Args:
        needed: bytes of one, measured; None where that is not known.
    """
    free, total = free_bytes(), total_bytes()
    said = f"{human_bytes(free)} of {human_bytes(total)} are free"
    if needed is None:
        return Finding("ok", f"{said}; what a ClientApp takes could not be measured")
    said += f", and a ClientApp of this model takes about {human_bytes(needed)}"
    mend = "end what else runs here, lower client.batch_size, or take a smaller model"
    if needed > free:
        return Finding("failed", said, mend)
    return Finding("warning", said, mend) if needed > _TIGHT * free else Finding("ok", said)


def disks(places: Mapping[str, Path]) -> Finding:
    """Room at each of some places, and whether they can be written.

    Args:
        places: by what is kept there.
    """
    return together([_disk(name, path) for name, path in places.items()])


def _disk(name: str, path: Path) -> Finding:
    there = nearest_existing(path)
    if not there.is_dir():
        return Finding("failed", f"{name}: {there} is a file", f"remove it, or move {name}")
    if not os.access(there, os.W_OK | os.X_OK):
        mend = f"change the owner of {there}, or move {name}"
        return Finding("failed", f"{name}: {there} can't be written", mend)
    free = shutil.disk_usage(there).free
    said = f"{name} ({path}): {human_bytes(free)} free"
    if free >= _ROOMY:
        return Finding("ok", said)
    return Finding("warning" if free >= _CRAMPED else "failed", said, f"free some for {name}")


def descriptors() -> Finding:
    """How many files a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _MANY_FILES:
        return Finding(
            "ok", f"a process may open {soft} files" if soft > 0 else "any number of files"
        )
    mend = "ulimit -n 4096, or LimitNOFILE=4096 in a systemd unit"
    said = f"a process may open {soft} files ({hard} at most)"
    return Finding("warning" if soft >= _FEW_FILES else "failed", said, mend)


def port(number: int, host: str = "127.0.0.1") -> Finding:
    """Whether the port that a SuperNode's own programs talk over is free."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((host, number))
        except OSError as error:
            said = f"{host}:{number} is not free ({error.strerror})"
            mend = "if no SuperNode of yours runs here, start it with another --port"
            return Finding("warning", said, mend)
    return Finding("ok", f"{host}:{number} is free")


def battery(source: PowerSource, least: float = LEAST_BATTERY) -> Finding:
    """The battery, if there is one.

    Args:
        source: that tells of it.
        least: percent below which the device does not train on it.
    """
    try:
        power = source.read()
    except PowerError as error:
        return Finding("failed", str(error), "mend the file that device-power-file names")
    if power is None:
        return Finding("ok", "no battery is known of: mains")
    said = f"at {power.percent:.0f}%, {'plugged in' if power.plugged else 'in use'}"
    if power.plugged or power.percent >= least:
        return Finding("ok", said)
    mend = "plug it in, or lower device-least-battery in the node config"
    return Finding("warning", f"{said}: training waits below {least:g}%", mend)


def leftovers(folders: Sequence[Path] = (_ROOT, Path())) -> Finding:
    """What runs on Flower left behind whose starter was killed.

    Args:
        folders: below whose `.flwr` it is looked for.
    """
    found = {
        home.resolve()
        for folder in folders
        for home in (folder / ".flwr").glob("run-*-*")
        if not _alive(home.name.split("-")[1])
    }
    if not found:
        return Finding("ok", "nothing is left of killed runs")
    places = " ".join(sorted(map(str, found))[:_LISTED])
    return Finding("warning", f"{len(found)} folders of killed runs: {places}", f"rm -r {places}")


def _alive(number: str) -> bool:
    return number.isdecimal() and psutil.pid_exists(int(number))
