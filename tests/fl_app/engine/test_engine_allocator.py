"""Freed memory is kept: the second of two equal allocations faults in no page."""

import os
import subprocess
import sys

import pytest

_PROBE = """
import resource
import torch
from fl_app.engine.allocator import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        [torch.ones(5_000_000) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
many = faults()
kept = keep_freed_memory()
faults()
print(many, kept, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_that_was_freed_is_not_faulted_in_again():
    # glibc raises its threshold by itself after the first large block, or not, as the heap happens to lie.
    fixed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True, env=fixed
    )
    many, kept, few = done.stdout.split()
    assert kept == "True"
    assert int(many) > 1000
    assert int(few) < int(many) / 10
