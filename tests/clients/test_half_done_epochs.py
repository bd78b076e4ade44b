"""Training that a kill or a pause cut off goes on where it was, to the same bits; what is another job's is let go."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.dp_ledger import ClientLedger
from clients.half_done import HalfDoneFits
from clients.resident import ResidentModel, arrays_of
from clients.retrying import RETRIES, Retry
from clients.trainers import SGD, AdamW, DpSgd, Proximal, Scaffold
from fl_app.engine.flwr_internals import claim_identity
from strategies.replies import Expected, read_update
from strategies.update import DELTA
from strategies.wire import LOCAL_STEPS, METRICS
from tests.clients.test_client import request
from tests.clients.test_dp_sgd import answered
from tests.support.half_done import TRAINER, Watched, client, network

ROOT = Path(__file__).parents[2]
PER_EPOCH = 18
"""Batches of 16 of a client's 287 examples."""


@pytest.fixture(autouse=True)
def _identity():
    claim_identity(1)


def asked(**config):
    return request(arrays=arrays_of(network()), **config)


def update_of(reply, extra=()):
    assert not reply.has_error(), reply.error.reason
    model = ResidentModel(network(), arrays_of(network()))
    model.load(arrays_of(network()))
    sections = {name: section.layout for name, section in model.sections().items()}
    layouts = {**sections, **dict.fromkeys(extra, model.layout)}
    return read_update(reply.content, Expected(layouts, 1, 3, 2))


def assert_same(reply, plain, extra=()):
    one, other = update_of(reply, extra), update_of(plain, extra)
    for name, section in other.sections.items():
        np.testing.assert_array_equal(one.sections[name].vector, section.vector, err_msg=name)
    told, expected = ({k: v for k, v in u.metrics.items() if k != RETRIES} for u in (one, other))
    assert told == expected


def files(folder: Path) -> list[str]:
    root = folder / "half-done"
    return sorted(path.name for path in root.glob("client-*"))


class After:
    """A pause that is wanted once, after so many batches; the first question comes before the job."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def __call__(self) -> str | None:
        self.left -= 1
        return "the battery is low" if self.left == -1 else None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    claim_identity(1)
    (reply,) = client(tmp_path_factory.mktemp("plain"), half_done=None).answer([asked()])
    return reply


def test_a_process_that_was_killed_is_gone_on_from_to_the_same_bits(tmp_path, undisturbed):
    progress = tmp_path / "progress"
    command = [sys.executable, "-m", "tests.support.half_done", str(tmp_path), str(progress)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=env) as child:
        deadline = time.monotonic() + 300
        while not progress.exists() or progress.stat().st_size < 2 * PER_EPOCH + 5:
            assert child.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert "client-1.half-done" in files(tmp_path)
    task = Watched()
    (reply,) = client(tmp_path, task).answer([asked()])
    assert_same(reply, undisturbed)
    assert 0 < task.calls <= 2 * PER_EPOCH - 3
    assert files(tmp_path) == []


class TestPause:
    @pytest.mark.parametrize(
        "trainer",
        [
            TRAINER,
            AdamW(lr=0.01, batch_size=16, local_epochs=4),
            Proximal(lr=0.05, batch_size=16, local_epochs=4, mu=0.1),
            Scaffold(lr=0.05, batch_size=16, local_epochs=4),
            SGD(lr=0.05, batch_size=16, local_epochs=4, worker_momentum=0.9),
        ],
        ids=lambda one: type(one).__name__,
    )
    def test_all_that_a_step_depends_on_is_there_again(self, tmp_path, trainer):
        extra = sorted(trainer.sections - {DELTA})
        (plain,) = client(tmp_path / "plain", trainer=trainer, half_done=None).answer([asked()])
        (paused,) = client(tmp_path, trainer=trainer, pause=After(41)).answer([asked()])
        told = "paused: this client takes no part, and its own log says why"
        assert paused.error.reason == told
        task = Watched()
        (reply,) = client(tmp_path, task, trainer).answer([asked()])
        assert_same(reply, plain, extra)
        assert task.calls == 4 * PER_EPOCH - 41
        assert files(tmp_path) == []

    @settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(cuts=st.lists(st.integers(1, 60), min_size=1, max_size=4))
    def test_wherever_and_however_often_it_is_cut_off(self, tmp_path, undisturbed, cuts):
        for cut in cuts:
            (reply,) = client(tmp_path, pause=After(cut)).answer([asked()])
            if not reply.has_error():
                break
        else:
            (reply,) = client(tmp_path).answer([asked()])
        assert_same(reply, undisturbed)
        assert files(tmp_path) == []

    def test_a_number_of_steps_that_the_server_asks_for(self, tmp_path):
        steps = {LOCAL_STEPS: 50}
        (plain,) = client(tmp_path / "plain", half_done=None).answer([asked(**steps)])
        client(tmp_path, pause=After(30)).answer([asked(**steps)])
        task = Watched()
        (reply,) = client(tmp_path, task).answer([asked(**steps)])
        assert_same(reply, plain)
        assert task.calls == 20

    def test_before_a_job_nothing_begins(self, tmp_path):
        task = Watched()
        (reply,) = client(tmp_path, task, pause=lambda: "the battery is low").answer([asked()])
        assert reply.error.reason.startswith("paused: ")
        assert task.calls == 0
        assert files(tmp_path) == []

    def test_what_is_done_is_not_paused(self, tmp_path, undisturbed):
        (reply,) = client(tmp_path, pause=After(4 * PER_EPOCH)).answer([asked()])
        assert_same(reply, undisturbed)

    def test_a_silent_client_says_that_it_is_paused_and_sends_no_zeros(self, tmp_path):
        ours = client(tmp_path, pause=After(5), secretive=True, silent=True)
        (reply,) = ours.answer([asked()])
        assert reply.error.reason.startswith("paused: ")

    def test_noise_is_not_charged_before_a_pause_and_never_half_done(self, tmp_path):
        trainer = DpSgd(batch_size=32, lr=0.1, noise_multiplier=1.0)
        half_done = HalfDoneFits(tmp_path / "half-done", "run", every=0.0)
        ours = answered(tmp_path, trainer, pause=After(0), half_done=half_done)
        (reply,) = ours.answer([request()])
        assert reply.error.reason.startswith("paused: ")
        assert ClientLedger(tmp_path, 1).charges() == []
        (reply,) = answered(tmp_path, trainer, pause=After(2), half_done=half_done).answer(
            [request()]
        )
        assert not reply.has_error()
        assert len(ClientLedger(tmp_path, 1).charges()) == 1
        assert not (tmp_path / "half-done").exists()


def cut_off(folder: Path, batches: int = 30, **config) -> Path:
    (reply,) = client(folder, pause=After(batches)).answer([asked(**config)])
    assert reply.has_error()
    return folder / "half-done" / "client-1.half-done"


@pytest.mark.parametrize("again", [{"attempt": 2}, {"kept": [1, 2]}], ids=str)
def test_another_attempt_at_a_round_is_the_same_job(tmp_path, undisturbed, again):
    cut_off(tmp_path, 30)
    task = Watched()
    (reply,) = client(tmp_path, task).answer([asked(**again)])
    assert_same(reply, undisturbed)
    assert task.calls == 4 * PER_EPOCH - 30


class TestWhatIsAnotherJobs:
    @pytest.mark.parametrize(
        "other",
        [
            {"server-round": 4},
            {"included": 2},
            {"proximal-mu": 0.5},
            {LOCAL_STEPS: 4 * PER_EPOCH},
        ],
        ids=str,
    )
    def test_another_request(self, tmp_path, other):
        path = cut_off(tmp_path)
        task = Watched()
        (reply,) = client(tmp_path, task).answer([asked(**other)])
        assert not reply.has_error()
        assert task.calls == 4 * PER_EPOCH
        assert not path.exists()

    def test_another_model(self, tmp_path):
        cut_off(tmp_path)
        arrays = arrays_of(network())
        arrays["1.bias"] = arrays["1.bias"] + 1
        task = Watched()
        client(tmp_path, task).answer([request(arrays=arrays)])
        assert task.calls == 4 * PER_EPOCH

    def test_another_run(self, tmp_path):
        path, task = cut_off(tmp_path), Watched()
        half_done = HalfDoneFits(path.parent, "another run", every=1e9)
        client(tmp_path, task, half_done=half_done).answer([asked()])
        assert task.calls == 4 * PER_EPOCH

    def test_another_client_s_is_left_alone(self, tmp_path):
        path = cut_off(tmp_path)
        (reply,) = client(tmp_path).answer([request(arrays=arrays_of(network()), who=2)])
        assert not reply.has_error()
        assert path.exists()

    @settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_a_torn_file_is_let_go(self, tmp_path, undisturbed, data):
        path = cut_off(tmp_path)
        content = bytearray(path.read_bytes())
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        else:
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        task = Watched()
        (reply,) = client(tmp_path, task).answer([asked()])
        assert_same(reply, undisturbed)
        assert task.calls == 4 * PER_EPOCH
        assert files(tmp_path) == []

    def test_what_a_killed_write_has_left_goes_with_it(self, tmp_path, undisturbed):
        path = cut_off(tmp_path)
        (path.parent / f"{path.name}.123.part").write_bytes(b"half")
        (reply,) = client(tmp_path).answer([asked()])
        assert_same(reply, undisturbed)
        assert files(tmp_path) == []


class TestTheFile:
    def test_it_is_for_its_user_only_and_says_what_it_is_of(self, tmp_path):
        path = cut_off(tmp_path)
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        header = path.read_bytes()
        told = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
        job = json.loads(told["half-done"])["job"]
        assert (job["round"], job["client"], job["run"]) == (3, 1, "run")

    def test_it_is_written_no_more_often_than_that(self, tmp_path):
        """By a clock that goes on a second at each look; a write looks once more."""
        now = iter(range(10_000))
        written = []

        class Noting(HalfDoneFits):
            def of(self, job):
                keeper = super().of(job)
                save = keeper.save

                def saving(point):
                    written.append(point.figures["taken"])
                    save(point)

                keeper.save = saving
                return keeper

        half_done = Noting(tmp_path / "half-done", "run", every=30, clock=lambda: next(now))
        (reply,) = client(tmp_path, half_done=half_done).answer([asked()])
        assert not reply.has_error()
        # The last batch is not asked about: its update is about to be sent.
        assert written == [30, 60]

    def test_a_full_disk_does_not_end_training(self, tmp_path, undisturbed, caplog):
        with files_of_at_most(100):
            (reply,) = client(tmp_path, every=0.0).answer([asked()])
        assert_same(reply, undisturbed)
        assert "is not kept" in caplog.text
        assert files(tmp_path) == []


@contextmanager
def files_of_at_most(size: int):
    """The kernel refuses to write more into a file: as a full disk does, with an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Once(Watched):
    """A loss that raises, or is no number, at one batch."""

    def __init__(self, at: int, error: Exception | None) -> None:
        super().__init__()
        self.at, self.error = at, error

    def losses(self, output, targets):
        found = super().losses(output, targets)
        if self.calls != self.at:
            return found
        if self.error is not None:
            raise self.error
        return found * float("nan")


PATIENT = Retry(attempts=2, backoff_seconds=0.0)


def test_a_retry_goes_on_from_half_done_work_to_the_same_bits(tmp_path, undisturbed):
    task = Once(40, RuntimeError("once"))
    (reply,) = client(tmp_path, task, retry=PATIENT, every=0.0).answer([asked()])
    assert_same(reply, undisturbed)
    assert reply.content[METRICS][RETRIES] == 1
    assert task.calls == 40 + 4 * PER_EPOCH - 39


def test_what_has_diverged_is_not_gone_on_from(tmp_path):
    task, slow = Once(5, None), SGD(lr=0.025, batch_size=16, local_epochs=4, momentum=0.9)
    (reply,) = client(tmp_path, task, retry=PATIENT, every=0.0).answer([asked()])
    (plain,) = client(tmp_path / "plain", trainer=slow, half_done=None).answer([asked()])
    assert_same(reply, plain)


def test_a_lowered_rate_is_kept_when_the_process_dies(tmp_path):
    """Diverges in its third epoch, is cut off after that at half the rate, and goes on at half the rate."""
    (plain,) = client(tmp_path / "plain", Once(40, None), retry=PATIENT, half_done=None).answer(
        [asked()]
    )
    (paused,) = client(tmp_path, Once(40, None), retry=PATIENT, pause=After(100)).answer([asked()])
    assert paused.has_error()
    (reply,) = client(tmp_path, retry=PATIENT).answer([asked()])
    assert_same(reply, plain)
