"""The compute party with real workers: owners side by side, workers killed, restarts, and no secret key anywhere."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from clients.encrypted.keys import OwnerKeys
from clients.encrypted.notes import BATCH, KEYS, MEANS, read_note
from clients.encrypted.owner import ERRORS, LOSS
from clients.encrypted.party import ComputeParty, FolderInUseError
from clients.encrypted.party_learner import PartyLearner
from strategies.wire import Refused
from tests.support.party import LOGISTIC, SMALL, STRICT, Hand, steps, weights_of

PATIENCE = 60.0


@pytest.fixture(scope="module")
def party(tmp_path_factory):
    with ComputeParty(SMALL, tmp_path_factory.mktemp("party")) as party:
        yield party


def test_owners_with_keys_of_their_own_take_turns(party):
    weights = weights_of(SMALL.spec)
    learner = PartyLearner(party, weights)
    hands = [Hand(SMALL, 0, 1), Hand(SMALL, 1, 2, OwnerKeys.generate(SMALL.ring))]
    answers = [hand.begin(learner) for hand in hands]
    for hand, answer in zip(hands, answers, strict=True):
        turn = hand.hello() | hand.errors(answer)
        assert hand.agrees(hand.gradients(learner.answer(hand.client, turn)), weights)
    assert [hand.wanted for hand in hands] == [[KEYS, BATCH]] * 2


def test_owners_of_one_key_need_it_sent_once(party):
    hands = [Hand(SMALL, client, 3 + client) for client in range(2)]
    assert all(steps(party, hand, 2) for hand in hands)
    assert [hand.wanted[-1:] for hand in hands] == [[BATCH]] * 2
    assert KEYS not in hands[1].wanted


def test_a_step_that_waits_is_of_one_version_of_the_model(party):
    hand, weights = Hand(SMALL, 0, 5), weights_of(SMALL.spec)
    turn = hand.errors(hand.begin(PartyLearner(party, weights)))
    other = {name: 0.5 * array for name, array in weights.items()}
    fresh = PartyLearner(party, other)
    late = hand.gradients(fresh.answer(0, hand.hello() | turn))
    party.let_go()
    assert np.array_equal(
        late["layers.0.weight"],
        hand.gradients(fresh.answer(0, hand.hello() | turn))["layers.0.weight"],
    )


def test_with_squared_loss_the_party_computes_the_errors(tmp_path):
    with ComputeParty(STRICT, tmp_path, workers=1) as party:
        hand = Hand(STRICT)
        assert steps(party, hand, 2)
        answer = hand.begin(PartyLearner(party, weights_of(STRICT.spec)))
        assert set(read_note(answer)[MEANS]) == {LOSS, *STRICT.spec.shapes}
        turn = hand.hello() | {f"{ERRORS}.first": np.zeros((3, 1, 8192), np.uint64)}
        with pytest.raises(Refused, match="errors are computed here") as refused:
            PartyLearner(party, weights_of(STRICT.spec)).answer(0, turn)
        assert refused.value.reason == "phase"


def test_a_worker_that_is_killed_costs_one_turn(party):
    hand, weights = Hand(SMALL, 0, 1), weights_of(SMALL.spec)
    assert steps(party, hand)
    pids, codes = party.pids, []
    os.kill(pids[1], signal.SIGSTOP)  # so that the step can't end before it is killed

    def turn():
        try:
            hand.begin(PartyLearner(party, weights))
        except Refused as refused:
            codes.append((refused.reason, str(refused)))

    thread = threading.Thread(target=turn)
    thread.start()
    time.sleep(0.2)
    os.kill(pids[1], signal.SIGKILL)
    thread.join(PATIENCE)
    ((code, told),) = codes
    assert code == "party"
    assert f"pid {pids[1]}" in told
    assert steps(party, hand)
    assert not set(pids) & set(party.pids)


def test_workers_that_are_gone_between_two_turns_compute_the_step_again(party):
    hand, weights = Hand(SMALL, 0, 1), weights_of(SMALL.spec)
    learner = PartyLearner(party, weights)
    errors = hand.errors(hand.begin(learner))
    party.let_go()
    assert hand.agrees(hand.gradients(learner.answer(0, hand.hello() | errors)), weights)


def test_a_party_that_is_started_again_asks_for_nothing(tmp_path):
    hand, names = Hand(LOGISTIC), []
    for _ in range(2):
        with ComputeParty(LOGISTIC, tmp_path, workers=1) as party:
            assert steps(party, hand)
            names.append(party.name)
    assert hand.wanted == [KEYS, BATCH]
    assert names[0] == names[1]


def test_weights_that_have_grown_too_large_are_refused(party):
    weights = {name: 1e6 * array for name, array in weights_of(SMALL.spec).items()}
    hand = Hand(SMALL, 0, 1)
    with pytest.raises(Refused, match=r"lower server\.lr") as refused:
        hand.begin(PartyLearner(party, weights))
    assert refused.value.reason == "range"
    assert steps(party, hand)


def test_a_folder_has_one_party_at_a_time(tmp_path):
    told = "another compute party is at work"
    with ComputeParty(LOGISTIC, tmp_path), pytest.raises(FolderInUseError, match=told):
        ComputeParty(LOGISTIC, tmp_path)
    with ComputeParty(LOGISTIC, tmp_path):
        pass


def _memory_has(pid, words):
    """Whether a process has any of these words anywhere in its memory."""
    folder = Path(f"/proc/{pid}")
    with (folder / "maps").open() as maps, (folder / "mem").open("rb", buffering=0) as memory:
        for line in maps:
            edges, access, *_ = line.split()
            if not access.startswith("r") or line.rstrip().endswith(("[vvar]", "[vsyscall]")):
                continue
            start, stop = (int(edge, 16) for edge in edges.split("-"))
            try:
                memory.seek(start)
                held = memory.read(stop - start)
            except (OSError, OverflowError, ValueError):
                continue
            if any(word in held for word in words):
                return True
    return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read by /proc")
def test_workers_never_hold_a_secret_key(party):
    hand = Hand(SMALL, 0, 1)
    assert steps(party, hand)
    key = hand.keys.seal_key()
    residues = hand.keys._residues
    words = [residues[prime, at : at + 4].tobytes() for prime in range(2) for at in (0, 4000)]
    public = hand.keys.fingerprint.encode()
    assert _memory_has(os.getpid(), words)  # what searches finds it where it is
    assert len(party.pids) == 2
    for pid in party.pids:
        assert _memory_has(pid, [public])  # and can look into the workers
        assert not _memory_has(pid, words)
    assert key is not None


SCRIPT = """
import signal, sys, tempfile
from pathlib import Path
from clients.encrypted.party import ComputeParty
from clients.encrypted.party_learner import PartyLearner
from tests.support.party import SMALL, Hand, weights_of
party = ComputeParty(SMALL, Path(sys.argv[1]))
hand, learner = Hand(SMALL), PartyLearner(party, weights_of(SMALL.spec))
hand.step(learner)
print(*party.pids, flush=True)
while True:
    hand.step(learner)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_a_party_that_is_stopped(tmp_path, how):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        start_new_session=True,
    ) as process:  # fmt: skip
        pids = [int(word) for word in process.stdout.readline().split()]
        if how is signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does: the workers get it, too
        else:
            process.kill()
        process.wait(PATIENCE)
    assert len(pids) == 2
    deadline = time.monotonic() + PATIENCE
    while any(map(psutil.pid_exists, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
