"""Torch on one thread, where a process is to be forked afterwards.

The first parallel loop of a process starts OpenMP's threads. A fork doesn't inherit them, but believes that it has, and
hangs at its own first parallel loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """No parallel loop inside; afterwards torch has as many threads as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
