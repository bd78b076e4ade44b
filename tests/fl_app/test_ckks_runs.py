"""`strategy=ckks_mean` as a user runs it: on the engine, with workers and drop-outs, its key made by the command."""

import os
import stat

import numpy as np
import pytest

from fl_app.cli import keys
from fl_app.config.faults import ConfigError
from strategies.ckks import SharedKey
from strategies.collectors import Ckks
from strategies.collectors.ckks import KEY_SETTING
from strategies.protocols import ClientOwn
from tests.fl_app.test_run import model_of, run

CKKS = ["strategy=ckks_mean", "num_clients=6", "task.partition=iid"]


def apart(one, other) -> float:
    """The largest difference between two runs' models."""
    first, second = model_of(one), model_of(other)
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_a_run_gives_the_plain_means_model_within_the_ciphertexts_error(tmp_path, weighting):
    by = ["combiner=uniform_mean"] if weighting == "uniform" else []
    own = ["collector.max_weight=null"] if weighting == "uniform" else []
    encrypted, summary, lines = run(tmp_path / "a", *CKKS, *by, *own, "rounds=2")
    plain, _, _ = run(tmp_path / "b", *CKKS, "collector=plain", *by, "rounds=2")
    assert summary["status"] == "completed"
    assert apart(encrypted, plain) < 5e-6
    assert "train_loss" in summary["history"][0]["train"]
    assert summary["history"][0]["train"]["saturated"] == pytest.approx(0, abs=1e-6)
    assert "CKKS, degree 4096" in lines[0]


def test_the_number_of_workers_changes_nothing_beyond_the_noise(tmp_path):
    one, _, _ = run(tmp_path / "one", *CKKS, "rounds=2")
    two, _, _ = run(tmp_path / "two", *CKKS, "rounds=2", "runtime.workers=2")
    assert apart(one, two) < 5e-6


def test_drop_outs_in_either_phase_leave_the_others_mean(tmp_path):
    chosen = [*CKKS, "num_clients=10", "runtime.dropout=0.3", "admission.on_shortfall=skip"]
    _, summary, _ = run(tmp_path, *chosen, "rounds=6")
    assert summary["status"] == "completed"
    assert sum(row["clients_failed"] for row in summary["history"]) > 5
    assert not any(row["void"] for row in summary["history"])


def test_a_run_is_resumed_under_the_same_key(tmp_path):
    run(tmp_path, *CKKS, "rounds=1")
    (path,) = tmp_path.glob("*/clients/ckks/shared.key")
    before = SharedKey.load(path).fingerprint
    _, summary, lines = run(tmp_path, *CKKS, "rounds=3")
    assert summary["rounds_completed"] == 3
    assert "goes on after round 1" in lines
    assert SharedKey.load(path).fingerprint == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_key_that_is_named_is_used(tmp_path):
    key = SharedKey.generate()
    key.save(tmp_path / "named.key")
    _, summary, _ = run(tmp_path, *CKKS, "rounds=1", f"collector.key={tmp_path / 'named.key'}")
    assert summary["status"] == "completed"
    assert not list(tmp_path.glob("*/clients/ckks/shared.key"))


def test_the_servers_process_never_holds_the_key(tmp_path, monkeypatch):
    """With workers of their own for the clients, nothing in the server's process ever makes or loads a key."""
    made, load = tmp_path / "made", SharedKey.__init__

    def watched(self, *arguments):
        with made.open("a") as file:  # the workers are forks, and have this too
            file.write(f"{os.getpid()}\n")
        load(self, *arguments)

    monkeypatch.setattr(SharedKey, "__init__", watched)
    _, summary, _ = run(tmp_path, *CKKS, "rounds=1", "runtime.workers=2")
    assert summary["status"] == "completed"
    assert list(tmp_path.glob("*/clients/ckks/shared.key"))
    where = set(map(int, made.read_text().split()))
    assert where
    assert os.getpid() not in where


def test_checkpoints_and_summary_hold_nothing_of_the_key(tmp_path):
    run(tmp_path, *CKKS, "rounds=1")
    (path,) = tmp_path.glob("*/clients/ckks/shared.key")
    secret = path.read_bytes()[-64:]
    others = [one for one in tmp_path.rglob("*") if one.is_file() and one != path]
    assert len(others) > 5
    assert not any(secret in one.read_bytes() for one in others)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (["combiner=krum"], "sum only"),
        (["combiner=uniform_mean"], "max_weight"),
        (["num_clients=2"], "no sum of fewer than 3"),
        (["num_clients=101"], "members=101"),
        (["collector.bits=[60,60]"], "degree 4096"),
        (["attack=alie"], "honest"),
        (["quarantine=strikes"], "quarantine"),
    ],
)
def test_what_does_not_go_with_encrypted_sums_is_refused_with_the_mend(tmp_path, chosen, said):
    with pytest.raises(ConfigError, match=said):
        run(tmp_path, *CKKS, *chosen)


# ---- keys ----


def test_the_command_makes_a_key_and_prints_its_fingerprint(tmp_path, capsys):
    path = tmp_path / "shared.key"
    assert keys.main(["ckks", str(path)]) == 0
    assert capsys.readouterr().out.strip() == SharedKey.load(path).fingerprint
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.main(["ckks", str(path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert keys.main(["ckks", "--degree", "8192", str(tmp_path / "large.key")]) == 0
    assert SharedKey.load(tmp_path / "large.key").ring == (8192, (60,))


def test_a_device_takes_its_key_from_its_own_node_config_alone(tmp_path):
    SharedKey.generate().save(tmp_path / "device.key")
    SharedKey.generate().save(tmp_path / "servers.key")
    collector = Ckks(key=tmp_path / "servers.key")
    with pytest.raises(ValueError, match="trellis keys ckks"):
        collector.client_half(ClientOwn(tmp_path, {}, simulated=False))
    named = {KEY_SETTING: str(tmp_path / "device.key")}
    half = collector.client_half(ClientOwn(tmp_path, named, simulated=False))
    assert half._key.fingerprint == SharedKey.load(tmp_path / "device.key").fingerprint
    missing = collector.client_half(
        ClientOwn(tmp_path, {KEY_SETTING: str(tmp_path / "no")}, simulated=False)
    )
    with pytest.raises(ValueError, match="cannot read the CKKS key"):
        _ = missing._key
    assert not (tmp_path / "no").exists()


def test_a_run_whose_openers_are_all_gone_says_why_it_is_void(tmp_path):
    result, summary, _ = run(
        tmp_path, *CKKS, "runtime.dropout=1", "rounds=1", "admission.on_shortfall=skip"
    )
    assert result.status == "failed"
    assert "members are left to open the sum, 2 must agree" in summary["history"][0]["void_reason"]
