"""Keeps glibc from giving memory back to the system after every step, only to fault it in again at the next.

Training allocates and frees the same few megabytes without end. Past its thresholds malloc maps such blocks anew each
time, and the kernel clears every page of them.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Final

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""`M_TRIM_THRESHOLD` and `M_MMAP_THRESHOLD` of malloc.h."""

_KEPT: Final = 1 << 30
_MAPPED_FROM: Final = 32 << 20
"""glibc takes no larger one."""


def keep_freed_memory() -> bool:
    """Lets this process keep up to 1 GiB that it has freed; False where the C library offers no such thing."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _MAPPED_FROM)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))
