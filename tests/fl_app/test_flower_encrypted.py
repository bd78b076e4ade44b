"""Encrypted training on Flower: Ray's simulation, and real SuperNodes that keep their keys to themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fl_app.cli.main import main
from fl_app.flower import run_flower
from fl_app.flower.bundle import BUNDLE
from fl_app.flower.deployment import Deployment
from tests.fl_app.test_encrypted_runs import ENCRYPTED, EXACT, STEP, TWIN, initial
from tests.fl_app.test_flower_backend import nothing_left  # noqa: F401 - a fixture for all of these
from tests.fl_app.test_run import model_of, run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("flower"), pytest.mark.timeout(900)]

SMALL = [
    *ENCRYPTED,
    "num_clients=2",
    "task.partition=iid",
    "task=digits",
    "rounds=2",
    "run_name=small",
]


FLOODED = 0.1
"""As `STEP`, of devices, whose operators tell nothing without noise: three times the largest of four runs."""


def assert_done(folder: Path, *twin: str, most: float = STEP) -> dict[str, Any]:
    """The run completed, and went the way of its plaintext twin."""
    summary: dict[str, Any] = json.loads((folder / "small" / "summary.json").read_text())
    assert (summary["status"], summary["rejections"]) == ("completed", {})
    assert summary["rounds_completed"] == 2
    plain, _, _ = run(folder / "twin", *SMALL, *TWIN, *twin)
    found, wanted, begun = (
        load_file(folder / "small" / "model.safetensors"),
        model_of(plain),
        initial(),
    )
    largest = max(np.abs(wanted[name] - begun[name]).max() for name in wanted)
    for name in wanted:
        assert np.abs(found[name] - wanted[name]).max() < most * largest, name
    return summary


def test_a_simulation_of_flowers_trains_on_ciphertexts(tmp_path: Path) -> None:
    overrides = [*SMALL, *EXACT, f"output_dir={tmp_path}"]
    assert run_flower(overrides, num_supernodes=2, project=BUNDLE, echo=lambda line: None) == 0
    assert_done(tmp_path)


def deployed(tmp_path: Path, node_config: str, *overrides: str) -> None:
    """A run on two SuperNodes; `{client}` stands for each node's own number."""

    def own(partition: int) -> str:
        folder = f'client-folder="{tmp_path}/own-{partition}"'
        return f"{folder} {node_config.format(client=partition)}"

    chosen = [*SMALL, *overrides, f"output_dir={tmp_path}"]
    with Deployment(BUNDLE, num_supernodes=2, node_config=own) as link:
        link.run(chosen, echo=lambda line: None)


@pytest.mark.parametrize("mode", ["ce", "strict"])
def test_supernodes_own_what_they_train_on(tmp_path: Path, mode: str) -> None:
    loss = {"ce": "cross_entropy", "strict": "squared"}[mode]
    deployed(tmp_path, "", f"collector.mode={mode}")
    assert_done(tmp_path, f"client.loss={loss}", most=FLOODED)
    for client in (0, 1):
        (own,) = (tmp_path / f"own-{client}" / "encrypted").glob("client-*")
        assert own.name == f"client-{client}"
        assert len(list(own.glob("owner-key-*[0-9]"))) == 1
    assert not list((tmp_path / "small").rglob("owner-key-*"))


def test_an_operator_names_the_key_and_the_run_does_not(tmp_path: Path) -> None:
    key = tmp_path / "mine.key"
    assert main(["keys", "encrypted", str(key), "--bits", "60,54,60"]) == 0
    deployed(tmp_path, f'encrypted-key="{key}"', f"client.key={tmp_path}/servers.key")
    assert_done(tmp_path, most=FLOODED)
    assert key.with_name("mine.key.ledger").is_file()
    assert not (tmp_path / "servers.key").exists()
    assert not list(tmp_path.rglob("owner-key-*"))


def test_a_supernode_computes_for_another(tmp_path: Path) -> None:
    deployed(tmp_path, "", "collector.compute_client=1")
    summary = json.loads((tmp_path / "small" / "summary.json").read_text())
    assert (summary["status"], summary["rejections"]) == ("completed", {})
    assert list((tmp_path / "own-1" / "compute" / "keys").iterdir())
    assert not (tmp_path / "own-1" / "encrypted").exists()
    assert not (tmp_path / "own-0" / "compute").exists()
