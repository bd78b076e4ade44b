"""docs/extending.md as it stands: each file written outside the repository, each command run there."""

import json
import os
import re
import runpy
import shlex
from pathlib import Path
from unittest.mock import patch

import pytest
from flwr.app import ArrayRecord

from fl_app.cli.main import main
from strategies import pipeline_mod
from strategies.stages import Clip
from tests.test_vanilla_app import accuracy, make_model, on_engine, vanilla_app

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENT = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
FILES: dict[str, str] = dict(
    re.findall(r"```(?:python|yaml)\n# (\S+\.(?:py|yaml))\n(.*?)```", DOCUMENT, flags=re.DOTALL)
)
COMMANDS = re.findall(r"^trellis run .*$", DOCUMENT, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_there_is_one_of_each_kind():
    assert set(FILES) == {
        "spirals.py",
        "meamed.py",
        "scaled_sign.py",
        "sign_sgd.py",
        "conf/strategy/careful.yaml",
        "careful.py",
    }


@pytest.mark.parametrize("name", FILES)
def test_a_part_takes_fewer_than_forty_lines(name):
    assert len(FILES[name].splitlines()) < 40


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[2][:40])
def test_every_command_runs_and_its_model_learns(outside, monkeypatch, capsys, command):
    """In this process: that a process of its own finds a user's classes is tested in test_cli.py."""
    monkeypatch.chdir(outside)
    monkeypatch.syspath_prepend(str(outside))
    with patch.dict(os.environ):  # --config-dir tells the processes that a run starts of its folder
        assert main([*shlex.split(command)[1:], "runtime.workers=1"]) == 0
    summary = json.loads(Path(capsys.readouterr().out.splitlines()[-1]).read_text())
    assert summary["final"]["accuracy"] > 0.8
    assert summary["totals"]["upload_bytes"] > 0
    assert not summary["rejections"]


def test_the_strategy_trains_a_flower_app(outside):
    careful = runpy.run_path(str(outside / "careful.py"))["careful"]
    app = vanilla_app(mods=[pipeline_mod([Clip()])])
    start = ArrayRecord(make_model().state_dict())
    result = careful(lr=0.1).start(on_engine(app), start, num_rounds=8)
    assert accuracy(result.arrays) > 0.6
