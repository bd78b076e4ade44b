"""A device is cut off for longer than Flower waits for its heartbeats, and comes back.

Rounds go on without it, then with it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from fl_app.flower.processes import Program
from tests.chaos.scene import Scene, assert_whole
from tests.support.proxy import Mode, Proxy

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.slow,
    pytest.mark.xdist_group("flower"),
    pytest.mark.timeout(900),
]

CUT = 2


def online(scene: Scene) -> int:
    return sum(node["status"] == "online" for node in scene.ask("supernode", "list")["nodes"])


def assert_borne(
    scene: Scene, cut: Callable[[], object], heal: Callable[[], object], rounds: int = 3
) -> None:
    """The round in which a device is cut off is made without it; once it is back, it is asked again."""
    scene.held.hold()
    run = scene.start()
    run.until(lambda: all(map(scene.held.at_work, scene.nodes)), "training on all")
    cut()
    scene.held.go()
    run.wait_for("^round 1/")  # 60 s later, when two heartbeats are missing
    scene.held.hold()
    assert online(scene) == len(scene.nodes) - 1
    heal()
    run.until(lambda: online(scene) == len(scene.nodes), "heartbeat of the one that was cut off")
    scene.held.go()
    assert run.ended() == 0
    assert all(node.running for node in scene.nodes)
    assert_whole(scene.summary, rounds)
    rows = scene.summary["history"]
    everyone = len(scene.nodes)
    assert (rows[0]["clients_sampled"], rows[0]["clients_failed"]) == (everyone, 1)
    assert (rows[-1]["clients_sampled"], rows[-1]["clients_failed"]) == (everyone, 0)
    assert set(scene.summary["rejections"]) == {"client_error"}  # nothing late was taken


@pytest.mark.parametrize("mode", ["drop", "hold"])
def test_a_device_behind_a_dead_network_is_done_without_until_it_is_back(
    tmp_path: Path, mode: Mode
) -> None:
    with Scene(tmp_path, 3, "rounds=3") as scene:
        proxy = scene.proxies[CUT]
        assert_borne(scene, lambda: proxy.set(mode), lambda: proxy.set("forward"))


class Namespaced(Scene):
    """The last SuperNode lives in a network namespace, and reaches the others through one cable."""

    namespace, here, there = "chaos", "10.231.77.1", "10.231.77.2"

    def _through_a_proxy(self, partition: int, link: str) -> str:
        if partition == CUT and partition not in self.proxies:
            host, port = link.split(":")
            self.proxies[partition] = Proxy((host, int(port)), host=self.here)
        return super()._through_a_proxy(partition, link)

    def _start(
        self, name: str, command: Sequence[str], home: Path, extra: Mapping[str, str]
    ) -> Program:
        if home.name == f"node-{CUT}":
            command = ["ip", "netns", "exec", self.namespace, *command]
        return super()._start(name, command, home, extra)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def cable() -> Iterator[str]:
    """A network namespace with a cable to it; the name of this end."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces are root's to make")
    space, end = Namespaced.namespace, "chaos0"
    try:
        ip("netns", "add", space)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
    try:
        ip("link", "add", end, "type", "veth", "peer", "name", "chaos1", "netns", space)
        ip("addr", "add", f"{Namespaced.here}/30", "dev", end)
        ip("link", "set", end, "up")
        ip("-n", space, "addr", "add", f"{Namespaced.there}/30", "dev", "chaos1")
        ip("-n", space, "link", "set", "chaos1", "up")
        ip("-n", space, "link", "set", "lo", "up")
        yield end
    finally:
        ip("netns", "del", space)


def test_a_device_whose_cable_is_pulled_is_done_without_until_it_is_plugged_in(
    tmp_path: Path, cable: str
) -> None:
    with Namespaced(tmp_path, 3, "rounds=3") as scene:
        assert_borne(
            scene,
            lambda: ip("link", "set", cable, "down"),
            lambda: ip("link", "set", cable, "up"),
        )


def test_a_slow_device_is_late_and_not_lost(tmp_path: Path) -> None:
    with Scene(tmp_path, 2, "rounds=2") as scene:
        scene.proxies[1].set("slow")
        run = scene.start()
        assert run.ended() == 0
        assert_whole(scene.summary, 2)
        assert not any(row["clients_failed"] for row in scene.summary["history"])
