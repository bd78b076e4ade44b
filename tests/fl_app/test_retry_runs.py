"""Runs on the engine in which clients fail: who fails for good is left out, who fails once is not seen to have."""

import json
import time

import numpy as np
from safetensors.numpy import load_file

from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.run import run_engine

SMALL = [
    "task=digits", "num_clients=5", "runtime.workers=1", "rounds=3", "evaluate.every=3",
    "client._target_=tests.support.models.Unlucky",
]  # fmt: skip


def run(folder, *overrides: str):
    result = run_engine(compose([*SMALL, f"output_dir={folder}", *overrides]), PlainConsole())
    summary = json.loads(result.summary_path.read_text())
    return result, summary, load_file(result.summary_path.parent / "model.safetensors")


def test_one_bad_client_of_five_in_each_round(tmp_path):
    result, summary, _ = run(tmp_path, "client.always=3")
    assert (result.status, result.exit_code) == ("completed", 0)
    assert [row["clients_failed"] for row in summary["history"]] == [1, 1, 1]
    assert [row["clients_sampled"] for row in summary["history"]] == [5, 5, 5]


def test_a_fault_that_passes_leaves_the_model_as_it_is_without_it_and_the_clock_too(tmp_path):
    """The engine does not wait for real either: three waits of a minute are configured."""
    begun = time.monotonic()
    _, summary, model = run(
        tmp_path / "disturbed", "client.first=2", "retry.backoff_seconds=60", "retry.attempts=2"
    )
    assert time.monotonic() - begun < 60
    _, plain, expected = run(tmp_path / "plain", "retry.attempts=2")
    for name, array in expected.items():
        np.testing.assert_array_equal(model[name], array)
    for row, other in zip(summary["history"], plain["history"], strict=True):
        assert row["clients_failed"] == 0
        assert row["virtual_seconds"] == other["virtual_seconds"]


def test_how_often_is_part_of_a_run_and_how_long_is_not():
    one = compose(["task=digits"])
    assert compose(["task=digits", "retry.attempts=1"]).identity_hash() != one.identity_hash()
    same = compose(["task=digits", "retry.backoff_seconds=7"])
    assert same.identity_hash() == one.identity_hash()
