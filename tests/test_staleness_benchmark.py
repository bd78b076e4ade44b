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


def ends_of(benchmark, *ways):
    """How far from the optimum each of these ways ends, as a share of how far it began."""
    start = benchmark.START * benchmark.SIZE**0.5  # but for the optima's own spread
    ends = []
    for name in ways:
        distances, age = benchmark.run(0, **benchmark.WAYS[name])
        ends.append(distances[-1] / start)
        assert age > 7 or name == "five busy"
    return ends


def test_a_high_rate_diverges_on_old_updates_and_converges_with_weights_and_damping(benchmark):
    neither, both = ends_of(benchmark, "neither", "weights and damping")
    assert neither > 1_000
    assert both < 1 / 40


@pytest.mark.slow
def test_each_way_ends_where_the_document_says(benchmark):
    neither, weights, damping, few = ends_of(
        benchmark, "neither", "weights", "damping", "five busy"
    )
    assert weights < neither / 100
    assert damping < 1 / 40
    assert few < 1 / 10
