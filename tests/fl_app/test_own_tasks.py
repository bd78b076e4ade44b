"""Tasks of text and of a user's own data, from the command to the summary."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from clients import pretrained
from fl_app.cli.console import PlainConsole
from fl_app.cli.main import main
from fl_app.compose import compose
from fl_app.config.faults import ConfigError
from fl_app.flower.bundle import BUNDLE
from fl_app.run import run_engine
from tests.support.bert import save_tiny_bert

FEW = ["num_clients=3", "runtime.workers=1", "task.partition=iid"]
DOCSTRINGS = ["task=docstrings", "task.packages=[flwr,sklearn]", "task.max_per_package=50"]


def run(*overrides: str):
    result = run_engine(compose([*FEW, *overrides]), PlainConsole(io.StringIO()))
    return result, json.loads(result.summary_path.read_text())


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The user's working directory, with a table of two classes that a line tells apart."""
    monkeypatch.chdir(tmp_path)
    save_table(tmp_path / "table.csv")
    return tmp_path


def save_table(path: Path, rows: int = 60) -> None:
    lines = [
        f"{row},{row % 7},{'high' if row >= rows / 2 else 'low'},h{row % 3}" for row in range(rows)
    ]
    path.write_text("x,y,level,hospital\n" + "\n".join(lines) + "\n")


CSV = ["task=csv", "task.path=table.csv", "task.target=level", "task.client=hospital"]


def test_docstrings_are_learnt_by_the_recurrent_model(tmp_path):
    result, summary = run(
        *DOCSTRINGS, f"output_dir={tmp_path}", "rounds=5", "client.lr=0.5", "client.max_grad_norm=1"
    )
    assert (result.exit_code, summary["task"]) == (0, "docstrings")
    losses = [row["loss"] for row in summary["history"]]
    assert losses[-1] < losses[0]
    assert summary["final"]["accuracy"] > 0.6


def test_a_module_is_a_client_of_the_natural_partition(tmp_path):
    _, summary = run(
        *DOCSTRINGS, f"output_dir={tmp_path}", "task.partition=natural", "rounds=1",
        "task.min_partition_size=1",
    )  # fmt: skip
    assert summary["history"][0]["clients_failed"] == 0


def test_a_pretrained_model_brings_its_tokenizer_and_only_its_head_travels(here):
    pretrained._shared.cache_clear()
    save_tiny_bert(here / "bert")
    chosen = [
        *DOCSTRINGS,
        "model=minilm",
        "model.pretrained=./bert",
        "task.max_length=16",
        "rounds=2",
    ]
    assert compose(chosen).task.arguments["tokenizer"] == "./bert"
    result, summary = run(*chosen)
    assert summary["status"] == "completed"
    assert {
        name: array.size
        for name, array in load_file(result.summary_path.parent / "model.safetensors").items()
    } == {
        "head.bias": 2,
        "head.weight": 32,
    }
    assert summary["history"][0]["upload_bytes"] < 3 * 2_000


def test_without_the_models_the_command_says_how_to_get_them(here, capsys):
    assert main(["run", *DOCSTRINGS, "model=minilm"]) == 2
    assert f"there is no folder {here}/models/minilm: `make models`" in capsys.readouterr().err
    assert main(["run", *CSV, "model=gru"]) == 2
    assert "Gru takes rows of tokens" in capsys.readouterr().err
    assert main(["run", *DOCSTRINGS, "model=linear"]) == 2
    assert "this task's inputs are tokens: use Gru" in capsys.readouterr().err


def test_a_table_is_learnt_from_and_its_path_counts_from_where_the_user_is(here):
    result, summary = run(*CSV, "task.partition=natural", "rounds=5", "client.lr=0.5")
    assert summary["final"]["accuracy"] >= 0.9
    assert result.summary_path.is_relative_to(here / "runs")
    # The same table by another spelling of its path is another configuration, and the same data.
    _, other = run(*CSV[:1], f"task.path={here}/table.csv", *CSV[2:], "rounds=1", "run_name=other")
    assert other["status"] == "completed"


def test_paths_count_from_the_directory_that_a_configuration_is_told(here, monkeypatch):
    config = compose([*FEW, *CSV, "rounds=1"])
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    with pytest.raises(ConfigError, match=rf"{here}/elsewhere/table.csv does not exist"):
        run_engine(config.within(here / "elsewhere"), PlainConsole(io.StringIO()))
    moved = config.within(here)
    assert moved.identity_hash() == config.identity_hash()
    assert run_engine(moved, PlainConsole(io.StringIO())).exit_code == 0


def test_other_data_at_the_same_path_do_not_take_a_run_up(here):
    chosen = [*CSV, "run_name=table"]
    run(*chosen, "rounds=1")
    _, resumed = run(*chosen, "rounds=2")
    assert resumed["rounds_completed"] == 2
    save_table(here / "table.csv", rows=80)
    for rounds in (2, 3):
        with pytest.raises(ConfigError, match="begun on other data than are there now"):
            run(*chosen, f"rounds={rounds}")
    _, anew = run(*chosen, "rounds=1", "resume=never")
    assert (anew["status"], anew["rounds_completed"]) == ("completed", 1)


def test_a_fault_in_the_data_is_a_configuration_error(here, capsys):
    (here / "table.csv").write_text("x,level,hospital\n1,low,a\n?,high,b\n")
    assert main(["run", *CSV]) == 2
    assert "table.csv, line 3, column 'x': '?' is no finite number" in capsys.readouterr().err
    assert main(["run", *CSV[:1], "task.path=table.cvs", *CSV[2:]]) == 2
    assert "table.cvs does not exist" in capsys.readouterr().err
    assert main(["run", *CSV, "task.fold=5"]) == 2


@pytest.mark.slow
def test_flower_finds_a_relative_path_where_the_user_is(here):
    environment = {**os.environ, "PYTHONPATH": str(BUNDLE)}
    command = [
        sys.executable,
        "-m",
        "fl_app.cli",
        "run",
        *CSV,
        "num_clients=2",
        "rounds=1",
        "backend=flower",
    ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(Path(done.stdout.splitlines()[-1]).read_text())["status"] == "completed"
