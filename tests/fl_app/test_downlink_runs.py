"""Down-link compression as a user runs it: the same model whoever trains it, whatever is lost, resumed, refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.fl_app.test_run import assert_same_model, model_of, rows, run

DELTA = ["downlink=delta", "num_clients=6"]


def bytes_down(summary) -> list[int]:
    return [row["download_bytes"] for row in summary["history"]]


def held(result) -> Path:
    return result.summary_path.parent / "clients" / "held"


def test_a_run_learns_as_well_in_less_than_half_of_the_bytes(tmp_path):
    _, whole, _ = run(tmp_path / "whole", "num_clients=6", "rounds=4")
    result, summary, _ = run(tmp_path / "delta", *DELTA, "rounds=4", "downlink.bits=8")
    assert summary["final"]["accuracy"] == pytest.approx(whole["final"]["accuracy"], abs=0.03)
    first, *others = bytes_down(summary)
    assert first == pytest.approx(bytes_down(whole)[0], rel=0.02)
    assert max(others) < first / 2.5
    assert summary["rejections"] == {}
    assert [row["upload_bytes"] for row in summary["history"]] == [
        row["upload_bytes"] for row in whole["history"]
    ]
    assert len(list(held(result).iterdir())) == 4


@pytest.mark.parametrize(
    "chosen",
    [
        ["strategy=scaffold", "evaluate.federated_every=1"],
        ["strategy=secure"],
        ["strategy=fedbuff", "runtime.devices.speed_sigma=1"],
        ["strategy=multi_krum", "attack=ipm", "travel=[layers.1.*]", "downlink.codec=zlib"],
    ],
    ids=["scaffold and evaluated", "masked", "buffered", "attacked, and part of the model"],
)
def test_neither_workers_nor_a_restart_change_the_model_or_the_bytes(tmp_path, chosen):
    """With clients that are asked now and then, and hold versions of all ages."""
    chosen = [*DELTA, *chosen, "num_clients=10", "sampler.fraction=0.7", "downlink.versions=2"]
    whole, summary, _ = run(tmp_path / "whole", *chosen, "rounds=4")
    run(tmp_path / "parts", *chosen, "rounds=2")
    parts, resumed, _ = run(tmp_path / "parts", *chosen, "rounds=4", "runtime.workers=2")
    assert_same_model(whole, parts)
    # The sizes of masked messages follow who drew whom; a buffered run asks again for what was under way.
    if {"strategy=secure", "strategy=fedbuff"} & {*chosen}:
        learned = [(row["loss"], row["accuracy"]) for row in summary["history"]]
        assert learned == [(row["loss"], row["accuracy"]) for row in resumed["history"]]
    else:
        assert rows(summary) == rows(resumed)
    assert summary["rejections"] == resumed["rejections"] == {}


@pytest.mark.slow
def test_masked_clients_come_to_the_plain_model(tmp_path):
    """Up to the masks' rounding, which may move an element to the next step of the grid: 2⁻⁸ of the rms."""
    plain, _, _ = run(tmp_path / "plain", *DELTA, "rounds=3")
    masked, _, _ = run(tmp_path / "masked", *DELTA, "strategy=secure", "rounds=3")
    for name, array in model_of(plain).items():
        rms = float(np.sqrt(np.mean(np.square(array))))
        np.testing.assert_allclose(model_of(masked)[name], array, rtol=0, atol=rms * 2**-8)


def test_clients_that_lose_what_they_held_are_sent_the_whole_in_the_same_round(tmp_path):
    whole, summary, _ = run(tmp_path / "whole", *DELTA, "rounds=4")
    broken, _, _ = run(tmp_path / "broken", *DELTA, "rounds=2")
    first, second = held(broken).iterdir()
    first.unlink()
    second.write_bytes(second.read_bytes()[:-5])
    again, resumed, _ = run(tmp_path / "broken", *DELTA, "rounds=4")
    assert_same_model(whole, again)
    assert resumed["rejections"] == {}
    assert [row["clients_failed"] for row in resumed["history"]] == [0] * 4
    assert bytes_down(resumed)[2] > bytes_down(summary)[2]
    assert bytes_down(resumed)[3] == bytes_down(summary)[3]


@pytest.mark.slow
def test_drop_outs_cost_no_whole_models(tmp_path):
    """A client that was not reached holds what it held."""
    chosen = [*DELTA, "runtime.dropout=0.4", "downlink.versions=4"]
    result, summary, _ = run(tmp_path, *chosen, "rounds=10")
    whole = bytes_down(summary)[0] / 6
    assert sum(row["clients_failed"] for row in summary["history"]) > 10
    assert sum(bytes_down(summary)[4:]) < 6 * 6 * whole * 0.6
    assert len(list(held(result).iterdir())) == 2 * 4


@pytest.mark.slow
def test_private_runs_compress_what_they_have_released(tmp_path):
    _, summary, _ = run(tmp_path, *DELTA, "strategy=dp", "privacy.target_epsilon=8", "rounds=3")
    assert summary["status"] == "completed"
    assert summary["privacy"]["epsilon"] <= 8
    # Who is asked is a matter of coins, and so are the bytes.
    assert summary["rejections"] == {}


@pytest.mark.slow
def test_uploads_take_the_time_that_they_take_whole(tmp_path):
    """On the engine's clock a smaller request is no smaller reply."""
    slow = ["runtime.devices.bandwidth_mbps=0.1", "runtime.devices.seconds_per_example=0"]
    _, whole, _ = run(tmp_path / "whole", *slow, "num_clients=6", "rounds=2")
    _, summary, _ = run(tmp_path / "delta", *slow, *DELTA, "rounds=2")
    up = 8e-6 * summary["history"][0]["upload_bytes"] / 6 / 0.1
    ends = [[row["virtual_seconds"] for row in one["history"]] for one in (whole, summary)]
    (first, both), (_, less) = ends
    assert up < less - first < both - first - up / 3
