"""The compute party where disk or descriptors run out: one owner's turn is refused, and the others are served."""

import os
import resource
import shutil
import signal
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clients.encrypted.crew import Crew, WorkerError
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.memory import BatchKey
from clients.encrypted.notes import BATCH, KEYS, NOTE, WANT, note, read_note
from clients.encrypted.party import ComputeParty
from clients.encrypted.party_learner import PartyLearner
from strategies.wire import Refused
from tests.support.party import LOGISTIC, SMALL, Hand, steps, weights_of


@pytest.fixture(scope="module")
def logistic(tmp_path_factory):
    with ComputeParty(LOGISTIC, tmp_path_factory.mktemp("logistic"), workers=1) as party:
        yield party


@contextmanager
def limited(what, most):
    """This process, with less of what the system gives."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


@pytest.mark.parametrize("lacking", [KEYS, BATCH])
def test_where_the_disk_is_full_an_owner_is_refused_and_the_next_one_served(logistic, lacking):
    hand, other = Hand(LOGISTIC, 0, 1), Hand(LOGISTIC, 1, 2, OwnerKeys.generate(LOGISTIC.ring))
    assert steps(logistic, hand)
    learner = PartyLearner(logistic, weights_of(LOGISTIC.spec))
    turn = other.hello() | other.upload([lacking])
    with limited(resource.RLIMIT_FSIZE, 200_000), pytest.raises(Refused, match="too large") as told:
        learner.answer(1, turn)
    assert told.value.reason == "party"
    assert hand.agrees(hand.step(learner), weights_of(LOGISTIC.spec))
    assert steps(logistic, other)


def test_what_is_cleared_away_under_a_party_is_asked_for_again(logistic):
    hand = Hand(LOGISTIC, 0, 1)
    assert steps(logistic, hand)
    hand.wanted.clear()
    for folder in ("keys", "ciphertexts"):
        shutil.rmtree(logistic.folder / folder)
    assert steps(logistic, hand)
    assert hand.wanted == [KEYS, BATCH]


def test_a_folder_that_can_not_be_read_is_no_end_of_the_run(logistic):
    hand, folder = Hand(LOGISTIC, 0, 1), logistic.folder / "ciphertexts"
    assert steps(logistic, hand)
    folder.rename(folder.with_name("away"))
    folder.write_text("a file")
    with pytest.raises(Refused, match="Not a directory") as told:
        hand.begin(PartyLearner(logistic, weights_of(LOGISTIC.spec)))
    assert told.value.reason == "party"
    folder.unlink()
    folder.with_name("away").rename(folder)
    assert steps(logistic, hand)


def test_whatever_else_goes_wrong_in_a_turn_refuses_it(logistic, caplog):
    hand, weights = Hand(LOGISTIC, 0, 1), weights_of(LOGISTIC.spec)
    bent = weights | {"layers.0.weight": weights["layers.0.weight"][:, :-1]}
    with pytest.raises(Refused) as told:
        hand.begin(PartyLearner(logistic, bent))
    assert told.value.reason == "party"
    assert "Traceback" in caplog.text or told.value.__cause__ is not None
    assert steps(logistic, hand)


@pytest.fixture
def crew(tmp_path):
    crew = Crew(SMALL, tmp_path, tmp_path, 2, 16)
    yield crew
    crew.close()


def test_all_workers_start_or_none(crew):
    came = set()
    for more in range(64):
        spare = os.dup(0)
        os.close(spare)
        with limited(resource.RLIMIT_NOFILE, spare + more):
            try:
                crew.start()
            except WorkerError:
                came.add("refused")
                assert crew.pids == []
            else:
                came.add("started")
                assert len(crew.pids) == 2
                break
    assert came == {"refused", "started"}


def without_end(crew):
    while True:
        crew.each("trim")


def test_a_call_that_is_broken_off_leaves_no_answer_for_the_next(crew):
    state = "0" * 32, BatchKey("0" * 32, 0), "version"
    crew.start()
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        without_end(crew)
    assert crew.each("resume", *state) == [False, False]
    with pytest.raises((AttributeError, TypeError, ValueError)):
        crew.all("rest", [(16,), (lambda: np.zeros(1),)])  # which can't be sent
    assert crew.each("resume", *state) == [False, False]


HEX = st.text("0123456789abcdef", min_size=32, max_size=32)
NOTES = st.fixed_dictionaries(
    {},
    optional={
        "fingerprint": HEX | st.integers() | st.none(),
        "data": HEX | st.lists(st.integers(), max_size=2),
        "batch": st.integers(-2, 5000) | st.floats(),
    },
)
NAMES = st.sampled_from(
    ["inputs.first", "inputs.seeds", "packed.first", "errors.first", "keys.first", "keys.x", "note", ""]
)  # fmt: skip
ARRAYS = hnp.arrays(
    st.sampled_from(["<u8", "u1", "<f4", "?"]), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0)
)


@settings(max_examples=60, deadline=None)
@given(told=NOTES, arrays=st.dictionaries(NAMES, ARRAYS, max_size=4))
def test_no_turn_of_an_owner_ends_otherwise_than_in_an_answer_or_a_refusal(logistic, told, arrays):
    learner = PartyLearner(logistic, weights_of(LOGISTIC.spec))
    try:
        ending = set(read_note(learner.answer(0, {NOTE: note(told), **arrays})))
    except Refused as refused:
        ending = {refused.reason}
    # For what nobody foresaw the reason would be `party`.
    assert ending in ({WANT, "party"}, {"malformed"}, {"phase"})
