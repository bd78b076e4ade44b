"""Asynchronous runs on Flower: Ray's simulation, and real SuperNodes that are asked one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from fl_app.flower import run_flower
from fl_app.flower.bundle import BUNDLE
from fl_app.flower.deployment import Deployment
from tests.fl_app.test_flower_backend import (
    nothing_left,  # noqa: F401 - a fixture for all of these
    summary_in,
)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("flower"), pytest.mark.timeout(900)]

SMALL = ["task=digits", "rounds=4", "run_name=small", "num_clients=4", "strategy=fedbuff"]
BUSY = ["scheduler.buffer=2", "scheduler.concurrency=4", "round_timeout=120"]


def assert_completed(summary) -> None:
    assert (summary["status"], summary["rounds_completed"]) == ("completed", 4)
    assert summary["rejections"] == {}
    assert not any(row["void"] for row in summary["history"])
    # Whoever is asked is at work at the end, or was taken: two updates a version, and four at work at most.
    asked = sum(row["clients_sampled"] for row in summary["history"])
    assert 2 * 4 <= asked <= 2 * 4 + 4


def test_a_simulation_of_flowers_makes_steps_of_two(tmp_path: Path) -> None:
    overrides = [*SMALL, *BUSY, f"output_dir={tmp_path}"]
    assert run_flower(overrides, num_supernodes=4, project=BUNDLE, echo=lambda line: None) == 0
    assert_completed(summary_in(tmp_path))


def test_supernodes_are_asked_one_after_the_other(tmp_path: Path) -> None:
    def own(partition: int) -> str:
        return f'client-folder="{tmp_path}/own"'

    with Deployment(BUNDLE, num_supernodes=4, node_config=own) as link:
        link.run([*SMALL, *BUSY, f"output_dir={tmp_path}"], echo=lambda line: None)
    assert_completed(summary_in(tmp_path))
