"""Runs on the engine in which clients fail: who fails for good is left out, who fails once is not seen to have."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from safetensors.numpy import load_file

from clients.client import NUM_CLIENTS
from fl_app.assembly import Assembly, make_client
from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.engine.flwr_internals import claim_identity
from fl_app.run import run_engine
from strategies.wire import ARRAYS, CONFIG

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


def test_a_device_keeps_what_is_of_a_run_in_its_operator_s_folder(tmp_path, monkeypatch):
    """SCAFFOLD's state; another run's lies elsewhere; and nothing in the folder that the process runs in."""
    claim_identity(1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    kept = set()
    for seed in (0, 1):
        config = compose(["task=digits", "client=scaffold", "server=scaffold", f"seed={seed}"])
        assembly = Assembly(config.within(Path.cwd()))
        node = {"partition-id": 1, "client-folder": str(tmp_path / "device")}
        ours = make_client(assembly, "device", node)
        settings = {"client": 1, "server-round": 1, "version": 0, "included": 0, NUM_CLIENTS: 5}
        content = {ARRAYS: assembly.network.arrays(), CONFIG: ConfigRecord(settings)}
        (reply,) = ours.answer([Message(RecordDict(content), 1, "train")])
        assert not reply.has_error(), reply.error.reason
        kept = set((tmp_path / "device" / "runs").glob("*/client-1.safetensors"))
        assert len(kept) == seed + 1
    assert {path.stat().st_mode & 0o777 for path in kept} == {0o600}
    assert not list((tmp_path / "elsewhere").rglob("*.safetensors"))
