"""The command line as a user meets it: real processes, their output, their exit codes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from fl_app.cli.main import main
from fl_app.config import catalogue

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["experiment=quickstart", "rounds=1", "num_clients=2", "runtime.workers=1"]


def environment() -> dict[str, str]:
    known = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(known), "COLUMNS": "60"}


@pytest.fixture
def trellis(tmp_path: Path):
    def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fl_app.cli", *arguments],
            cwd=tmp_path, env=environment() | changes, capture_output=True, text=True, timeout=120, encoding="utf-8",
        )  # fmt: skip

    return run


# -- wrong commands: exit code 2, one message, no traceback --


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage: trellis"),
        (["rnu"], "did you mean trellis run?"),
        (["strategy=fedavg"], "did you mean trellis run strategy=fedavg?"),
        (["--frobnicate"], "unknown option --frobnicate"),
        (
            ["run", "--rounds=3"],
            "unknown option --rounds=3; values are written without dashes: rounds=3",
        ),
        (["run", "--dry"], "unknown option --dry"),
        (["list", "stratgies"], "did you mean strategies?"),
        (["run", "rounds=0", "client.epochs=2", "server=adm"], "configuration refused, 3 faults:"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_ends_with_code_2_and_a_message(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    output, errors = capfd.readouterr()
    assert (code, output) == (2, "")
    assert said in errors


@pytest.mark.parametrize(
    "arguments", [["rnu"], ["run", "rounds=0", "client.epochs=2", "server=adm"]], ids=" ".join
)
def test_what_is_refused_leaves_neither_a_traceback_nor_a_word_of_hydras(
    trellis, arguments: list[str]
) -> None:
    done = trellis(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert "hydra" not in done.stderr.lower()
    assert len(done.stderr.splitlines()) == (2 if arguments == ["rnu"] else 4)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("client=sgdd", "unknown choice; did you mean sgd?"),
        ("rounds", "not an override: write key=value"),
        ("client.lr=[1", "cannot be read; a value with a comma"),
        ("task._target_=no_such.Task", "there is no module no_such"),
        ("client.lr=${no.such}", "Interpolation key 'no.such' not found"),
    ],
)
def test_a_wrong_override_ends_with_code_2_and_nothing_else_is_said(
    override: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", override, "--dry-run"]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.startswith("configuration refused, 1 fault:\n")
    assert len(errors.splitlines()) == 2
    assert said in errors


def test_a_refused_configuration_leaves_no_folder_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "rounds=0"]) == 2
    assert list(tmp_path.iterdir()) == []


# -- help and lists: at once --


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["list"], ["--version"]], ids=" ".join
)
def test_help_and_lists_import_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys, runpy; sys.argv[1:] = sys.argv[2:]\n"
        "from fl_app.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'flwr', 'ray', 'hydra', 'pydantic', 'numpy', 'matplotlib'} & sys.modules.keys()\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, "-", *arguments],
        check=True,
        env=environment(),
        capture_output=True,
    )


@pytest.mark.parametrize("arguments", [["list"], ["run", "--help"]], ids=" ".join)
def test_help_and_lists_take_less_than_half_a_second(trellis, arguments: list[str]) -> None:
    # Processor time: on a busy machine the clock on the wall measures the others.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert trellis(*arguments).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_help_shows_examples_and_exit_codes(trellis) -> None:
    text = trellis("run", "--help").stdout
    assert "trellis run strategy=fedadam task.partition=iid num_clients=50 rounds=20 seed=3" in text
    assert "exit codes: 0 done" in text
    assert "trellis list strategies" in trellis("--help").stdout


def test_every_example_of_the_help_composes(trellis, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    examples = [
        line.split()[2:]
        for line in lines
        if line.startswith("trellis run") and "my_module" not in line
    ]
    assert len(examples) >= 6
    for overrides in examples:
        assert main(["run", *overrides, *([] if "--dry-run" in overrides else ["--dry-run"])]) == 0


def test_the_version_is_told(trellis) -> None:
    done = trellis("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "trellis")


def test_every_choice_of_every_group_is_listed_with_its_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for group in catalogue.groups():
        assert f"{group}=" in lines
        for choice in catalogue.choices(group):
            assert [
                line
                for line in lines
                if line.split()[:1] == [choice.name] and choice.description in line
            ]
    assert [line for line in lines if line.startswith("  fedavg ") and line.endswith("(default)")]


def test_a_group_is_found_in_the_singular_and_in_the_plural(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = []
    for words in (["strategies"], ["strategy"], ["tasks", "models"]):
        assert main(["list", *words]) == 0
        told.append(capsys.readouterr().out)
    assert told[0].startswith("strategy=\n  bulyan             Bulyan: ")
    assert told[0] == told[1]
    assert [line for line in told[2].splitlines() if line.endswith("=")] == ["task=", "model="]
    with pytest.raises(SystemExit, match="2"):
        main(["list", "taskz"])
    assert "did you mean task?" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_failure() -> None:
    program = subprocess.Popen(
        [sys.executable, "-m", "fl_app.cli", "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert program.stdout is not None
    assert program.stderr is not None
    program.stdout.close()
    assert program.stderr.read() == b""
    assert program.wait(30) == 0
    program.stderr.close()


def test_a_terminal_without_letters_beyond_ascii_still_gets_its_list(trellis) -> None:
    done = trellis("list", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "28 ? 28" in done.stdout


# -- composing --


def test_a_dry_run_prints_the_resolved_configuration_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main(["run", "strategy=fedadam", "--dry-run", "server=yogi", "run_name=${strategy}"]) == 0
    )
    output, errors = capfd.readouterr()
    told = yaml.safe_load(output)
    assert (told["strategy"], told["server"]["_target_"]) == (
        "fedadam",
        "strategies.server_models.Yogi",
    )
    assert (told["run_name"], errors) == ("fedadam", "")
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_carries_conf_and_works_without_the_checkout(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the build back end makes the wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    shipped = {file.relative_to(installed) for file in (installed / "conf").rglob("*.yaml")}
    assert shipped == {file.relative_to(ROOT) for file in catalogue.CONF.rglob("*.yaml")}
    assert (
        "trellis = fl_app.cli.main:main"
        in next(installed.glob("*.dist-info/entry_points.txt")).read_text()
    )
    done = subprocess.run(
        [sys.executable, "-m", "fl_app.cli", "run", "strategy=fedadam", "--dry-run"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True,
    )  # fmt: skip
    assert yaml.safe_load(done.stdout)["strategy"] == "fedadam", done.stderr


# -- running --


def test_a_task_of_the_users_own_runs_a_line_a_round_and_the_path_of_its_summary_last(
    trellis, tmp_path: Path
) -> None:
    (tmp_path / "my_module.py").write_text(
        "from typing import Annotated\n"
        "from annotated_types import Ge\n"
        "from clients.tasks import Digits\n"
        "class MyTask(Digits):\n"
        "    def __init__(self, examples: Annotated[int, Ge(10)] = 50) -> None:\n"
        "        super().__init__()\n"
        "        self.examples = examples\n"
        "    def train(self):\n"
        "        return super().train().take(range(self.examples))\n"
    )
    task = ["task._target_=my_module.MyTask", "task.partition=iid"]
    folder = tmp_path / ("a folder with a rather long name " * 3).strip()
    task = ["task._target_=my_module.MyTask", "task.partition=iid", "task.examples=60"]
    place = [f"output_dir='{folder}'", "run_name=first"]
    done = trellis("run", *QUICK, *task, *place, "runtime.workers=2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == str(folder / "first" / "summary.json")
    assert len([line for line in lines if line.startswith("round 1/1 ")]) == 1
    summary = json.loads(Path(lines[-1]).read_text())
    assert (summary["status"], summary["rounds_completed"]) == ("completed", 1)
    assert (summary["task"], summary["strategy"]) == ("mytask", "fedavg")
    config = yaml.safe_load(Path(lines[-1]).with_name("config.yaml").read_text())
    assert config["task"]["examples"] == 60


def test_the_same_command_again_leaves_a_complete_run_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", *QUICK, f"output_dir={tmp_path}", "run_name=first"]
    assert main(command) == 0
    summary = Path(capsys.readouterr().out.splitlines()[-1])
    before = summary.read_bytes()
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(summary)
    assert summary.read_bytes() == before
    # Another configuration may not take the run up, and is told how it differs.
    assert main([*command, "client.lr=0.2"]) == 2
    assert "client.lr: 0.2 → 0.1" in capsys.readouterr().err


FEWER = {
    "docstrings": ["sampler.fraction=0.1", "client.local_epochs=1"],
    "heterogeneous": ["sampler.fraction=0.2"],
}
"""Of the experiments whose clients train for long: with how many of them a round is a round."""
LONG = {"encrypted_pixels"}
"""Those of which one round is long already, and whose parts other experiments have too."""
EXPERIMENTS = catalogue.names("experiment")


@pytest.mark.parametrize(
    ("name", "rounds"),
    [
        *((name, 1) for name in EXPERIMENTS if name not in LONG),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in EXPERIMENTS),
    ],
)
def test_every_experiment_runs(
    name: str, rounds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", f"experiment={name}", f"rounds={rounds}", f"output_dir={tmp_path}"]
    command += ["runtime.workers=1", *(FEWER.get(name, []) if rounds == 1 else [])]
    assert main(command) == 0
    summary = json.loads(Path(capsys.readouterr().out.splitlines()[-1]).read_text())
    assert (summary["status"], summary["rounds_completed"]) == ("completed", rounds)


@pytest.mark.slow
def test_the_same_command_runs_on_flower(trellis, tmp_path: Path) -> None:
    done = trellis("run", "backend=flower", *QUICK, "run_name=first")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "runs" / "first" / "summary.json")
    assert (
        json.loads((tmp_path / "runs" / "first" / "summary.json").read_text())["status"]
        == "completed"
    )
