"""Runs that are killed, interrupted, stopped or out of room: what is left, and what the same command does then."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from fl_app.config.faults import ConfigError
from fl_app.services.checkpoint import Checkpoints
from tests.fl_app.test_run import (
    SMALL,
    assert_same_model,
    model_of,
    read_until_round,
    rows,
    run,
    trellis,
)
from tests.fl_app.test_secure_runs import opened_sums

LINEAR = ["model=linear", "task.partition=iid", "num_clients=6"]
EVERY = 3
KILLED = {
    "fedavg": [],
    "scaffold": ["sampler.fraction=0.6"],
    "dp": ["privacy.noise_multiplier=1", "privacy.target_epsilon=null"],
    "secure": [],
}


def checkpoints(result) -> list[str]:
    return sorted(path.name for path in (result.summary_path.parent / "checkpoints").iterdir())


def learned(summary) -> list[tuple]:
    return [(row["round"], row["loss"], row["accuracy"]) for row in summary["history"]]


@pytest.mark.parametrize(
    "strategy", [pytest.param("fedavg", marks=pytest.mark.slow), "scaffold", "dp", "secure"]
)
def test_a_run_that_is_killed_between_two_checkpoints_runs_the_rounds_since_again(
    tmp_path, strategy
):
    """Killed by a signal that nobody can catch, in the middle of a round that follows one that was not saved."""
    chosen = [*LINEAR, f"strategy={strategy}", *KILLED[strategy], f"checkpoint.every={EVERY}"]
    process = trellis(
        "run", *SMALL, *chosen, f"output_dir={tmp_path / 'killed'}", "rounds=100000",
        start_new_session=True,
    )  # fmt: skip
    read_until_round(process, EVERY + 1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    (path,) = tmp_path.glob("killed/*/summary.json")
    before = json.loads(path.read_text())
    reached = before["rounds_completed"]
    assert reached > EVERY
    saved = Checkpoints(path.parent / "checkpoints").newest().round
    assert saved % EVERY == 0
    assert reached - saved < EVERY or saved > reached
    rounds = max(reached, saved) + 2
    again, resumed, lines = run(tmp_path / "killed", *chosen, f"rounds={rounds}")
    assert any(line.startswith(f"goes on after round {saved}") for line in lines)
    if reached > saved:
        assert f"rounds {saved + 1} to {reached} were not saved, and are run again" in lines
    assert [row["round"] for row in resumed["history"]] == list(range(1, rounds + 1))
    assert resumed["rejections"] == {}
    whole, summary, _ = run(tmp_path / "whole", *chosen, f"rounds={rounds}")
    if strategy == "dp":  # fresh noise, and each of its rounds paid for
        spent, least = resumed["privacy"], summary["privacy"]
        assert spent["releases"] >= rounds + max(0, reached - saved)
        assert spent["epsilon"] >= max(least["epsilon"], before["privacy"]["epsilon"])
        epsilons = [row["epsilon"] for row in resumed["history"]]
        assert epsilons == sorted(epsilons)
        assert resumed["totals"]["upload_bytes"] == sum(
            r["upload_bytes"] for r in resumed["history"]
        )
        return
    assert_same_model(whole, again)
    assert learned(summary) == learned(resumed)
    if strategy == "secure":
        sums = opened_sums(again)
        assert len({run_id for run_id, _, _ in sums}) == 1
        # One sum a model, but for the one whose round was cut short, perhaps after its shares were given.
        assert len({model for _, model, _ in sums}) == rounds
        assert len(sums) <= rounds + 1


def test_ctrl_c_saves_the_last_whole_state_where_no_round_is_saved_before_the_last(tmp_path):
    """SCAFFOLD's clients must find the states that go with it."""
    chosen = [*LINEAR, "strategy=scaffold", "sampler.fraction=0.6", "checkpoint.every=0"]
    process = trellis(
        "run", *SMALL, *chosen, f"output_dir={tmp_path / 'parts'}", "rounds=100000",
        start_new_session=True,
    )  # fmt: skip
    read_until_round(process, 3)
    assert not list(tmp_path.glob("parts/*/checkpoints/*"))
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    (path,) = tmp_path.glob("parts/*/summary.json")
    summary = json.loads(path.read_text())
    assert (summary["status"], summary["reason"]) == ("stopped", "interrupted")
    saved = Checkpoints(path.parent / "checkpoints").newest().round
    assert saved >= summary["rounds_completed"] >= 3
    again, resumed, _ = run(tmp_path / "parts", *chosen, f"rounds={saved + 2}")
    assert checkpoints(again) == [f"version-{n:08d}.safetensors" for n in (saved, saved + 2)]
    whole, straight, _ = run(tmp_path / "whole", *chosen, f"rounds={saved + 2}")
    assert_same_model(whole, again)
    assert learned(straight) == learned(resumed)


def test_a_budget_that_is_spent_saves_the_last_round_that_was_paid_for(tmp_path):
    chosen = [*LINEAR, "strategy=dp", "privacy.noise_multiplier=1", "checkpoint.every=0"]
    result, summary, lines = run(
        tmp_path, *chosen, "privacy.target_epsilon=8", "privacy.accountant=rdp", "rounds=50"
    )
    done = summary["rounds_completed"]
    assert result.status == "stopped"
    assert 0 < done < 50
    assert checkpoints(result) == [f"version-{done:08d}.safetensors"]
    said = "checkpoint.every=0: if it is killed, all rounds more are run, and charged, again"
    assert said in lines


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_are_kept_as_was_asked_for(tmp_path, keep):
    result, _, _ = run(
        tmp_path, *LINEAR, "rounds=5", "checkpoint.every=2", f"checkpoint.keep={keep}"
    )
    assert checkpoints(result) == [f"version-{n:08d}.safetensors" for n in (2, 4, 5)][-keep:]
    run(tmp_path, *LINEAR, "rounds=5")  # how often it is saved makes it no other run
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "having",
    [
        ["strategy=scaffold"],
        ["strategy=fedbuff", "compression=top_k", "compression.ratio=0.1", "scheduler.buffer=2"],
    ],
    ids=["control variates", "error feedback"],
)
def test_clients_find_their_states_also_behind_a_torn_checkpoint(tmp_path, having):
    """The newest is torn, so the run goes back to the one before, and its clients with it."""
    chosen = [*LINEAR, *having, "checkpoint.every=2"]
    whole, summary, _ = run(tmp_path / "whole", *chosen, "rounds=7")
    parts, _, _ = run(tmp_path / "parts", *chosen, "rounds=6")
    newest = parts.summary_path.parent / "checkpoints" / checkpoints(parts)[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    again, resumed, lines = run(tmp_path / "parts", *chosen, "rounds=7")
    assert "goes on after round 4" in lines
    assert "starts afresh" not in "\n".join(lines)
    assert_same_model(whole, again)
    assert learned(summary) == learned(resumed)


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew_behind_anybodys_back(tmp_path):
    result, _, _ = run(tmp_path, *LINEAR, "rounds=2")
    for path in (result.summary_path.parent / "checkpoints").iterdir():
        path.write_bytes(b"torn")
    with pytest.raises(ConfigError, match="version-00000002") as refused:
        run(tmp_path, *LINEAR, "rounds=3")
    assert "resume=never" in str(refused.value)
    _, summary, _ = run(tmp_path, *LINEAR, "rounds=3", "resume=never")
    assert summary["rounds_completed"] == 3


def test_a_checkpoint_of_another_configuration_is_refused_with_both_values_and_the_mend(tmp_path):
    """Also where the summary is gone, which would have told."""
    result, _, _ = run(tmp_path, *LINEAR, "rounds=1", "run_name=mine")
    result.summary_path.unlink()
    with pytest.raises(ConfigError) as refused:
        run(tmp_path, *LINEAR, "rounds=2", "run_name=mine", "client.lr=0.123", "resume=must")
    told = str(refused.value)
    assert re.search(r"client\.lr: 0\.123 → 0\.\d+", told)
    assert "resume=never" in told
    assert "another run_name" in told


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_checkpoints_that_this_user_may_not_read_are_told_of_and_not_skipped(tmp_path):
    result, _, _ = run(tmp_path, *LINEAR, "rounds=1")
    folder = result.summary_path.parent / "checkpoints"
    folder.chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(PermissionError):
            Checkpoints(folder).newest()
    finally:
        os.seteuid(0)


def test_what_killed_writers_left_is_removed_by_the_next_process(tmp_path):
    result, _, _ = run(tmp_path, *LINEAR, "rounds=1")
    folder = result.summary_path.parent
    for name in (".summary.json.4711.part", "checkpoints/.version-00000002.safetensors.4711.part"):
        (folder / name).write_bytes(b"half")
    run(tmp_path, *LINEAR, "rounds=2")
    assert not list(folder.rglob("*.part"))


@pytest.fixture
def disk(tmp_path):
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this process may mount nothing")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("left", [0, 60_000], ids=["no room at all", "room for a summary"])
def test_a_run_whose_disk_is_full_fails_with_the_reason_and_goes_on_when_there_is_room(
    tmp_path, disk, capfd, left
):
    chosen = [*LINEAR, "model=mlp", "server=momentum", "checkpoint.keep=1"]
    first, _, _ = run(disk, *chosen, "rounds=2")
    assert (
        first.summary_path.parent / "checkpoints" / checkpoints(first)[0]
    ).stat().st_size > 70_000
    filler = disk / "filler"
    fill(filler, shutil.disk_usage(disk).free - left)
    result, summary, lines = run(disk, *chosen, "rounds=4")
    assert (result.status, result.exit_code) == ("failed", 1)
    assert "No space left on device" in result.reason
    assert checkpoints(first) == ["version-00000002.safetensors"]
    assert not list(disk.rglob("*.part"))
    if left:
        assert (
            "MB are free there; mend that, and the same command goes on after round 2"
            in result.reason
        )
        assert (summary["status"], summary["rounds_completed"]) == ("failed", 2)
        assert summary["reason"] == result.reason
    else:  # nobody can write down that it failed
        assert any("the summary is that of an earlier round" in line for line in lines)
    assert "Traceback" not in "".join(capfd.readouterr())
    filler.unlink()
    again, resumed, _ = run(disk, *chosen, "rounds=4")
    whole, straight, _ = run(tmp_path / "whole", *chosen, "rounds=4")
    assert_same_model(whole, again)
    assert rows(resumed) == rows(straight)
    assert model_of(again).keys() == model_of(whole).keys()


def fill(path: Path, size: int) -> None:
    """Takes so many bytes of a disk, or as many as there are."""
    with path.open("wb") as file:
        try:
            file.write(bytes(size))
        except OSError:
            return
