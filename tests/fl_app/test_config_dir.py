"""Choices of a user's own, from a folder of theirs."""

import os

import pytest

from fl_app.cli.main import main
from fl_app.compose import compose
from fl_app.config.catalogue import OWN
from fl_app.config.faults import ConfigError

CAREFUL = """# @package _global_
# Clips, and Adam on the server.
# trellis run --config-dir conf strategy=careful
defaults:
  - override /clip: fixed
  - override /server: adam

clip:
  norm: 2.5
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    folder = tmp_path / "my, own 'conf'"
    (folder / "strategy").mkdir(parents=True)
    (folder / "strategy" / "careful.yaml").write_text(CAREFUL)
    monkeypatch.setenv(OWN, str(folder))
    return folder


def test_a_strategy_of_ones_own_is_a_choice_like_the_others(own):
    config = compose(["strategy=careful", "server.lr=0.5"])
    assert (config.strategy, config.server.name) == ("careful", "adam")
    assert config.clip.arguments["norm"] == 2.5
    assert config.server.arguments["lr"] == 0.5


def test_a_group_file_keeps_its_name(own):
    (own / "server").mkdir()
    (own / "server" / "slow.yaml").write_text(
        "# Slow.\n# trellis run server=slow\n_target_: strategies.server_models.SGD\nlr: 0.1\n"
    )
    assert compose(["server=slow"]).server.name == "slow"


def test_the_option_is_the_same_and_the_list_shows_it(tmp_path, own, monkeypatch, capsys):
    monkeypatch.delenv(OWN)
    with pytest.raises(ConfigError, match="unknown choice"):
        compose(["strategy=careful"])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main(["run", "--config-dir", str(own), "strategy=careful", "--dry-run"]) == 0
    assert "norm: 2.5" in capsys.readouterr().out
    assert main(["list", "--config-dir", str(own), "strategies"]) == 0
    assert "Clips, and Adam on the server." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("strategie/x.yaml", "a: 1\n", "strategie  a folder in it is named after a group"),
        ("strategy/fedavg.yaml", CAREFUL, "there is a strategy=fedavg already"),
        ("strategy/bad.yaml", "defaults:\n  - override /clip: nope\n", "can't be composed"),
        ("strategy/bad.yaml", "a: [\n", "can't be composed"),
        ("strategy/bad.yaml", "# @package _global_\nunheard_of: 1\n", "unheard_of"),
    ],
)
def test_a_folder_that_is_wrong_is_refused_with_the_place(own, name, text, told):
    path = own / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose(["strategy=bad"] if path.stem == "bad" else [])
    assert told in str(caught.value)


def test_a_folder_that_is_not_there_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv(OWN, str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="there is no such folder"):
        compose([])
