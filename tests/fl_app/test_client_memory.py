"""What the process of a device's client takes: below the 500 MB that a small device can spare."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "client_memory.py"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mnist", "digits"])
def test_a_client_of_the_cnn_stays_below_500_mb(tmp_path, task):
    choices = [f"task={task}", "model=cnn"]
    command = [sys.executable, str(BENCHMARK), "--client", str(tmp_path), *choices]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["imported"] < figures["peak"] < 500
