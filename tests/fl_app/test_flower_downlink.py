"""Held models on Flower: Ray's simulation, and real SuperNodes with a process a message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fl_app.flower import run_flower
from fl_app.flower.bundle import BUNDLE
from fl_app.flower.deployment import Deployment
from tests.fl_app.test_flower_backend import nothing_left  # noqa: F401 - a fixture for all of these

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("flower"), pytest.mark.timeout(600)]

SMALL = ["task=digits", "rounds=2", "run_name=small", "downlink=delta"]


def summary_in(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "small" / "summary.json").read_text())
    return found


def shrinks(summary: dict[str, Any]) -> None:
    first, *others = (row["download_bytes"] for row in summary["history"])
    assert max(others) < first / 2
    assert summary["rejections"] == {}


def test_a_simulation_of_flowers_holds_models(tmp_path: Path) -> None:
    overrides = [*SMALL, "num_clients=3", f"output_dir={tmp_path}"]
    assert run_flower(overrides, num_supernodes=3, project=BUNDLE, echo=lambda line: None) == 0
    shrinks(summary_in(tmp_path))


@pytest.mark.parametrize("strategy", ["fedavg", "secure"])
def test_supernodes_hold_models_from_process_to_process(tmp_path: Path, strategy: str) -> None:
    overrides = [*SMALL, "num_clients=3", f"strategy={strategy}", f"output_dir={tmp_path}"]
    own = f'client-folder="{tmp_path}/own"'
    with Deployment(BUNDLE, num_supernodes=3, node_config=lambda partition: own) as link:
        link.run(overrides, echo=lambda line: None)
    shrinks(summary_in(tmp_path))
    kept = (tmp_path / "small" / "clients" / "held").rglob("*.safetensors")
    assert {path.parent.name for path in kept} == {"client-0", "client-1", "client-2"}
