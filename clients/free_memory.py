"""How much memory this process may have: the machine's, and no more than its control groups allow.

On Linux a service (systemd's `MemoryMax=`) or a container has a limit of its own, below which the machine's figure
says nothing: whoever goes past it is killed. Both versions of control groups are read, each group up to the root, since
the tightest one counts ("Control Group v2", Documentation/admin-guide/cgroup-v2.rst of the Linux kernel, section
"Memory"). What is filed away of the page cache can be taken back and counts as free. Elsewhere only the machine counts.
This file knows nothing of what the memory is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import psutil

_NO_LIMIT: Final = 2**62
"""Version 1 writes the largest multiple of a page below 2^63 where there is no limit."""


@dataclass(frozen=True)
class Group:
    """A control group that limits memory.

    Attributes:
        limit: bytes that all its processes may have.
        used: bytes that they have and cannot be taken back.
    """

    limit: int
    used: int


def total_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process could have if it were alone.

    Args:
        root: below which `/proc` and `/sys` are looked for.
    """
    total: int = psutil.virtual_memory().total
    return min([total, *(group.limit for group in groups(root))])


def free_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process could still take.

    Args:
        root: as in `total_bytes`.
    """
    available: int = psutil.virtual_memory().available
    return min([available, *(max(0, group.limit - group.used) for group in groups(root))])


def groups(root: Path) -> Iterator[Group]:
    """The control groups above this process that limit memory, of either version."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield from _limits(root / "sys/fs/cgroup", path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            files = "memory.limit_in_bytes", "memory.usage_in_bytes"
            yield from _limits(root / "sys/fs/cgroup/memory", path, *files)


def _limits(mount: Path, path: str, limit_file: str, used_file: str) -> Iterator[Group]:
    """Of a group and all above it; within a container the mount's root is the group itself, under no name."""
    inner = PurePosixPath(path.lstrip("/"))
    # A path with `..` is of a group outside of this namespace, which can't be seen from here.
    named = [] if ".." in inner.parts else [inner, *inner.parents]
    for folder in dict.fromkeys([*(mount / one for one in named), mount]):
        limit, used = _number(folder / limit_file), _number(folder / used_file)
        if limit is not None and used is not None and limit < _NO_LIMIT:
            yield Group(limit, max(0, used - _reclaimable(folder / "memory.stat")))


def _reclaimable(path: Path) -> int:
    """Bytes of the page cache that were not used lately."""
    counts = dict(line.rpartition(" ")[::2] for line in _text(path).splitlines())
    said = counts.get("total_inactive_file", counts.get("inactive_file", "0"))
    return int(said) if said.isdecimal() else 0


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
