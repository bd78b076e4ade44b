"""Memory that the kernel refuses: a real process, under a real limit of what it may map."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource")

ROOT = Path(__file__).parents[2]
ACTIVATIONS = 512 * 40_000 * 4
"""Bytes of one layer's activations of a whole batch, 82 MB; a step has three of them at its peak, and gradients."""


def trained(room: float) -> dict:
    command = [sys.executable, "-m", "tests.support.short_of_memory", str(room)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_batch_that_does_not_fit_is_gone_through_in_pieces():
    found = trained(2.0 * ACTIVATIONS)
    assert found["retries"] >= 1
    assert found["with plenty"] == 0
    assert found["apart"] < 1e-5


def test_where_not_even_one_example_fits_the_error_is_reported():
    found = trained(1e6)
    assert "can't allocate memory" in found["error"] or "MemoryError" in found["error"]
