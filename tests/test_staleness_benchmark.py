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
        ends[name] = distances[-1]
        assert age > 7 or name == "five busy"
    start = benchmark.START * benchmark.SIZE**0.5  # but for the optima's own spread
    assert ends["neither"] > 1_000 * start
    assert max(ends["damping"], ends["weights and damping"]) < start / 40
    assert ends["five busy"] < start / 10
    assert ends["weights"] < ends["neither"] / 100
