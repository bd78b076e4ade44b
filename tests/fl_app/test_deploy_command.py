"""`trellis deploy`: what it starts outlives it, and it ends nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from fl_app.cli.deploy import main
from fl_app.flower.background import Background, Started
from fl_app.flower.bundle import BUNDLE
from fl_app.flower.processes import Port


@pytest.fixture
def sleeper() -> Iterator[psutil.Popen]:
    process = psutil.Popen(["sh", "-c", "sleep 1000 & sleep 1000"])
    yield process
    for one in [*process.children(recursive=True), process]:
        one.kill()
    process.wait()


def note(folder: Path, *programs: Started) -> None:
    noted = [vars(one) for one in programs]
    text = json.dumps({"format": "trellis-deployment-1", "programs": noted})
    (folder / "programs.json").write_text(text)


class TestDown:
    def test_what_was_started_ends_with_its_children(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        child = subprocess.Popen(["sh", "-c", "sleep 1000 & sleep 1000"])
        process = psutil.Process(child.pid)
        while len(family := [process, *process.children(recursive=True)]) < 3:
            time.sleep(0.01)
        note(tmp_path, Started("node-0", process.pid, process.create_time(), "log"))
        assert main(["down", "--state", str(tmp_path)]) == 0
        child.wait()
        assert [one for one in family if one.is_running()] == []
        assert capsys.readouterr().out == f"node-0 (process {process.pid}) ended\n"
        assert not (tmp_path / "programs.json").exists()

    @pytest.mark.parametrize("apart", [-60.0, 60.0])
    def test_a_stranger_that_was_given_the_id_lives_on(
        self, tmp_path: Path, sleeper: psutil.Popen, apart: float
    ) -> None:
        note(tmp_path, Started("node-0", sleeper.pid, sleeper.create_time() + apart, "log"))
        assert main(["down", "--state", str(tmp_path)]) == 0
        assert sleeper.is_running()
        assert sleeper.status() != psutil.STATUS_ZOMBIE

    def test_with_nothing_started_there_is_nothing_to_do(self, tmp_path: Path) -> None:
        assert main(["down", "--state", str(tmp_path / "none")]) == 0
        assert not (tmp_path / "none").exists()

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{}",
            '{"format": "other"}',
            '{"format": "trellis-deployment-1", "programs": [{"a": 1}]}',
        ],
    )
    def test_a_list_that_cannot_be_read_ends_nothing_and_is_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
    ) -> None:
        (tmp_path / "programs.json").write_text(text)
        assert main(["down", "--state", str(tmp_path)]) == 1
        assert f"{tmp_path}/programs.json can't be read" in capsys.readouterr().err


class TestUp:
    def test_a_superlink_of_somebody_elses_at_the_port_is_not_taken_for_ours(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Health(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        with HTTPServer(("127.0.0.1", 0), Health) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            port = str(server.server_address[1])
            assert main(["up", "--state", str(tmp_path), "--port", port]) == 1
            server.shutdown()
        assert "another SuperLink answers" in capsys.readouterr().err
        assert Background(tmp_path, BUNDLE).programs == []

    @pytest.mark.parametrize("words", [["--nodes", "-1"], ["--port", "0"], ["--host", "a b"]])
    def test_what_makes_no_sense_is_refused(self, tmp_path: Path, words: list[str]) -> None:
        assert main(["up", "--state", str(tmp_path), *words]) == 2
        assert Background(tmp_path, BUNDLE).programs == []


def test_a_run_without_a_superlink_says_how_to_start_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--state", str(tmp_path), "task=digits"]) == 1
    assert "trellis deploy up" in capsys.readouterr().err
    assert main(["status", "--state", str(tmp_path)]) == 1


def test_help_has_examples_and_a_slip_is_met_with_a_guess(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    assert "examples:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["stauts"])
    assert ended.value.code == 2
    assert "did you mean status?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("flower")
def test_what_is_started_outlives_the_command_and_keeps_its_keys(tmp_path: Path) -> None:
    port = Port()
    number = str(port.number)
    port.close()

    def trellis(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fl_app.cli.main", "deploy", *words, "--state", "here"]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False
        )

    deployment = Background(tmp_path / "here", BUNDLE)
    try:
        done = trellis("up", "--nodes", "1", "--port", number)
        assert done.returncode == 0, done.stderr
        first = deployment.programs
        assert [one.name for one in first] == ["superlink", "node-0"]
        assert trellis("status").returncode == 0
        done = trellis("up", "--nodes", "1", "--port", number)
        assert (done.returncode, done.stdout) == (0, "")  # nothing was left to start
        assert deployment.programs == first
        key = deployment.files.node_key("node-0").read_bytes()
        node = deployment.connection.ask("supernode", "list")["nodes"]

        link = first[0].process()
        assert link is not None
        link.kill()
        link.wait(10)
        assert trellis("status").returncode == 1
        assert trellis("up", "--nodes", "1", "--port", number).returncode == 0
        again = deployment.connection.ask("supernode", "list")["nodes"]
        assert [one["node-id"] for one in again] == [one["node-id"] for one in node]
        assert deployment.files.node_key("node-0").read_bytes() == key
    finally:
        programs = [one.process() for one in deployment.programs]
        assert trellis("down").returncode == 0
    assert [one for one in programs if one is not None and one.is_running()] == []
