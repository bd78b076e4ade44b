"""What docs/asynchronous.md says of stale updates at a high server rate, on one seed of its benchmark."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import staleness

    yield staleness
    for name in ("staleness", "common"):
        sys.modules.pop(name, None)


def test_a_high_rate_diverges_on_old_updates_and_converges_with_weights_and_damping(benchmark):
    ends = {}
    for name, settings in benchmark.WAYS.items():
        distances, age = benchmark.run(0, **settings)
        ends[name] = distances[-1] / distances[0]
        assert age > 7 or name == "five busy"
    assert ends["neither"] > 100
    assert ends["damping"] < 0.1
    assert ends["weights and damping"] < 0.1
    assert ends["five busy"] < 1
    assert ends["weights"] < ends["neither"]
