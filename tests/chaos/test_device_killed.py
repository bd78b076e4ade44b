"""Devices are killed without a word, at whatever they do: the rounds go on, and they may come back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.scene import PHASE, Scene, assert_whole

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.slow,
    pytest.mark.xdist_group("flower"),
    pytest.mark.timeout(900),
]

UPLOAD = rb"POST /v1/fleet/push-object"


def test_half_of_the_devices_die_in_training_and_the_other_half_goes_on(tmp_path: Path) -> None:
    with Scene(tmp_path, 4, "rounds=2", f"scheduler.deadline={PHASE / 2}") as scene:
        scene.held.hold()
        run = scene.start()
        run.until(lambda: all(map(scene.held.at_work, scene.nodes)), "training on all")
        for node in scene.nodes[2:]:
            node.kill()
        scene.held.go()
        assert run.ended() == 0
        assert_whole(scene.summary, 2)
        first, second = scene.summary["history"]
        assert (first["clients_sampled"], first["clients_failed"]) == (4, 2)
        # By then Flower has noticed, or they are asked in vain once more.
        assert second["clients_sampled"] - second["clients_failed"] == 2
        assert (first["void"], second["void"]) == (False, False)


@pytest.mark.parametrize("after", [b"", rb".{200,}"], ids=["before-it", "in-it"])
def test_a_device_that_dies_in_its_upload_spoils_nothing(tmp_path: Path, after: bytes) -> None:
    with Scene(tmp_path, 3, "rounds=2", f"scheduler.deadline={PHASE / 2}") as scene:
        scene.held.hold()
        run = scene.start()
        run.until(lambda: all(map(scene.held.at_work, scene.nodes)), "training on all")
        proxy = scene.proxies[2]
        uploading = proxy.catch(UPLOAD + after, "up", lambda: proxy.set("hold"))
        scene.held.go()
        run.until(uploading.is_set, "an upload")
        scene.nodes[2].kill()
        proxy.set("drop")  # what was held is lost with it
        assert run.ended() == 0
        assert_whole(scene.summary, 2)
        first = scene.summary["history"][0]
        assert (first["clients_sampled"], first["clients_failed"], first["void"]) == (3, 1, False)


def test_a_device_comes_back_under_its_key_and_takes_part_again(
    tmp_path: Path, certificates: Path
) -> None:
    with Scene(tmp_path, 2, "rounds=4", certificates=certificates) as scene:
        before = [scene.node_id(partition) for partition in range(2)]
        scene.held.hold()
        run = scene.start()
        run.until(lambda: all(map(scene.held.at_work, scene.nodes)), "training on both")
        scene.nodes[1].kill()
        scene.held.go()
        run.wait_for("^round 1/")  # one reply, and a node that missed its heartbeats
        scene.held.hold()
        scene.restart_node(1)  # refused until Flower has given the old one up
        assert [scene.node_id(partition) for partition in range(2)] == before
        scene.held.go()
        assert run.ended() == 0
        assert_whole(scene.summary, 4)
        rows = scene.summary["history"]
        assert (rows[0]["clients_sampled"], rows[0]["clients_failed"]) == (2, 1)
        assert (rows[-1]["clients_sampled"], rows[-1]["clients_failed"]) == (2, 0)
