"""What was charged stays charged: after a kill, a cut-off line, a full disk and a retry."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from clients.dp_ledger import ClientLedger
from clients.trainers.dp_account import BudgetSpent
from strategies.privacy.events import GaussianRelease
from tests.clients.test_dp_sgd import fitted, job, trainer

RELEASE = GaussianRelease(1.5, 0.1, "poisson")


def test_charges_are_read_as_they_were_written(tmp_path):
    written = [(RELEASE, 10), (GaussianRelease(0.1 + 0.2), 3), (RELEASE, 10)]
    for release, count in written:
        ledger = ClientLedger(tmp_path / "new", 3)
        with ledger.locked():
            ledger.add(release, count)
    assert ClientLedger(tmp_path / "new", 3).charges() == written
    assert ClientLedger(tmp_path / "new", 4).charges() == []


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_that_was_cut_off_is_dropped_and_the_others_stay(tmp_path, cut):
    ledger = ClientLedger(tmp_path, 0)
    for _ in range(3):
        ledger.add(RELEASE, 7)
    ledger.path.write_bytes(ledger.path.read_bytes()[:-cut])
    assert ledger.charges() == [(RELEASE, 7)] * 2
    ledger.add(RELEASE, 9)
    assert ledger.charges() == [(RELEASE, 7), (RELEASE, 7), (RELEASE, 9)]


def test_a_header_that_was_cut_off_is_written_again(tmp_path):
    ledger = ClientLedger(tmp_path, 0)
    ledger.path.write_bytes(b'{"format": "trell')
    ledger.add(RELEASE, 2)
    assert ledger.charges() == [(RELEASE, 2)]


def test_other_damage_is_refused_and_never_read_as_less(tmp_path):
    ledger = ClientLedger(tmp_path, 0)
    for _ in range(3):
        ledger.add(RELEASE, 7)
    whole = ledger.path.read_bytes().splitlines(keepends=True)
    for damaged in (b"\0" * 30 + b"\n", b"[1]\n", b'{"count": 7}\n', b'{"noise_multiplier": -1}\n'):
        ledger.path.write_bytes(b"".join([*whole[:2], damaged, *whole[3:]]))
        with pytest.raises(ValueError, match=r"line 3 of .* is no JSON|has no charge"):
            ledger.charges()


@pytest.mark.parametrize(
    "header",
    [
        {"format": "trellis-client-ledger-1", "unit": "client", "relation": "replace_one"},
        {"format": "another"},
    ],
)
def test_another_mechanism_s_file_is_refused(tmp_path, header):
    ledger = ClientLedger(tmp_path, 0)
    ledger.path.write_text(json.dumps(header) + "\n")
    with pytest.raises(
        ValueError, match=r"is another file: its (format|relation|unit|mechanism) is"
    ):
        ledger.charges()


def test_a_full_disk_is_an_error_and_leaves_what_was_there(tmp_path, monkeypatch):
    ledger = ClientLedger(tmp_path, 0)
    ledger.add(RELEASE, 7)
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: whole(handle, data[:20], at))
    with pytest.raises(OSError, match="bytes could be written"):
        ledger.add(RELEASE, 8)
    monkeypatch.undo()
    assert ledger.charges() == [(RELEASE, 7)]
    ledger.add(RELEASE, 8)
    assert ledger.charges() == [(RELEASE, 7), (RELEASE, 8)]


def test_nothing_is_trained_when_the_charge_can_t_be_written(tmp_path):
    (tmp_path / "client-1.spent").mkdir()
    ours = trainer(noise_multiplier=1.0).keeping(tmp_path)
    fit, model = fitted(ours, job())
    assert isinstance(fit, OSError)
    assert model.flat.numpy().tobytes() == model._sent.tobytes()


CHARGING = """
import sys
from pathlib import Path
from clients.dp_ledger import ClientLedger
from strategies.privacy.events import GaussianRelease
ledger = ClientLedger(Path(sys.argv[1]), 0)
count = 0
while True:
    count += 1
    with ledger.locked():
        ledger.add(GaussianRelease(1.0), count)
    print(count, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_holds_all_that_was_released(tmp_path):
    """A release follows its charge: what the process has told of is on the ledger, and at most one charge more."""
    moments = random.Random(3)
    for run in range(8):
        folder = tmp_path / str(run)
        process = subprocess.Popen(
            [sys.executable, "-c", CHARGING, str(folder)], stdout=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        told = 1 + len(process.communicate()[0].splitlines())
        counts = [count for _, count in ClientLedger(folder, 0).charges()]
        assert counts == list(range(1, len(counts) + 1))
        assert told <= len(counts) <= told + 1
        with ClientLedger(folder, 0).locked():  # the dead process's lock is free
            ClientLedger(folder, 0).add(RELEASE, 1)


TRAINING = """
import sys, torch
from pathlib import Path
from tests.clients.test_dp_sgd import fitted, job, trainer
torch.set_num_threads(1)
print("ready", flush=True)
sys.stdin.readline()
fitted(trainer(noise_multiplier=1.0, local_epochs=2000).keeping(Path(sys.argv[1])), job())
"""


@pytest.mark.slow
def test_a_client_that_is_killed_as_it_trains_has_been_charged(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdin.write("\n")
    process.stdin.flush()
    ledger = ClientLedger(tmp_path, 1)
    deadline = time.monotonic() + 60
    while not ledger.charges() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (charged,) = ledger.charges()
    each = len(job().examples) / 32
    assert charged == (
        GaussianRelease(1.0, 1 / each, "poisson"),
        2000 * -(-len(job().examples) // 32),
    )


def test_every_attempt_counts_whether_its_update_was_taken_or_not(tmp_path):
    ours = trainer(noise_multiplier=2.0).keeping(tmp_path)
    spent = [fitted(ours, job())[0].metrics["epsilon"] for _ in range(3)]
    assert spent[0] < spent[1] < spent[2]
    once = trainer(noise_multiplier=2.0, local_epochs=3).keeping(tmp_path / "other")
    assert spent[2] == pytest.approx(fitted(once, job())[0].metrics["epsilon"], rel=1e-6)


def test_settings_that_change_between_rounds_compose(tmp_path):
    first = fitted(trainer(noise_multiplier=2.0).keeping(tmp_path), job())[0].metrics["epsilon"]
    other = trainer(noise_multiplier=3.0, batch_size=16).keeping(tmp_path)
    both = fitted(other, job())[0].metrics["epsilon"]
    alone = fitted(other.keeping(tmp_path / "alone"), job())[0].metrics["epsilon"]
    assert max(first, alone) < both < first + alone


def test_clients_have_ledgers_of_their_own(tmp_path):
    ours = trainer(noise_multiplier=2.0).keeping(tmp_path)
    spent = [fitted(ours, job(client=who))[0].metrics["epsilon"] for who in (1, 2)]
    assert spent[0] == spent[1]


def test_a_budget_is_planned_for_so_many_rounds_and_never_passed(tmp_path):
    ours = trainer(target_epsilon=2.0, participations=3, delta=1e-4).keeping(tmp_path)
    spent = [fitted(ours, job())[0].metrics["epsilon"] for _ in range(3)]
    assert spent == sorted(spent)
    assert 1.9 < spent[-1] <= 2.0
    before = ClientLedger(tmp_path, 1).path.read_bytes()
    refusal, model = fitted(ours, job())
    assert isinstance(refusal, BudgetSpent)
    assert "more than client.target_epsilon=2 at delta=0.0001; 3 rounds" in refusal.told
    assert model.flat.numpy().tobytes() == model._sent.tobytes()
    assert ClientLedger(tmp_path, 1).path.read_bytes() == before
    # Fewer steps would still be too many: nothing at all is left for this client.
    less, _ = fitted(trainer(noise_multiplier=0.5, target_epsilon=2.0).keeping(tmp_path), job())
    assert isinstance(less, BudgetSpent)
