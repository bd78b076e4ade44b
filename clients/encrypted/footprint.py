"""How much memory a tree of processes takes, and what one can give back without giving up anything.

The figure is the sum of the proportional set sizes (PSS, `/proc/<pid>/smaps_rollup`) and of the swap of a process and
all its descendants. PSS divides a page by the processes that map it, so that the sum counts once what workers share; a
sum of resident sizes counts it once a worker, and one of unique sizes (USS) never, like mapped files. Systems without
PSS give USS; of a process that may not be looked into, its resident size counts. Pages of files that nobody maps belong
to no process: the kernel takes them back before it kills anybody, so they do not count.
"""

from __future__ import annotations

import ctypes
from typing import Final

import psutil

MB: Final = 2**20
"""Bytes of what is called a MB here, as by `free -m`."""


def tree_mb(process: psutil.Process) -> float:
    """MB of a process and all its descendants: PSS and swap, or the nearest that the system tells (see the module)."""
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    return sum(map(_bytes_of, family)) / MB


def _bytes_of(process: psutil.Process) -> int:
    try:
        memory = process.memory_full_info()
    except psutil.AccessDenied:
        return _resident(process)
    except psutil.NoSuchProcess:
        return 0  # it ended between the listing and the look
    return int(getattr(memory, "pss", memory.uss)) + int(getattr(memory, "swap", 0))


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def trim() -> bool:
    """Gives free memory of this process' C heap back to the system; False where there is no glibc, or none was free.

    glibc keeps freed arrays of up to 32 MB for later. This returns whole free pages, from the middle of the heap, too:
    300 MB in 14 ms. To have large blocks mapped anew each time (`clients.lora.profile.return_freed_memory`) keeps
    nothing back either, but work on arrays of 1 MB then took 1.2 ms where it had taken 0.23.
    """
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError):
        return False
