"""A run from its configuration to its folder, on the engine with real data."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from fl_app.cli.console import PlainConsole
from fl_app.cli.main import main
from fl_app.compose import compose
from fl_app.config.faults import ConfigError
from fl_app.run import run_engine, serve

SMALL = ["task=digits", "num_clients=4", "runtime.workers=1"]


def run(folder: Path, *overrides: str):
    lines = io.StringIO()
    result = run_engine(compose([*SMALL, f"output_dir={folder}", *overrides]), PlainConsole(lines))
    return result, json.loads(result.summary_path.read_text()), lines.getvalue().splitlines()


def model_of(result) -> dict[str, np.ndarray]:
    return load_file(result.summary_path.parent / "model.safetensors")


def assert_same_model(one, other) -> None:
    first, second = model_of(one), model_of(other)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def rows(summary) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key != "seconds"} for row in summary["history"]
    ]


@pytest.mark.pictures
def test_a_run_leaves_everything_that_tools_rely_on(tmp_path):
    result, summary, lines = run(tmp_path, "rounds=3", "evaluate.federated_every=3")
    assert (result.status, result.exit_code, summary["status"], summary["reason"]) == (
        "completed",
        0,
        "completed",
        "",
    )
    assert set(summary) >= {
        "run_id", "status", "reason", "strategy", "task", "seed", "config_hash", "rounds_completed", "num_clients",
        "final", "history", "privacy", "totals",
    }  # fmt: skip
    assert set(summary["history"][0]) >= {
        "round", "loss", "accuracy", "seconds", "upload_bytes", "download_bytes", "clients_sampled", "clients_failed",
        "updates_rejected", "epsilon", "virtual_seconds",
    }  # fmt: skip
    assert set(summary["totals"]) == {
        "upload_bytes", "download_bytes", "wall_seconds", "virtual_seconds", "peak_rss_bytes",
    }  # fmt: skip
    assert [row["round"] for row in summary["history"]] == [1, 2, 3]
    assert summary["final"]["accuracy"] == summary["history"][-1]["accuracy"]
    assert summary["history"][-1]["federated"]["accuracy"] > 0
    assert summary["totals"]["peak_rss_bytes"] > 50e6
    clock = [row["virtual_seconds"] for row in summary["history"]]
    assert clock == sorted(clock)
    assert clock[0] > 0
    parameters = sum(array.size for array in model_of(result).values())
    assert (
        4 * 4 * parameters <= summary["history"][0]["upload_bytes"] < 4 * (4 * parameters + 2_000)
    )
    for name in ("config.yaml", "curves.png", "partition.png", "run.log"):
        assert (result.summary_path.parent / name).stat().st_size > 0
    assert lines[-1] == str(result.summary_path)
    assert result.summary_path.is_absolute()
    assert sum(line.startswith("round ") for line in lines) == 3


def test_the_number_of_workers_changes_nothing(tmp_path):
    one, summary, _ = run(tmp_path / "one", "rounds=2", "strategy=scaffold")
    two, other, _ = run(tmp_path / "two", "rounds=2", "strategy=scaffold", "runtime.workers=2")
    assert_same_model(one, two)
    assert rows(summary) == rows(other)


def test_another_seed_gives_another_model(tmp_path):
    one, _, _ = run(tmp_path, "rounds=1")
    other, _, _ = run(tmp_path, "rounds=1", "seed=1")
    assert one.summary_path != other.summary_path
    assert not np.array_equal(*(next(iter(model_of(result).values())) for result in (one, other)))


def test_a_completed_run_is_left_as_it_is(tmp_path):
    first, _, _ = run(tmp_path, "rounds=2")
    before = {
        path.name: path.stat().st_mtime_ns
        for path in first.summary_path.parent.iterdir()
        if path.is_file()
    }
    again, _, lines = run(tmp_path, "rounds=2")
    assert again.exit_code == 0
    assert lines[-1] == str(first.summary_path)
    after = {
        path.name: path.stat().st_mtime_ns
        for path in first.summary_path.parent.iterdir()
        if path.is_file()
    }
    assert {k: v for k, v in after.items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }


def test_resume_never_starts_anew(tmp_path):
    first, summary, _ = run(tmp_path, "rounds=2", "strategy=scaffold")
    model = model_of(first)
    again, other, lines = run(tmp_path, "rounds=2", "strategy=scaffold", "resume=never")
    assert summary["run_id"] != other["run_id"]
    assert sum(line.startswith("round ") for line in lines) == 2
    for name, array in model_of(again).items():
        np.testing.assert_array_equal(array, model[name])
    (said,) = [line for line in lines if "resume=never" in line]
    folder = first.summary_path.parent
    assert said.endswith(
        f"cleared an earlier run of 2 rounds (checkpoints, clients, summary.json) from {folder}"
    )


def test_resume_never_says_nothing_where_nothing_was(tmp_path):
    _, _, lines = run(tmp_path, "rounds=1", "resume=never")
    assert not [line for line in lines if "resume=never" in line]


def test_resume_must_refuses_to_begin(tmp_path):
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        run(tmp_path, "resume=must")


def test_another_configuration_in_the_same_folder_is_refused_with_the_difference(tmp_path):
    run(tmp_path, "rounds=1", "run_name=mine")
    with pytest.raises(ConfigError, match=r"client\.lr") as refused:
        run(tmp_path, "rounds=1", "run_name=mine", "client.lr=0.123")
    assert "0.123" in str(refused.value)


def test_a_torn_checkpoint_is_skipped_for_the_one_before(tmp_path):
    whole, _, _ = run(tmp_path / "whole", "rounds=4")
    first, _, _ = run(tmp_path / "torn", "rounds=3")
    newest = sorted((first.summary_path.parent / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    again, _, lines = run(tmp_path / "torn", "rounds=4")
    assert any("is skipped" in line for line in lines)
    assert "goes on after round 2" in lines
    assert_same_model(whole, again)


def test_clients_that_drop_out_are_counted_and_the_run_goes_on(tmp_path):
    _, summary, _ = run(tmp_path, "rounds=4", "num_clients=10", "runtime.dropout=0.4")
    assert summary["status"] == "completed"
    assert sum(row["clients_failed"] for row in summary["history"]) > 0
    assert summary["rejections"] == {
        "client_error": sum(row["clients_failed"] for row in summary["history"])
    }


def test_a_quorum_that_is_never_met_leaves_void_rounds_and_the_first_model(tmp_path):
    overrides = ["rounds=2", "runtime.dropout=1", "admission.on_shortfall=skip"]
    _, summary, lines = run(tmp_path, *overrides)
    assert [row["void"] for row in summary["history"]] == [True, True]
    assert any("void" in line for line in lines)
    assert summary["rounds_completed"] == 2


def test_a_rate_that_blows_up_costs_the_clients_updates_and_goes_on_to_the_last_round(tmp_path):
    _, summary, lines = run(tmp_path, "rounds=2", "client.lr=1e30", "admission.on_shortfall=skip")
    assert (summary["status"], summary["rounds_completed"]) == ("failed", 2)
    assert "no round had enough good updates" in summary["reason"]
    assert any("lower client.lr" in line for line in lines)


def test_a_loss_that_is_not_finite_stops_the_run_by_its_guard(tmp_path):
    result, summary, _ = run(tmp_path, "rounds=9", "server.lr=1e36", "admission.max_examples=1000")
    assert (result.status, result.exit_code) == ("stopped", 3)
    assert summary["reason"].startswith("anomaly")
    assert summary["rounds_completed"] < 9


def test_parts_that_clash_are_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match="client=scaffold"):
        run(tmp_path, "server=scaffold")


def test_a_folder_that_cannot_be_made_is_a_configuration_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir .*/file is a file where a folder is needed"):
        run(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"run_name .*/file is a file where a folder is needed"):
        run(tmp_path, "run_name=file")


def trellis(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "fl_app.cli", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def read_until_round(process: subprocess.Popen, number: int) -> None:
    for line in process.stdout:
        if re.match(rf"round +{number}/", line):
            return
    raise AssertionError(f"the process ended before round {number}")


def test_ctrl_c_ends_a_run_cleanly_and_the_same_command_resumes_it(tmp_path):
    process = trellis(
        "run", *SMALL, "runtime.workers=2", "rounds=100000", start_new_session=True, cwd=tmp_path
    )
    read_until_round(process, 2)
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in rest
    path = Path(rest.splitlines()[-1])
    assert path.parents[1] == tmp_path / "runs"
    summary = json.loads(path.read_text())
    assert (summary["status"], summary["reason"]) == ("stopped", "interrupted")
    done = summary["rounds_completed"]
    assert done >= 2
    again, _, lines = run(tmp_path / "runs", "runtime.workers=2", f"rounds={done + 1}")
    assert (again.exit_code, again.summary_path) == (0, path)
    found = re.search(r"goes on after round (\d+)", "\n".join(lines))
    assert found
    assert int(found[1]) >= done


@dataclass(frozen=True)
class Killed:
    """A run of two workers in a process of its own that was killed after its third round."""

    folder: Path
    refusal: str
    """What a second run in its folder was told meanwhile."""
    workers: list[psutil.Process]
    left: list[psutil.Process]
    """Of these, those that were there 20 seconds after it at the latest."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    chosen = ["strategy=scaffold", "rounds=100000"]
    process = trellis("run", *SMALL, f"output_dir={folder}", *chosen, "runtime.workers=2")
    read_until_round(process, 3)
    workers = psutil.Process(process.pid).children(recursive=True)
    try:
        with pytest.raises(ConfigError) as refused:
            run(folder, *chosen)
    finally:
        process.kill()
        process.communicate(timeout=60)
    _, left = psutil.wait_procs(workers, timeout=20)
    left = [one for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    return Killed(folder, str(refused.value), workers, left)


@pytest.mark.xdist_group("killed")  # one fixture for all three
def test_a_killed_run_resumes_to_the_model_of_one_that_was_not(killed, tmp_path):
    (path,) = killed.folder.glob("*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["status"] == "running"
    reached = summary["rounds_completed"]
    assert reached >= 3
    chosen = ["strategy=scaffold", f"rounds={reached + 2}"]
    again, _, _ = run(killed.folder, *chosen)
    whole, _, _ = run(tmp_path, *chosen)
    assert_same_model(whole, again)


@pytest.mark.xdist_group("killed")
def test_two_runs_at_once_in_one_folder_are_refused(killed):
    assert "another process" in killed.refusal


@pytest.mark.xdist_group("killed")
def test_a_killed_run_leaves_no_worker_behind(killed):
    assert len(killed.workers) >= 2
    assert killed.left == []


def test_clients_that_send_nan_are_refused_and_the_honest_ones_train(tmp_path):
    chosen = ["rounds=3", "num_clients=5"]
    _, summary, lines = run(tmp_path, *chosen, "attack=nan", "attack.fraction=0.4")
    assert summary["rejections"] == {"not_finite": 6}
    assert list(summary["strikes"].values()) == [3, 3]
    assert [row["updates_rejected"] for row in summary["history"]] == [2, 2, 2]
    assert summary["final"]["accuracy"] > 0.5
    assert any("holds NaN" in line for line in lines)


def test_an_attack_that_passes_the_door_harms_a_plain_mean(tmp_path):
    honest = run(tmp_path, "rounds=3", "num_clients=5")[1]["final"]["accuracy"]
    attacked = run(tmp_path, "rounds=3", "num_clients=5", "attack=scaling")[1]["final"]["accuracy"]
    assert attacked < honest - 0.1


def test_attacks_are_refused_on_real_devices():
    config = compose([*SMALL, "attack=sign_flip"])
    with pytest.raises(ConfigError, match="engine only"):
        serve(config, None, PlainConsole(io.StringIO()))


def test_more_clients_than_data_are_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match="task"):
        run(tmp_path, "num_clients=5000", "task.partition=iid")


def test_a_disk_that_fills_up_fails_the_run_and_leaves_whole_files(tmp_path):
    """The real error of a real write: a file size limit stands in for the full disk."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000));"
        "from fl_app.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "run", *SMALL, f"output_dir={tmp_path}", "rounds=3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    summary = json.loads(Path(done.stdout.splitlines()[-1]).read_text())
    assert summary["status"] == "failed"
    assert not list(tmp_path.glob("*/checkpoints/*.safetensors"))
    assert not list(tmp_path.rglob("*.part"))


def test_a_run_begun_with_another_number_of_clients_is_refused(tmp_path):
    run(tmp_path, "rounds=1", "num_clients=4", "run_name=mine")
    with pytest.raises(ConfigError, match="num_clients"):
        run(tmp_path, "rounds=2", "num_clients=3", "run_name=mine")


def test_a_guarded_run_stays_guarded_and_keeps_its_last_good_model(tmp_path):
    chosen = ["rounds=9", "server.lr=1e36", "admission.max_examples=1000"]
    first, _, _ = run(tmp_path, *chosen)
    again, summary, _ = run(tmp_path, *chosen)
    assert (first.exit_code, again.exit_code, summary["status"]) == (3, 3, "stopped")
    assert all(row["loss"] is not None for row in summary["history"])


def test_resumption_keeps_the_virtual_clock_through_federated_evaluation(tmp_path):
    chosen = ["evaluate.federated_every=1"]
    whole = run(tmp_path / "whole", "rounds=3", *chosen)[1]
    run(tmp_path / "parts", "rounds=1", *chosen)
    assert rows(run(tmp_path / "parts", "rounds=3", *chosen)[1]) == rows(whole)


@pytest.mark.parametrize("clash", ["server=scaffold", "attack=zero"])
def test_a_flower_run_is_checked_before_flower_is_started(clash, capfd):
    before = psutil.Process().children(recursive=True)
    assert main(["run", "backend=flower", clash]) == 2
    assert "configuration refused" in capfd.readouterr().err
    assert psutil.Process().children(recursive=True) == before


def test_a_run_in_which_no_client_ever_succeeds_has_failed(tmp_path):
    result, summary, lines = run(
        tmp_path,
        "rounds=2",
        "client._target_=tests.support.models.Broken",
        "admission.max_attempts=1",
    )
    assert (result.status, result.exit_code) == ("failed", 1)
    assert "no round had enough good updates" in summary["reason"]
    log = (result.summary_path.parent / "run.log").read_text()
    assert "a step of the user's own" in log
    assert "tests/support/models.py" in log  # the traceback, which is not for the screen
    assert not any("Traceback" in line for line in lines)
