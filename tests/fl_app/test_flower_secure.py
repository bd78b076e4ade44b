"""Secure sums on Flower: Ray's simulation, and real SuperNodes whose keys are their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fl_app.cli.main import main
from fl_app.flower import run_flower
from fl_app.flower.bundle import BUNDLE
from fl_app.flower.deployment import Deployment
from tests.fl_app.test_flower_backend import nothing_left  # noqa: F401 - a fixture for all of these

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("flower"), pytest.mark.timeout(900)]

SMALL = ["task=digits", "rounds=2", "run_name=small", "num_clients=3"]


def summary_in(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "small" / "summary.json").read_text())
    return found


@pytest.mark.parametrize("strategy", ["secure", "ckks_mean"])
def test_a_simulation_of_flowers_sees_sums(tmp_path: Path, strategy: str) -> None:
    overrides = [*SMALL, f"strategy={strategy}", f"output_dir={tmp_path}"]
    assert run_flower(overrides, num_supernodes=3, project=BUNDLE, echo=lambda line: None) == 0
    summary = summary_in(tmp_path)
    assert (summary["rejections"], summary["rounds_completed"]) == ({}, 2)
    assert not any(row["void"] for row in summary["history"])


def deployed(tmp_path: Path, node_config: str, *overrides: str) -> dict[str, Any]:
    """What a run on three SuperNodes left; `{client}` stands for each node's own number."""

    def own(partition: int) -> str:
        return f'client-folder="{tmp_path}/own" ' + node_config.format(client=partition)

    chosen = [*SMALL, *overrides, f"output_dir={tmp_path}"]
    with Deployment(BUNDLE, num_supernodes=3, node_config=own) as link:
        link.run(chosen, echo=lambda line: None)
    return summary_in(tmp_path)


def test_supernodes_hold_a_server_that_they_do_not_trust_to_their_rosters(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    assert main(["keys", "identities", str(keys), "--clients", "3"]) == 0
    own = f'secagg-roster="{keys}/roster.json" secagg-identity="{keys}/client-{{client}}.pem"'
    summary = deployed(tmp_path, own, "strategy=secure", "collector.malicious=true")
    assert (summary["status"], summary["rejections"]) == ("completed", {})
    assert not any(row["void"] for row in summary["history"])
    kept = {path.parent.name for path in (tmp_path / "own").rglob("ledger")}
    assert kept == {"client-0", "client-1", "client-2"}
    assert not (tmp_path / "small" / "clients" / "secagg").exists()


def test_supernodes_without_a_roster_take_no_part_in_the_malicious_mode(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    assert main(["keys", "identities", str(keys), "--clients", "3"]) == 0
    # The run names a roster, which is the server's word: a device does not take it.
    named = [f"collector.roster={keys}/roster.json", f"collector.identities={keys}"]
    chosen = ["strategy=secure", "collector.malicious=true", *named, "round_timeout=60"]
    summary = deployed(tmp_path, "", *chosen)
    assert (summary["status"], summary["rounds_completed"]) == ("failed", 0)
    assert "0 of 3 clients came" in summary["reason"]
    assert (
        "configuration: this client takes no part" in (tmp_path / "small" / "run.log").read_text()
    )


def test_supernodes_that_share_a_key_sum_under_it(tmp_path: Path) -> None:
    key = tmp_path / "shared.key"
    assert main(["keys", "ckks", str(key)]) == 0
    summary = deployed(tmp_path, f'ckks-key="{key}"', "strategy=ckks_mean")
    assert (summary["status"], summary["rejections"]) == ("completed", {})
