"""A run's folder is read as it was written, and refused with its reason where it can't be audited."""

import json

import numpy as np
import pytest
from audit_helpers import CLIPPED, SMALL, made
from safetensors.numpy import load_file

from fl_app.audit.target import UNCLAIMED_DELTA, load
from fl_app.compose import compose
from fl_app.config.faults import ConfigError


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["strategy=scaffold", "experiment=quickstart"],
        ["strategy=secure", "model.hidden=[16]"],
        ["combiner=bucketing", "attack=alie", "quarantine=strikes"],
        ["task=csv", "task.path=rows.csv", "task.target=kind", "travel=[head*]"],
    ],
)
def test_a_configuration_comes_back_from_its_file_as_it_was(tmp_path, overrides):
    from fl_app.audit import target

    config = compose([*SMALL, *overrides])
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    again = target._config(tmp_path, config.task.name)
    assert again.to_dict() == config.to_dict()
    assert again.identity_hash() == config.identity_hash()
    assert again.task.name == config.task.name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made(tmp_path_factory.mktemp("runs"), *CLIPPED)


def test_a_run_is_read_with_its_model_and_trained_anew_elsewhere(run):
    target = load(run)
    assert (target.num_clients, target.rounds, target.promise) == (4, 2, None)
    assert target.delta("client") == target.delta("example") == UNCLAIMED_DELTA
    stored = load_file(run / "model.safetensors")
    for name, array in target.model().items():
        np.testing.assert_array_equal(array, stored[name])
    anew = target.trained_anew("canaries", seed=5)
    assert anew.run_dir == run / "audit" / "canaries"
    assert (anew.seed, anew.rounds, anew.evaluate.every) == (5, 2, 0)
    assert anew.clip == target.config.clip


@pytest.fixture
def copied(run, tmp_path):
    for name in ("summary.json", "config.yaml", "model.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    return tmp_path


def changed(folder, **values):
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | values))


def test_what_is_promised_is_read(copied):
    privacy = {"unit": "client", "epsilon": 2.5, "delta": 1e-6, "adjacency": "add_or_remove_one"}
    changed(copied, privacy=privacy)
    target = load(copied)
    assert target.promise.to_dict() == privacy
    assert (target.delta("client"), target.delta("example")) == (1e-6, UNCLAIMED_DELTA)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "summary.json").unlink(), "it holds no run"),
        (lambda f: (f / "config.yaml").unlink(), "it holds no run"),
        (lambda f: (f / "model.safetensors").unlink(), "there is no model.safetensors"),
        (lambda f: (f / "config.yaml").write_text("a: ["), "can't be read"),
        (lambda f: (f / "config.yaml").write_text("[]"), "is no mapping"),
        (lambda f: changed(f, config_hash="0"), "run it again"),
        (lambda f: changed(f, privacy={"unit": "client"}), "its privacy can't be read"),
        (lambda f: changed(f, rounds_completed=0), "how many rounds"),
        (
            lambda f: (f / "config.yaml").write_text(
                (f / "config.yaml").read_text().replace("backend: engine", "backend: flower")
            ),
            "backend=flower",
        ),
    ],
)
def test_what_can_not_be_audited_is_refused_with_the_reason(copied, spoil, said):
    spoil(copied)
    with pytest.raises(ConfigError, match=said):
        load(copied)


def test_a_torn_model_is_refused(copied):
    (copied / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="can't be read"):
        load(copied).model()


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="it holds no run"):
        load(tmp_path / "nothing")
