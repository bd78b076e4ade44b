"""A secured deployment of real processes: who is let in, who is not, and what a restart keeps."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import httpx
import psutil
import pytest
from fastapi import FastAPI
from flwr.proto.fleet_pb2 import ActivateNodeResponse, RegisterNodeFleetResponse
from flwr.supercore import sql_mixin
from flwr.supercore.constant import SQLITE_PRAGMAS
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.superlink.main import create_app
from starlette.types import Receive, Scope, Send

from fl_app.cli import superlink, supernode
from fl_app.flower import Deployment, FlowerError
from fl_app.flower import __main__ as command
from fl_app.flower.bundle import BUNDLE
from fl_app.flower.certificates import Certificates, make_authority, make_missing, make_node
from fl_app.flower.connection import Connection
from fl_app.flower.deployment import superlink_program, supernode_program
from fl_app.flower.own_machine import OwnMachine, behind_door, from_here, is_open, patient
from fl_app.flower.processes import Port, Program, environment, healthy


async def served(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"served"})


def asked(path: str, client: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        door = httpx.ASGITransport(app=OwnMachine(served), client=(client, 50000))
        async with httpx.AsyncClient(transport=door) as asking:
            return await asking.post(f"https://192.0.2.1:9092{path}")

    return asyncio.run(ask())


class TestOwnMachine:
    @pytest.mark.parametrize(
        "path", ["/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/x", "/docs"]
    )
    def test_others_give_it_no_commands(self, path: str) -> None:
        for stranger in ("192.0.2.7", "10.0.0.1", "2001:db8::1", "::ffff:192.0.2.7"):
            answer = asked(path, stranger)
            assert answer.status_code == 403
            assert "from its own machine only" in answer.json()["detail"]

    @pytest.mark.parametrize(
        "path", ["/v1/fleet/activate-node", "/v1/fleet/push-object", "/health"]
    )
    def test_nodes_reach_what_they_need(self, path: str) -> None:
        assert asked(path, "192.0.2.7").text == "served"

    @pytest.mark.parametrize(
        "path", ["/health/", "/healthy", "/v1/fleet", "/v1/fleetx/a", "//v1/fleet/a"]
    )
    def test_what_only_looks_alike_is_refused(self, path: str) -> None:
        assert asked(path, "192.0.2.7").status_code == 403

    @pytest.mark.parametrize(
        "client", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", "192.0.2.1"]
    )
    def test_its_own_machine_gives_it_commands(self, client: str) -> None:
        assert asked("/v1/control/start-run", client).text == "served"

    def test_a_peer_without_an_address_is_a_stranger(self) -> None:
        assert not from_here({"client": None, "server": None})
        assert not from_here({"client": ("", 0), "server": ("", 0)})
        assert not from_here({"server": ("192.0.2.1", 9092)})

    def test_a_strangers_websocket_is_closed(self) -> None:
        sent: list[object] = []

        async def connect() -> None:
            async def send(message: object) -> None:
                sent.append(message)

            scope = {"type": "websocket", "path": "/v1/control/x", "client": ("192.0.2.7", 1)}
            await OwnMachine(served)(scope, None, send)  # type: ignore[arg-type]

        asyncio.run(connect())
        assert sent == [{"type": "websocket.close", "code": 1008}]


class TestFlowersOwnApp:
    """The door before what Flower really serves, so that a later Flower cannot go round it unnoticed."""

    @pytest.fixture(scope="class")
    @staticmethod
    def app() -> FastAPI:
        return behind_door(create_app)()

    def asked(self, app: FastAPI, paths: list[str], client: str) -> list[httpx.Response]:
        async def ask() -> list[httpx.Response]:
            door = httpx.ASGITransport(app=app, client=(client, 50000))
            async with httpx.AsyncClient(transport=door, base_url="https://192.0.2.1") as asking:
                return [await asking.post(path, content=b"") for path in paths]

        return asyncio.run(ask())

    def test_a_stranger_is_refused_each_command_that_there_is(self, app: FastAPI) -> None:
        paths = [path for path in app.openapi()["paths"] if not is_open(path)]
        assert {"/v1/control/start-run", "/v1/control/register-node"} <= set(paths)
        assert {answer.status_code for answer in self.asked(app, paths, "192.0.2.7")} == {403}

    def test_its_own_machine_is_heard(self, app: FastAPI) -> None:
        (answer,) = self.asked(app, ["/v1/control/list-runs"], "127.0.0.1")
        assert answer.status_code != 403

    def test_a_node_gets_as_far_as_flowers_own_check(self, app: FastAPI) -> None:
        (answer,) = self.asked(app, ["/v1/fleet/activate-node"], "192.0.2.7")
        assert "own machine" not in answer.text


@pytest.mark.parametrize("program", [superlink, supernode])
def test_the_command_explains_itself(
    program: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["--help"]) == 0
    assert "examples:" in capsys.readouterr().out
    assert program.main([]) == 2


def test_the_database_waits_longer_and_is_otherwise_flowers() -> None:
    mine, flowers = dict(patient(SQLITE_PRAGMAS)), dict(SQLITE_PRAGMAS)
    assert int(mine.pop("busy_timeout")) > 10 * int(flowers.pop("busy_timeout"))
    assert mine == flowers
    assert vars(sql_mixin)["SQLITE_PRAGMAS"] is SQLITE_PRAGMAS  # where Flower looks them up


@pytest.mark.slow
def test_half_a_request_does_not_keep_a_superlink_from_ending(tmp_path: Path) -> None:
    port = Port()
    words = [*superlink_program(), "--insecure", "--host", "127.0.0.1", "--port", str(port.number)]
    env = environment(tmp_path)
    # Longer than it has for its answers, shorter than forever: what ends it must be its own doing.
    with Program(words, env=env, cwd=tmp_path, log=tmp_path / "log", grace=60) as link:
        link.wait_for(port, seconds=120)
        with socket.create_connection(("127.0.0.1", port.number)) as stranger:
            head = f"POST /v1/fleet/activate-node HTTP/1.1\r\nHost: here\r\nContent-Type: {PROTOBUF_MEDIA_TYPE}\r\n"
            stranger.sendall(f"{head}Content-Length: 100\r\n\r\nhalf".encode())
            time.sleep(
                0.5
            )  # it is read by then; else there is nothing to wait for, and less to see
            psutil.Process(link.pid).terminate()
            deadline = time.monotonic() + 40
            while link.running:
                assert time.monotonic() < deadline, link.log_tail()
                time.sleep(0.05)
    port.close()
    said = link.log.read_text()
    assert "Waiting for connections to close" in said
    assert "Application shutdown complete" in said


class Failing(BaseHTTPRequestHandler):
    """A SuperLink that takes every node, and then fails."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        known = {
            "/v1/fleet/register-node": RegisterNodeFleetResponse(node_id=7),
            "/v1/fleet/activate-node": ActivateNodeResponse(node_id=7),
        }
        answer = known.get(self.path)
        self.send_response(500 if answer is None else 200)
        self.send_header("content-type", PROTOBUF_MEDIA_TYPE)
        body = b"" if answer is None else answer.SerializeToString()
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_node_that_has_lost_its_superlink_ends(tmp_path: Path) -> None:
    port = Port()
    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words = [*supernode_program(), "--insecure"]
        words += ["--superlink", f"127.0.0.1:{server.server_address[1]}"]
        words += ["--host", "127.0.0.1", "--port", str(port.number)]
        env = environment(tmp_path)
        with Program(words, env=env, cwd=tmp_path, log=tmp_path / "log") as node:
            deadline = time.monotonic() + 120
            while node.running:
                assert time.monotonic() < deadline, node.log_tail()
                time.sleep(0.05)
        server.shutdown()
    port.close()
    said = node.log.read_text()
    assert "SuperNode ID: 7" in said
    assert "ended the connection" in said


class TestWhatLacks:
    def test_a_missing_key_is_named_with_the_mend(self, tmp_path: Path) -> None:
        make_missing(tmp_path, [], ["node-0"])
        with pytest.raises(FlowerError, match=f"node-1 is not there: trellis certs all {tmp_path}"):
            Deployment(BUNDLE, num_supernodes=2, certificates=tmp_path)

    def test_where_no_superlink_is_named_flower_starts_none_of_its_own(
        self, tmp_path: Path
    ) -> None:
        with pytest.raises(FlowerError, match=f"{tmp_path} names no SuperLink"):
            Connection(BUNDLE, tmp_path).ask("ls")
        assert list(tmp_path.iterdir()) == []

    def test_a_simulation_is_not_secured(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            command.main(["--secure"])
        assert ended.value.code == 2
        assert "--secure is for --deployment" in capsys.readouterr().err

    def test_a_program_that_has_ended_has_no_process_and_dies_no_second_time(
        self, tmp_path: Path
    ) -> None:
        with Program(
            ["sh", "-c", "echo gone"], env=os.environ, cwd=tmp_path, log=tmp_path / "log"
        ) as one:
            while one.running:
                time.sleep(0.02)
            one.kill()
            with pytest.raises(FlowerError, match=r"sh does not run(.|\n)*gone"):
                one.pid  # noqa: B018

    def test_a_kill_takes_the_whole_family_at_once_and_unasked(self, tmp_path: Path) -> None:
        asked = tmp_path / "asked"
        script = f"trap 'touch {asked}' TERM; setsid sleep 1000 & sleep 1000 & while :; do sleep 0.1; done"
        with Program(
            ["sh", "-c", script], env=os.environ, cwd=tmp_path, log=tmp_path / "log"
        ) as one:
            root = psutil.Process(one.pid)
            while len(family := [root, *root.children(recursive=True)]) < 4:
                time.sleep(0.02)
            one.kill()
            assert [process for process in family if process.is_running()] == []
            assert not one.running
        assert not asked.exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("flower")
class TestSecured:
    """One deployment of two nodes, several questions."""

    @pytest.fixture(scope="class")
    @staticmethod
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("secured")
        make_missing(folder / "certs", [], ["node-0", "node-1"])
        return folder

    @pytest.fixture(scope="class")
    @staticmethod
    def deployment(folder: Path) -> Iterator[Deployment]:
        with Deployment(
            BUNDLE,
            num_supernodes=2,
            certificates=folder / "certs",
            database=folder / "superlink.db",
        ) as deployment:
            yield deployment

    def run(self, deployment: Deployment, folder: Path, name: str) -> None:
        lines: list[str] = []
        overrides = ["task=digits", "num_clients=2", "rounds=2", f"run_name={name}"]
        assert deployment.run([*overrides, f"output_dir={folder}"], echo=lines.append) == 0, lines
        summary = json.loads((folder / name / "summary.json").read_text())
        assert (summary["status"], summary["rounds_completed"]) == ("completed", 2)
        assert [row["clients_sampled"] for row in summary["history"]] == [2, 2]
        assert [row["clients_failed"] for row in summary["history"]] == [0, 0]

    def refused(self, deployment: Deployment, folder: Path, options: list[str]) -> str:
        """What a stranger's SuperNode says before it gives up."""
        port = Port()
        words = ["flower-supernode", "--superlink", deployment.port.address]
        words += ["--host", "127.0.0.1", "--port", str(port.number), *options]
        home = folder / "stranger"
        home.mkdir(exist_ok=True)
        env = environment(home)
        with Program(words, env=env, cwd=folder, log=home / "log") as stranger:
            deadline = time.monotonic() + 240
            while stranger.running:
                assert time.monotonic() < deadline, stranger.log_tail()
                time.sleep(0.1)
        port.close()
        return stranger.log.read_text()

    def test_a_run_completes(self, deployment: Deployment, folder: Path) -> None:
        assert {deployment.node_id(0), deployment.node_id(1)} == {
            int(node["node-id"]) for node in deployment.ask("supernode", "list")["nodes"]
        }
        self.run(deployment, folder, "first")

    def test_nothing_is_said_in_clear(self, deployment: Deployment, folder: Path) -> None:
        address = deployment.port.address
        assert healthy(address, Certificates(folder / "certs").authority)
        assert not healthy(address, None)
        make_authority(folder / "other")
        assert not healthy(address, Certificates(folder / "other").authority)
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            urllib.request.urlopen(f"https://{address}/health", timeout=5)

    def test_a_node_whose_key_was_not_registered_is_refused(
        self, deployment: Deployment, folder: Path
    ) -> None:
        make_node(folder / "strangers", "intruder")
        key = Certificates(folder / "strangers").node_key("intruder")
        trust = Certificates(folder / "certs").authority
        said = self.refused(
            deployment,
            folder,
            ["--root-certificates", str(trust), "--auth-supernode-private-key", str(key)],
        )
        assert "Failed to activate SuperNode" in said
        assert len(deployment.ask("supernode", "list")["nodes"]) == 2

    def test_a_node_without_a_key_is_refused(self, deployment: Deployment, folder: Path) -> None:
        trust = Certificates(folder / "certs").authority
        said = self.refused(deployment, folder, ["--root-certificates", str(trust)])
        assert "All SuperNodes must be registered via the CLI" in said

    def test_a_node_that_trusts_another_authority_says_so(
        self, deployment: Deployment, folder: Path
    ) -> None:
        make_authority(folder / "wrong")
        key = Certificates(folder / "certs").node_key("node-0")
        said = self.refused(
            deployment,
            folder,
            [
                *("--root-certificates", str(Certificates(folder / "wrong").authority)),
                *("--auth-supernode-private-key", str(key)),
            ],
        )
        assert "SSL/TLS handshake error detected" in said
        assert "certificate verify failed" in said

    def test_a_superlink_that_was_killed_comes_back_with_its_nodes(
        self, deployment: Deployment, folder: Path
    ) -> None:
        before = {partition: deployment.node_id(partition) for partition in range(2)}
        killed = psutil.Process(deployment.link.pid)
        assert "own_machine" in " ".join(killed.cmdline())
        deployment.link.kill()
        assert not killed.is_running()
        deployment.restart_link()
        assert psutil.Process(deployment.link.pid) != killed
        self.run(deployment, folder, "second")
        assert {partition: deployment.node_id(partition) for partition in range(2)} == before

    def test_a_node_that_ended_in_order_joins_again_at_once_as_itself(
        self, deployment: Deployment
    ) -> None:
        before = deployment.node_id(1)
        deployment.restart_node(1, seconds=60)
        assert deployment.node_id(1) == before


def test_a_superlink_without_a_database_cannot_be_started_again(tmp_path: Path) -> None:
    with pytest.raises(FlowerError, match="from its database only"):
        Deployment(BUNDLE).restart_link()
