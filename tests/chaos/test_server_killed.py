"""The server is killed in the middle of a round: the same command goes on from the last checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.scene import Scene, assert_whole

pytestmark = [pytest.mark.chaos, pytest.mark.xdist_group("flower"), pytest.mark.timeout(600)]

PRIVATE = [
    "strategy=dp", "sampler=uniform", "sampler.fraction=1", "privacy.noise_multiplier=1",
    "privacy.target_epsilon=null",
]  # fmt: skip


def test_a_server_app_that_is_killed_is_resumed_and_its_broken_round_is_charged(
    tmp_path: Path,
) -> None:
    with Scene(tmp_path, 1, "rounds=2", *PRIVATE) as scene:
        run = scene.start()
        run.wait_for("^round 1/")
        scene.held.hold()
        run.until(lambda: any(map(scene.held.at_work, scene.nodes)), "training")
        before = scene.summary
        assert (before["status"], before["rounds_completed"]) == ("running", 1)
        scene.kill_server_app()
        scene.held.go()
        assert run.ended() == 1
        assert scene.summary["history"] == before["history"]

        run = scene.start()
        assert run.ended() == 0
        assert any("goes on after round 1" in line for line in run.lines)
        assert_whole(scene.summary, 2)
        assert scene.summary["history"][0] == before["history"][0]
        # Three releases may have been made in two rounds: the one that was cut short counts.
        assert scene.summary["privacy"]["releases"] == 3


@pytest.mark.slow
def test_a_superlink_that_is_killed_comes_back_with_its_database_and_the_run_is_resumed(
    tmp_path: Path,
) -> None:
    with Scene(tmp_path, 2, "rounds=3", database=True) as scene:
        run = scene.start()
        run.wait_for("^round 1/")
        scene.held.hold()
        run.until(lambda: all(map(scene.held.at_work, scene.nodes)), "training on both")
        before = scene.summary["history"]
        scene.link.kill()  # with the ServerApp, which is its child
        scene.held.go()
        assert run.ended() == 1
        assert scene.summary["history"] == before

        scene.restart_link()
        # SuperNodes reconnect; one that has given up is started again, as by a service manager.
        for partition in [one for one, node in enumerate(scene.nodes) if not node.running]:
            scene.restart_node(partition)
        run = scene.start()
        assert run.ended() == 0
        assert_whole(scene.summary, 3)
        assert scene.summary["history"][:1] == before
        assert not any(row["clients_failed"] for row in scene.summary["history"])
