"""`trellis preflight`: each check with a fault that is really there, and a run that has none."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from clients.tasks import Digits
from clients.threads import one_thread
from clients.trainers import AdamW
from fl_app.checks import place, training
from fl_app.checks.check import Finding, conduct, passed
from fl_app.checks.preflight import prepared
from fl_app.checks.training import Steps
from fl_app.cli.console import PlainConsole
from fl_app.cli.main import main
from fl_app.compose import compose
from fl_app.run import run_engine

SMALL = ["task=digits", "num_clients=4", "runtime.workers=1", "rounds=2"]
OK = Finding("ok", "good")


def looked(folder: Path, *overrides: str, only: tuple[str, ...] = ()) -> dict[str, Finding]:
    """Findings by name; with `only`, of these and what they need."""
    config = compose([*SMALL, f"output_dir={folder}", *overrides])
    with one_thread(), prepared(config) as checks:
        needed = {check.name: check.needs for check in checks}
        wanted = set(only or needed)
        while more := {name for one in wanted for name in needed[one]} - wanted:
            wanted |= more
        done = conduct([check for check in checks if check.name in wanted])
    return {one.name: one.finding for one in done}


# ---- training ----


def test_a_learning_rate_that_diverges_is_no_go_and_a_better_one_is_named(tmp_path):
    found = looked(tmp_path, "client.lr=1e6", only=("learns",))["learns"]
    assert found.state == "failed"
    assert "diverges" in found.said
    named = float(found.mend.split("client.lr=")[1].split()[0])
    again = looked(tmp_path, f"client.lr={named:g}", only=("learns",))["learns"]
    assert again.state == "ok"


def test_a_learning_rate_that_is_too_small_is_no_go_too(tmp_path):
    found = looked(tmp_path, "client.lr=1e-7", only=("learns",))["learns"]
    assert found.state == "failed"
    assert "does not learn" in found.said
    assert "client.lr=" in found.mend


def test_labels_that_tell_nothing_are_no_learning_rates_fault():
    class Deaf(torch.nn.Module):
        """Says the same of every input."""

        def __init__(self) -> None:
            super().__init__()
            self.said = torch.nn.Parameter(torch.zeros(10))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.said.expand(len(inputs), -1)

    workload = training.Workload.of(Digits(), Deaf(), AdamW(lr=0.01), ["*"])
    found = training.learns(workload, seed=0, seconds=1)
    assert found.state != "ok"
    assert "client.lr" not in found.mend or "more" not in found.mend


def test_a_model_of_which_nothing_travels_is_no_go(tmp_path):
    found = looked(tmp_path, "travel=[nothing*]", only=("step",))
    assert "failed" in {finding.state for finding in found.values()}


def test_memory_is_held_against_what_is_available():
    took = Steps(bytes=100_000_000, seconds=0.01, example_seconds=0.001, clients=1)
    enough = training.memory(took, size=64, workers=4, server=0, free=1_000_000_000)
    tight = training.memory(took, size=64, workers=4, server=0, free=420_000_000)
    short = training.memory(took, size=64, workers=4, server=0, free=399_000_000)
    assert [one.state for one in (enough, tight, short)] == ["ok", "warning", "failed"]
    assert "client.batch_size=32" in short.mend
    assert "runtime.workers=2" in short.mend


def test_the_peak_of_a_step_is_what_its_tensors_take():
    class Wide(torch.nn.Module):
        """Holds 64 MB for a mini-batch of 8 at once."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(64, 10)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            held = torch.ones(len(inputs), 2_000_000)
            return self.layer(inputs.flatten(1)) + held.mean()

    with one_thread():
        workload = training.Workload.of(Digits(), Wide(), AdamW(batch_size=8), ["*"])
        part = Digits().train().take(range(8))
        finding, took = training.batch(workload, [part], 8)
    assert finding.state == "ok"
    assert took is not None
    assert 60e6 < took.bytes < 130e6


LIMITED = """
import resource, sys
from fl_app.cli.main import main
import fl_app.checks.preflight, torch  # what is mapped by imports is no part of the limit
here = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (here + 700_000_000,) * 2)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_a_mini_batch_that_memory_can_not_hold_is_no_go_not_a_crash(tmp_path):
    """Of 1,000 examples, each layer of 40,000 units holds 160 MB, forward and back."""
    arguments = ["preflight", *SMALL, f"output_dir={tmp_path}", "num_clients=1", "--json"]
    arguments += ["model=mlp", "model.hidden=[40000,200]", "client.batch_size=1000"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments],
        capture_output=True,
        encoding="utf-8",
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1, done.stderr
    found = {one["name"]: one for one in json.loads(done.stdout)["checks"]}
    assert found["step"]["state"] == "failed", found["step"]
    assert "memory" in found["step"]["said"]
    assert "client.batch_size=500" in found["step"]["mend"]
    assert found["memory"]["state"] == "skipped"


# ---- the plan ----


def test_too_few_clients_for_a_rule_are_no_go(tmp_path):
    found = looked(tmp_path, "strategy=krum", "combiner.f=1", only=("nodes",))
    assert found["contract"].state == "failed"
    assert "at least 5" in found["contract"].said
    assert "ask more clients" in found["contract"].mend
    assert found["nodes"].state == "skipped"


def test_dropouts_that_void_rounds_are_counted(tmp_path):
    """Six of ten must stay; with each gone by a coin of 0.4, P[Binomial(10, 0.6) < 6] = 0.367."""
    found = looked(
        tmp_path, "strategy=secure", "num_clients=10", "runtime.dropout=0.4", only=("nodes",)
    )["nodes"]
    assert found.state == "warning"
    assert "6 for a masked sum" in found.said
    assert "probability 0.37" in found.said
    enough = int(found.mend.split(":")[1].split()[0])
    from scipy.stats import binom

    assert binom.cdf(5, enough, 0.6) <= 0.01


def test_a_budget_that_ends_the_run_early_is_told(tmp_path):
    overrides = ("strategy=dp", "num_clients=20", "rounds=50", "privacy.noise_multiplier=2")
    found = looked(tmp_path, *overrides, "privacy.target_epsilon=4", only=("privacy",))["privacy"]
    assert found.state == "warning"
    affordable = int(found.said.split("after ")[-1].split(" of 50")[0])
    assert 0 < affordable < 50
    short = compose([*SMALL, *overrides, "privacy.target_epsilon=4", f"output_dir={tmp_path}"])
    from fl_app.assembly import Assembly, composed
    from strategies.privacy.budget import BudgetSpentError

    promise = composed(Assembly(short), 20).pipeline.privacy
    assert promise is not None
    with pytest.raises(BudgetSpentError, match=f"round {affordable + 1} "):
        _spend(promise)


def _spend(promise) -> None:
    for number in range(1, 51):
        promise.charge(number)


def test_a_delta_that_publishes_an_example_is_no_go(tmp_path):
    found = looked(
        tmp_path,
        "client=dp_sgd",
        "client.target_epsilon=3",
        "client.delta=0.02",
        "collector=bare",
        "model=linear",
        only=("privacy",),
    )["privacy"]
    assert found.state == "failed"
    assert "client.delta below" in found.mend


def test_bytes_of_a_round_are_those_that_the_run_counts(tmp_path):
    told = looked(tmp_path, "rounds=1", only=("model",))["model"].said
    result = run_engine(
        compose([*SMALL, "rounds=1", f"output_dir={tmp_path}"]), PlainConsole(io.StringIO())
    )
    row = json.loads(result.summary_path.read_text())["history"][0]
    for name, key in (("down", "download_bytes"), ("up", "upload_bytes")):
        figure, unit = told.split(f" {name}")[0].split()[-2:]
        said = float(figure) * {"kB": 1e3, "MB": 1e6}[unit]
        assert said == pytest.approx(row[key], rel=0.1)


# ---- the folder ----


def test_a_file_in_the_place_of_a_folder_is_no_go(tmp_path):
    (tmp_path / "runs").write_text("no folder")
    found = place.writable(compose([*SMALL, f"output_dir={tmp_path / 'runs'}"]))
    assert found.state == "failed"
    assert "is a file" in found.said
    assert place.writable(compose([*SMALL, "output_dir=/proc/runs"])).state == "failed"


def test_a_disk_without_room_is_no_go(tmp_path):
    assert place.room(tmp_path / "run", checkpoint=1000, clients=0).state == "ok"
    assert place.room(tmp_path / "run", checkpoint=10**15, clients=0).state == "failed"


def test_what_an_earlier_run_left_is_told_and_nothing_is_touched(tmp_path):
    run = ["run_name=first", f"output_dir={tmp_path}"]
    run_engine(compose([*SMALL, *run]), PlainConsole(io.StringIO()))
    folder = tmp_path / "first"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}

    def earlier(*overrides: str) -> Finding:
        return looked(tmp_path, "run_name=first", *overrides, only=("earlier run",))["earlier run"]

    assert "complete with 2 rounds" in earlier().said
    assert "goes on at round 3 of 5" in earlier("rounds=5").said
    other = earlier("client.lr=0.3")
    assert other.state == "failed"
    assert "client.lr" in other.said
    anew = earlier("resume=never")
    assert anew.state == "warning"
    assert "throws 2 rounds away" in anew.said
    assert earlier("run_name=second").state == "ok"
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    assert after == before
    assert not (tmp_path / "second").exists()


# ---- the command ----


def test_a_csv_with_a_class_that_was_never_trained_on_is_no_go(tmp_path, capsys):
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("a,b,y\n" + "".join(f"{i % 2},{i},{i % 2}\n" for i in range(60)))
    test.write_text("a,b,y\n" + "".join(f"{i % 2},{i},{i % 2}\n" for i in range(9)) + "1,1,7\n")
    code = main(
        [
            "preflight",
            "task=csv",
            f"task.path={train}",
            f"task.test_path={test}",
            "task.target=y",
            "num_clients=3",
            f"output_dir={tmp_path / 'runs'}",
            "--json",
        ]
    )
    told = json.loads(capsys.readouterr().out)
    assert code == 1
    first = told["checks"][0]
    assert first["state"] == "failed"
    assert "'7'" in first["said"]
    assert {one["state"] for one in told["checks"] if one["name"] == "step"} == {"skipped"}
    assert not (tmp_path / "runs").exists()


def test_a_run_without_fault_is_a_go_and_leaves_nothing(tmp_path, capsys):
    runs = tmp_path / "runs"
    code = main(["preflight", *SMALL, f"output_dir={runs}"])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0, lines
    assert lines[-1].startswith("go: ")
    assert " 1 failed" not in lines[-1]
    assert not runs.exists()
    assert not list(tmp_path.iterdir())


def test_wrong_overrides_are_a_wrong_command(capsys):
    assert main(["preflight", "task=digit"]) == 2
    assert "did you mean digits" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy=secure",),
        ("strategy=dp", "num_clients=20"),
        ("strategy=scaffold",),
        ("strategy=ckks_mean",),
        ("strategy=fedbuff",),
        ("strategy=multi_krum", "num_clients=10"),
        ("compression=top_k",),
    ],
    ids=lambda overrides: overrides[0],
)
def test_strategies_of_all_kinds_are_looked_at(tmp_path, overrides):
    found = looked(tmp_path, *overrides)
    assert passed_all(found), {name: one for name, one in found.items() if one.state == "failed"}
    assert found["learns"].state == "ok"
    assert found["time"].said.startswith("about ")


def passed_all(found: dict[str, Finding]) -> bool:
    from fl_app.checks.check import Checked

    return passed(Checked(name, finding) for name, finding in found.items())


@pytest.mark.slow
def test_ciphertexts_are_forecast_and_not_trained_on(tmp_path):
    found = looked(tmp_path, "strategy=encrypted", "num_clients=1")
    assert passed_all(found)
    assert "ring" in found["ciphertexts"].said
    assert {found[name].state for name in ("memory", "learns", "time")} == {"skipped"}


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_no_folder(tmp_path):
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    command = [sys.executable, "-m", "fl_app.cli", "preflight", *SMALL, f"output_dir={tmp_path}"]
    # So wide a model trains until long after the signal.
    command += ["num_clients=1", "model=mlp", "model.hidden=[4000,4000]", "client.batch_size=1000"]
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"},
    )
    program = psutil.Process(started.pid)
    deadline = time.monotonic() + 120
    while not (children := program.children(recursive=True)):
        assert time.monotonic() < deadline
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    _, told = started.communicate(timeout=60)
    assert started.returncode == 1
    assert told.strip() == "stopped"
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not list(scratch.iterdir())
