"""`trellis deploy`: what it starts outlives it, and it ends nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from fl_app.cli.deploy import main
from fl_app.cli.main import main as trellis_main
from fl_app.flower.background import Background, Started, held
from fl_app.flower.bundle import BUNDLE
from fl_app.flower.processes import Port


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    child = subprocess.Popen(["sh", "-c", "sleep 1000 & sleep 1000"])
    process = psutil.Process(child.pid)
    while len(family := [process, *process.children(recursive=True)]) < 3:
        time.sleep(0.01)
    yield process
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    child.wait()


def started(process: psutil.Process) -> Started:
    return Started.of("node-0", process.pid, Path("log"))


def lives(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


def note(folder: Path, *programs: Started) -> None:
    noted = [vars(one) for one in programs]
    text = json.dumps({"format": "trellis-deployment-2", "programs": noted})
    (folder / "programs.json").write_text(text)


class TestDown:
    def test_what_was_started_ends_with_its_children(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        child = subprocess.Popen(["sh", "-c", "sleep 1000 & sleep 1000"])
        process = psutil.Process(child.pid)
        while len(family := [process, *process.children(recursive=True)]) < 3:
            time.sleep(0.01)
        note(tmp_path, started(process))
        assert main(["down", "--state", str(tmp_path)]) == 0
        child.wait()
        assert [one for one in family if one.is_running()] == []
        assert capsys.readouterr().out == f"node-0 (process {process.pid}) ended\n"
        assert not (tmp_path / "programs.json").exists()

    def test_a_clock_that_was_set_hides_no_program(
        self, tmp_path: Path, sleeper: psutil.Process, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        apart = 3e7  # a year: from where a clock without a battery begins to what the network says
        noted = started(sleeper)
        note(tmp_path, replace(noted, since=noted.since + apart))
        by_the_clock = psutil.Process.create_time  # it moves with the clock
        monkeypatch.setattr(psutil.Process, "create_time", lambda one: by_the_clock(one) + apart)
        assert main(["down", "--state", str(tmp_path)]) == 0
        assert not lives(sleeper)
        assert not (tmp_path / "programs.json").exists()

    @pytest.mark.skipif(sys.platform != "linux", reason="starts are counted in ticks on Linux")
    @pytest.mark.parametrize(
        "other",
        [
            lambda one: replace(one, start=str(int(one.start) + 1)),
            lambda one: replace(one, start=str(int(one.start) - 1)),
            lambda one: replace(one, boot="00000000-0000-0000-0000-000000000000"),
        ],
        ids=["a tick later", "a tick earlier", "another boot"],
    )
    def test_a_stranger_that_was_given_the_id_lives_on(
        self, tmp_path: Path, sleeper: psutil.Process, other: Callable[[Started], Started]
    ) -> None:
        note(tmp_path, other(started(sleeper)))
        assert main(["down", "--state", str(tmp_path)]) == 0
        assert lives(sleeper)
        assert not (tmp_path / "programs.json").exists()

    @pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("setpriv") is None,
        reason="needs a process that root may not end",
    )
    def test_what_could_not_be_ended_stays_on_the_list(self, tmp_path: Path) -> None:
        with psutil.Popen(["sleep", "1000"], user=65534, cwd="/") as stranger:
            noted = started(stranger)
            note(tmp_path, noted, replace(noted, name="node-1", boot="an earlier one"))
            down = [sys.executable, "-m", "fl_app.cli.main", "deploy", "down"]
            down += ["--state", str(tmp_path)]
            done = subprocess.run(
                ["setpriv", "--bounding-set=-kill", "--inh-caps=-kill", *down],
                capture_output=True,
                encoding="utf-8",
                check=False,
            )
            assert lives(stranger)
            stranger.kill()
        assert done.returncode == 1
        assert f"node-0 (process {noted.pid}) could not be ended" in done.stderr
        assert Background(tmp_path, BUNDLE).programs == [noted]

    def test_nothing_is_ended_while_another_command_is_at_work(
        self, tmp_path: Path, sleeper: psutil.Process, capsys: pytest.CaptureFixture[str]
    ) -> None:
        note(tmp_path, started(sleeper))
        with FileLock(tmp_path / ".lock"):
            assert main(["down", "--state", str(tmp_path)]) == 1
            assert main(["up", "--state", str(tmp_path)]) == 1
        assert capsys.readouterr().err.count(f"programs in {tmp_path}: wait for it") == 2
        assert lives(sleeper)
        assert [one.name for one in Background(tmp_path, BUNDLE).programs] == ["node-0"]

    def test_with_nothing_started_there_is_nothing_to_do(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["down", "--state", str(tmp_path / "none")]) == 0
        assert not (tmp_path / "none").exists()
        assert capsys.readouterr().out == f"nothing was started from {tmp_path}/none\n"

    def test_it_does_not_say_so_while_another_command_has_just_begun(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with FileLock(tmp_path / ".lock"):  # as `up` holds it before it has started anything
            assert main(["down", "--state", str(tmp_path)]) == 1
        said = capsys.readouterr()
        assert "nothing was started" not in said.out
        assert f"programs in {tmp_path}: wait for it" in said.err

    def test_what_ended_by_itself_is_said_and_forgotten(
        self, tmp_path: Path, sleeper: psutil.Process, capsys: pytest.CaptureFixture[str]
    ) -> None:
        note(tmp_path, started(sleeper), replace(started(sleeper), name="node-1", start="0"))
        assert main(["down", "--state", str(tmp_path)]) == 0
        pid = sleeper.pid
        assert capsys.readouterr().out.splitlines() == [
            f"node-1 (process {pid}) had ended before",
            f"node-0 (process {pid}) ended",
        ]
        assert main(["down", "--state", str(tmp_path)]) == 0
        assert capsys.readouterr().out == f"nothing was started from {tmp_path}\n"

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "{}",
            '{"format": "other"}',
            '{"format": "trellis-deployment-2", "programs": [{"a": 1}]}',
        ],
    )
    def test_a_list_that_cannot_be_read_ends_nothing_and_is_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
    ) -> None:
        (tmp_path / "programs.json").write_text(text)
        assert main(["down", "--state", str(tmp_path)]) == 1
        assert f"{tmp_path}/programs.json can't be read" in capsys.readouterr().err


class TestHeld:
    """A program begins only when whoever started it is done with noting it."""

    def test_it_begins_as_the_process_that_was_noted(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        env = {"ONLY": "this", "LC_ALL": "C.UTF-8"}
        program = "import os, sys; print(os.getpid(), dict(os.environ), sys.stdin.read())"
        with held([sys.executable, "-I", "-c", program], log, env) as pid:
            before = Started.of("node-0", pid, log)
            process = before.process()
            assert process is not None
            time.sleep(0.3)
            assert log.read_text() == ""
        os.waitpid(pid, 0)
        assert log.read_text() == f"{pid} {env} \n"
        assert before.process() is None

    def test_its_start_stays_what_was_noted(self, tmp_path: Path) -> None:
        with held(["sleep", "1000"], tmp_path / "log", dict(os.environ)) as pid:
            noted = started(psutil.Process(pid))
        process = psutil.Process(pid)
        while process.cmdline() != ["sleep", "1000"]:
            time.sleep(0.01)
        assert noted.process() == process
        process.kill()
        process.wait()
        assert noted.process() is None

    def test_it_never_begins_where_it_could_not_be_noted(self, tmp_path: Path) -> None:
        command = ["touch", str(tmp_path / "begun")]
        with pytest.raises(OSError, match="full"), held(command, tmp_path / "log", {}) as pid:
            raise OSError("the disk is full")
        assert not psutil.pid_exists(pid)
        assert not (tmp_path / "begun").exists()

    def test_it_never_begins_where_its_starter_is_killed_before(self, tmp_path: Path) -> None:
        program = f"""
import os, signal
from pathlib import Path
from fl_app.flower.background import held
with held(["touch", {str(tmp_path / "begun")!r}], Path({str(tmp_path / "log")!r}), dict(os.environ)) as pid:
    print(pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL
        deadline = time.monotonic() + 20
        while psutil.pid_exists(pid := int(done.stdout)) and lives(psutil.Process(pid)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not (tmp_path / "begun").exists()


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

    def test_what_runs_already_is_left_alone_and_said(
        self, tmp_path: Path, sleeper: psutil.Process, capsys: pytest.CaptureFixture[str]
    ) -> None:
        names = ["superlink", "node-0", "node-1"]
        noted = [replace(started(sleeper), name=name) for name in names]
        note(tmp_path, *noted)
        connection = Background(tmp_path, BUNDLE).connection
        connection.home.mkdir()
        connection.write("127.0.0.1:9092", None)
        up = ["up", "--state", str(tmp_path), "--nodes", "1"]
        assert main(up) == 0
        link, node, further = (f"{one.name} (process {one.pid}) runs already" for one in noted)
        lines = [f"{link} at 127.0.0.1:9092", node, f"{further}, beside the 1 asked for"]
        assert capsys.readouterr().out.splitlines() == lines
        assert main([*up, "--port", "9099"]) == 0
        lines[0] += ", not at 127.0.0.1:9099: for that, `down` comes first"
        assert capsys.readouterr().out.splitlines() == lines
        assert Background(tmp_path, BUNDLE).programs == noted
        assert lives(sleeper)

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


def test_a_run_with_a_wrong_configuration_is_refused_here_before_anything_is_sent(
    tmp_path: Path, sleeper: psutil.Process, capsys: pytest.CaptureFixture[str]
) -> None:
    note(tmp_path, replace(started(sleeper), name="superlink"))
    assert trellis_main(["deploy", "run", "--state", str(tmp_path), "task=digit"]) == 2
    assert "did you mean digits?" in capsys.readouterr().err


def test_a_second_run_waits_for_the_first_to_be_over(
    tmp_path: Path, sleeper: psutil.Process, capsys: pytest.CaptureFixture[str]
) -> None:
    note(tmp_path, replace(started(sleeper), name="superlink"))
    with FileLock(tmp_path / ".run.lock"):
        assert main(["run", "--state", str(tmp_path), "task=digits", "num_clients=2"]) == 1
    said = capsys.readouterr().err
    assert f"another run from {tmp_path} goes on: wait for it" in said


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

    up = ("up", "--nodes", "1", "--port", number)

    deployment = Background(tmp_path / "here", BUNDLE)
    try:
        with ThreadPoolExecutor() as pool:
            both = sorted(
                pool.map(lambda _: trellis(*up), range(2)), key=lambda one: one.returncode
            )
        assert [one.returncode for one in both] == [0, 1], both
        assert "another command starts or ends programs" in both[1].stderr
        first = deployment.programs
        assert [one.name for one in first] == ["superlink", "node-0"]
        assert trellis("status").returncode == 0
        done = trellis(*up)
        assert done.returncode == 0
        assert done.stdout.splitlines() == [  # nothing was left to start
            f"superlink (process {first[0].pid}) runs already at 127.0.0.1:{number}",
            f"node-0 (process {first[1].pid}) runs already",
        ]
        assert deployment.programs == first
        key = deployment.files.node_key("node-0").read_bytes()
        node = deployment.connection.ask("supernode", "list")["nodes"]

        link = first[0].process()
        assert link is not None
        link.kill()
        link.wait(10)
        assert trellis("status").returncode == 1
        assert trellis(*up).returncode == 0
        again = deployment.connection.ask("supernode", "list")["nodes"]
        assert [one["node-id"] for one in again] == [one["node-id"] for one in node]
        assert deployment.files.node_key("node-0").read_bytes() == key
    finally:
        programs = [one.process() for one in deployment.programs]
        assert trellis("down").returncode == 0
    assert [one for one in programs if one is not None and one.is_running()] == []
