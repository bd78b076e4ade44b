"""What a run on Flower says, how it is written, and that nothing of it is ever left behind."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.config import parse_config_args
from hypothesis import given
from hypothesis import strategies as st

from fl_app.engine import DeviceModel, EngineGrid, InProcessPool
from fl_app.flower import Deployment, FlowerError, SuperLink, bundle, deployment, tether
from fl_app.flower import __main__ as command
from fl_app.flower.grid import InterruptibleGrid
from fl_app.flower.processes import Port, Program, environment
from fl_app.flower.stream import Transcript, run_command, run_config
from tests.support.tiny_app import write_tiny_app

CHECKOUT = Path(__file__).resolve().parents[2]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))

# A child in a session of its own and a grandchild that outlives it, as Flower's programs have them.
TREE = "setsid sh -c 'sleep 1000 & sleep 1000' & sleep 1000"
STUBBORN = "trap '' TERM; while :; do sleep 0.1; done"


def family_of(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def wait_until(true: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


class TestRunConfig:
    @given(st.lists(TEXT))
    def test_every_override_reaches_the_app_as_it_was_written(self, overrides: list[str]) -> None:
        received = parse_config_args([run_config(overrides)])
        assert list(received) == ["overrides"]
        assert shlex.split(received["overrides"]) == overrides

    @pytest.mark.parametrize(
        "override",
        [
            "strategy=fedadam",
            "model.hidden=[32, 16]",
            "task.note='a \"quoted\" word'",
            "client={lr: 0.1}",
            "path=C:\\new\\table",
            "b=1 overrides=2",
            "",
        ],
    )
    def test_quotes_spaces_equals_signs_and_lists_survive(self, override: str) -> None:
        received = parse_config_args([run_config([override, "seed=1"])])
        assert shlex.split(received["overrides"]) == [override, "seed=1"]

    def test_the_command_names_the_supernodes_only_where_they_are_simulated(self) -> None:
        assert run_command([], None) == ["flwr", "run", ".", "--stream"]
        assert run_command(["rounds=2"], 10)[4:] == [
            "--run-config",
            'overrides="rounds=2"',
            "--federation-config",
            "num-supernodes=10 client-resources-num-cpus=1",
        ]


RECORDED = """\
Using SuperLink: local (127.0.0.1:45671)
Successfully started run 12006485672727205401
\x1b[92mINFO \x1b[0m:      Starting logstream for run_id `12006485672727205401`
\x1b[93mWARNING \x1b[0m:   Since flwr 1.32, default simulated SuperNodes changed from 10 to 2.
\x1b[92mINFO \x1b[0m:      \tflwr federation simulation-config @none/default <superlink>
Successfully installed tiny to /home/someone/.flwr/apps/tests.tiny.1.0.0.e98856c6.
fedavg: 3 rounds
/home/someone/site-packages/ray/worker.py:2051: FutureWarning: Tip: In future versions of Ray
  warnings.warn(
\x1b[36m(ClientAppActor pid=5342)\x1b[0m a client's own line
\x1b[36m(ClientAppActor pid=5342, ip=10.0.0.1)\x1b[0m another one
round 1/3  loss 0.4711
\x1b[91mERROR \x1b[0m:     Simulation raised an exception
\x1b[92mINFO \x1b[0m:
"""


class TestTranscript:
    def test_a_user_sees_the_apps_lines_and_flowers_errors_only(self) -> None:
        shown: list[str] = []
        transcript = Transcript(shown.append)
        for line in RECORDED.splitlines():
            transcript.take(line)
        assert shown == [
            "fedavg: 3 rounds",
            "round 1/3  loss 0.4711",
            "ERROR :     Simulation raised an exception",
        ]
        assert transcript.run_id == "12006485672727205401"
        assert transcript.exit_code() is None

    @pytest.mark.parametrize(
        ("status", "reason", "code"),
        [
            ("completed", "", 0),
            ("failed", "ValueError: no", 1),
            ("running", "", 1),
            ("stopped", "interrupted", 1),
            ("stopped", "the loss is not finite", 3),
        ],
    )
    def test_the_exit_code_is_the_summarys(
        self, tmp_path: Path, status: str, reason: str, code: int
    ) -> None:
        path = tmp_path / "summary.json"
        path.write_text(json.dumps({"status": status, "reason": reason}))
        transcript = Transcript(lambda line: None)
        transcript.take(str(path))
        assert transcript.exit_code() == code

    def test_a_summary_that_is_not_there_tells_nothing(self, tmp_path: Path) -> None:
        transcript = Transcript(lambda line: None)
        transcript.take(str(tmp_path / "summary.json"))
        assert transcript.exit_code() is None


class TestTether:
    def test_letting_go_ends_children_in_sessions_of_their_own(self) -> None:
        release = threading.Event()
        codes: list[int] = []
        holder = threading.Thread(
            target=lambda: codes.append(tether.hold(["sh", "-c", TREE], release, grace=0.5))
        )
        before = set(psutil.Process().children())
        holder.start()
        wait_until(lambda: len(psutil.Process().children(recursive=True)) >= len(before) + 4)
        (root,) = set(psutil.Process().children()) - before
        family = family_of(root.pid)
        release.set()
        holder.join()
        assert alive(family) == []
        assert codes == [-signal.SIGTERM]

    def test_what_a_program_leaves_behind_ends_with_it(self) -> None:
        process = subprocess.Popen(["sh", "-c", "setsid sleep 1000 & sleep 1; exit 7"])
        family = tether.Family(process)
        wait_until(lambda: len(family_of(process.pid)) >= 3)
        left = family_of(process.pid)
        family.look()
        assert process.wait() == 7
        family.end(grace=0.0, patience=1.0)
        assert alive(left) == []

    def test_a_program_that_ignores_the_request_is_killed(self) -> None:
        process = subprocess.Popen(["sh", "-c", STUBBORN])
        time.sleep(0.2)
        tether.Family(process).end(grace=0.2, patience=0.2)
        assert process.wait() == -signal.SIGKILL

    def test_the_exit_code_is_the_programs(self) -> None:
        assert tether.hold(["sh", "-c", "exit 5"], threading.Event()) == 5

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_a_caller_that_is_killed_takes_its_programs_along(
        self, tmp_path: Path, number: signal.Signals
    ) -> None:
        script = f"""
            import os, time
            from pathlib import Path
            from fl_app.flower.processes import Program
            log = Path({str(tmp_path / "log")!r})
            command = ["sh", "-c", {TREE!r}]
            program = Program(command, env=os.environ, cwd=log.parent, log=log, grace=0.5)
            time.sleep(1000)
        """
        caller = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=CHECKOUT)
        wait_until(lambda: len(family_of(caller.pid)) >= 6)
        programs = family_of(caller.pid)[1:]
        caller.send_signal(number)
        caller.wait()
        wait_until(lambda: not alive(programs))

    def test_run_as_a_script_it_ignores_an_interrupt_and_obeys_a_request_to_end(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-P", tether.__file__, "1", "sleep", "1000"], stdin=subprocess.PIPE
        )
        wait_until(lambda: len(family_of(process.pid)) == 2)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None
        process.terminate()
        assert process.wait() == signal.SIGTERM
        assert process.stdin is not None
        process.stdin.close()


class TestPort:
    def test_nobody_is_given_the_port_while_it_is_kept(self) -> None:
        port = Port()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port.number))
        assert not port.answers()
        port.close()

    def test_the_program_it_is_kept_for_can_serve_there(self) -> None:
        class Health(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if self.path == "/health" else 404)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        port = Port()
        with HTTPServer(("127.0.0.1", port.number), Health) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            assert port.answers()
            server.shutdown()
        port.close()


@pytest.fixture
def port() -> Iterator[Port]:
    port = Port()
    yield port
    port.close()


class TestProgram:
    def start(self, script: str, directory: Path) -> Program:
        command = ["sh", "-c", script]
        return Program(command, env=os.environ, cwd=directory, log=directory / "log", grace=0.5)

    def test_one_that_ends_before_it_is_ready_is_reported_with_its_last_words(
        self, tmp_path: Path, port: Port
    ) -> None:
        with (
            self.start("echo address in use >&2; exit 3", tmp_path) as program,
            pytest.raises(FlowerError, match=r"exit code 3 before(.|\n)*address in use"),
        ):
            program.wait_for(port, seconds=20)

    def test_one_that_never_answers_is_reported(self, tmp_path: Path, port: Port) -> None:
        with (
            self.start("sleep 1000", tmp_path) as program,
            pytest.raises(FlowerError, match="did not answer at"),
        ):
            program.wait_for(port, seconds=0.3)

    def test_its_lines_come_whole_and_none_is_lost(self, tmp_path: Path) -> None:
        go = tmp_path / "go"
        script = f"printf 'one\\ntw'; until [ -e {go} ]; do sleep 0.05; done; printf 'o\\nthree'"
        with self.start(script, tmp_path) as program:
            lines: list[str] = []
            wait_until(lambda: program.log.stat().st_size >= 6)
            lines += program.new_lines()
            assert lines == ["one"]
            go.touch()
            wait_until(lambda: not program.running)
            assert program.new_lines() == ["two", "three"]
            assert program.new_lines() == []


class TestEnvironment:
    def test_programs_come_from_this_environment_and_loopback_needs_no_proxy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NO_PROXY", "example.org")
        monkeypatch.setenv("PYTHONPATH", "/somewhere")
        env = environment(tmp_path)
        assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
        assert env["PYTHONPATH"].split(os.pathsep) == ["/somewhere", str(Path.cwd())]
        assert env["NO_PROXY"] == "example.org,127.0.0.1,localhost"
        assert env["FLWR_HOME"] == str(tmp_path)
        assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
        assert env["FLWR_TELEMETRY_ENABLED"] == "0"


class TestBundle:
    def run(self, program: str, directory: Path) -> dict[str, str]:
        """What a program of this name, started in this directory, makes of the bundle."""
        script = directory / program
        script.write_text(
            textwrap.dedent(f"""
                import json, os, sys
                sys.path.insert(0, {str(CHECKOUT)!r})
                from fl_app.flower.bundle import enter_bundle, launch_directory
                enter_bundle()
                enter_bundle()
                print(json.dumps({{"launch": str(launch_directory()), "now": os.getcwd()}}))
            """)
        )
        out = subprocess.run(
            [sys.executable, script], cwd=directory, capture_output=True, check=True
        )
        found: dict[str, str] = json.loads(out.stdout)
        return found

    def test_a_simulation_moves_to_the_bundle_and_knows_where_it_was_launched(
        self, tmp_path: Path
    ) -> None:
        found = self.run("flwr-simulation", tmp_path)
        assert found == {"launch": str(tmp_path), "now": str(CHECKOUT)}

    def test_a_worker_of_a_simulation_knows_it_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(bundle.LAUNCHED_IN, "/where/it/was/launched")
        found = self.run("default_worker.py", tmp_path)
        assert found == {"launch": "/where/it/was/launched", "now": str(tmp_path)}

    def test_any_other_process_stays_where_it_is(self, tmp_path: Path) -> None:
        found = self.run("flwr-serverapp", tmp_path)
        assert found == {"launch": str(tmp_path), "now": str(tmp_path)}

    def test_a_run_is_asked_to_stop_by_a_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(bundle.STOP_FILE, raising=False)
        assert not bundle.stop_requested()
        monkeypatch.setenv(bundle.STOP_FILE, str(tmp_path / "stop"))
        assert not bundle.stop_requested()
        (tmp_path / "stop").touch()
        assert bundle.stop_requested()


class TestInterruptibleGrid:
    def test_it_is_the_other_grid_until_the_run_is_asked_to_stop(self) -> None:
        def answer(messages: Sequence[Message]) -> list[Message]:
            return [Message(RecordDict(), reply_to=message) for message in messages]

        asked: list[bool] = []
        engine = EngineGrid(
            InProcessPool(lambda: answer),
            num_clients=2,
            devices=DeviceModel(),
            seed=0,
            work=lambda client: 1.0,
        )
        grid = InterruptibleGrid(engine, stop=lambda: bool(asked))
        grid.set_run(engine.run)
        assert grid.run is engine.run
        nodes = list(grid.get_node_ids())
        assert nodes == list(engine.get_node_ids())
        config = RecordDict({"config": ConfigRecord({"client": 0, "server-round": 1})})
        message = grid.create_message(config, "query", nodes[0], "1")
        assert len(list(grid.send_and_receive([message]))) == 1

        (sent,) = grid.push_messages([grid.create_message(config, "query", nodes[0], "1")])
        asked.append(True)
        with pytest.raises(KeyboardInterrupt):
            grid.pull_messages([sent])
        with pytest.raises(KeyboardInterrupt):
            grid.get_node_ids()


class TestWhereThereIsNoApp:
    def test_a_directory_without_an_app_is_refused_by_name(self, tmp_path: Path) -> None:
        with pytest.raises(FlowerError, match=f"{tmp_path} holds no pyproject.toml"):
            SuperLink(tmp_path, simulation=True)

    @pytest.mark.parametrize("options", [[], ["--deployment"]])
    def test_the_command_reports_it_and_fails(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        options: list[str],
    ) -> None:
        monkeypatch.setattr(command, "BUNDLE", tmp_path)
        assert command.main(options) == 1
        assert "holds no pyproject.toml" in capsys.readouterr().err


@pytest.mark.xdist_group("deployment")
class TestDeployment:
    """One deployment of real processes, several runs."""

    @pytest.fixture(scope="class")
    @staticmethod
    def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
        project = write_tiny_app(tmp_path_factory.mktemp("deployed"))
        (project / ".flwr" / "run-0-left").mkdir(parents=True)
        return project

    @pytest.fixture(scope="class")
    @staticmethod
    def deployment(project: Path) -> Iterator[Deployment]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TINY_OUTPUT", str(project))
            before = psutil.Process().children(recursive=True)
            with Deployment(project, num_supernodes=1) as deployment:
                started = psutil.Process().children(recursive=True)
                yield deployment
            assert alive([p for p in started if p not in before]) == []
            assert not deployment.home.exists()

    def test_a_run_streams_its_lines_and_gives_the_exit_code_of_its_summary(
        self, deployment: Deployment, project: Path
    ) -> None:
        lines: list[str] = []
        assert deployment.run(["completed", 'note="a, b"'], echo=lines.append) == 0
        assert lines[0] == json.dumps(["completed", 'note="a, b"'])
        assert lines[1:] == ["reply of client 0", str(project / "summary.json")]

    def test_a_run_that_fails_is_a_failure_with_its_reason_and_logs(
        self, deployment: Deployment, project: Path
    ) -> None:
        lines: list[str] = []
        assert deployment.run(["failed", "fail"], echo=lines.append) == 1
        assert "RuntimeError: the server has had enough" in lines
        assert "ServerApp failed with exception: the server has had enough" in lines
        logs = [Path(line.removeprefix("Flower's log: ")) for line in lines[-2:]]
        assert all(log.is_relative_to(project) and log.stat().st_size for log in logs)

    def test_an_interrupt_lets_the_run_end_by_itself(self, deployment: Deployment) -> None:
        lines: list[str] = []

        def echo(line: str) -> None:
            lines.append(line)
            if line == "waiting":
                raise KeyboardInterrupt

        assert deployment.run(["stopped", "wait"], echo=echo) == 1
        assert lines[-2] == "stopping"
        assert lines[-1].endswith("/summary.json")

    def test_a_question_that_flower_refuses_is_an_error(self, deployment: Deployment) -> None:
        with pytest.raises(FlowerError, match=r"flwr ls --run-id 1"):
            deployment.ask("ls", "--run-id", "1")

    def test_homes_of_runs_whose_starter_died_are_removed(
        self, deployment: Deployment, project: Path
    ) -> None:
        homes = list((project / ".flwr").glob("run-*"))
        assert homes == [deployment.home]


def test_supernodes_that_do_not_join_are_reported_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_app(tmp_path)
    monkeypatch.setattr(deployment, "_JOIN", 1.0)
    before = psutil.Process().children(recursive=True)
    nobody = Port()  # where nobody listens
    astray = Deployment(tmp_path, num_supernodes=1, route=lambda partition, link: nobody.address)
    with pytest.raises(FlowerError, match="0 of 1 SuperNodes joined"), astray:
        pass
    nobody.close()
    left = [p for p in psutil.Process().children(recursive=True) if p not in before]
    assert alive(left) == []
    assert list((tmp_path / ".flwr").iterdir()) == []
