"""What strangers send to the compute party, and what is torn on its disk: each refused or asked for again."""

import json
import re

import numpy as np
import pytest
import tenseal

from clients.encrypted.keys import OwnerKeys
from clients.encrypted.notes import BATCH, KEYS, NOTE, WANT, Step, note, read_note
from clients.encrypted.owner import ERRORS, INPUTS, LABELS, PACKED
from clients.encrypted.party import ComputeParty
from clients.encrypted.party_learner import PartyLearner
from strategies.ckks import SecretKeyError
from strategies.wire import Refused
from tests.support.encrypted import keys_of
from tests.support.party import LOGISTIC, STRICT, Hand, steps, weights_of

PATIENCE = 60.0


@pytest.fixture(scope="module")
def logistic(tmp_path_factory):
    with ComputeParty(LOGISTIC, tmp_path_factory.mktemp("logistic"), workers=1) as party:
        yield party


def stored(party, hand, kind):
    """The file of a mini-batch's ciphertexts."""
    key = Step(hand.keys.fingerprint, f"{hand.seed:032x}", 0).key(kind)
    return party.folder / "ciphertexts" / key.owner / "0.npy"


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_a_torn_mini_batch_is_asked_for_again(logistic):
    hand = Hand(LOGISTIC, 0, 7)
    assert steps(logistic, hand)
    for tear in (_cut, _flip, lambda path: path.unlink()):
        hand.wanted.clear()
        tear(stored(logistic, hand, INPUTS))
        assert steps(logistic, hand)
        assert hand.wanted == [BATCH]


def test_what_turns_out_torn_on_the_way_back_is_asked_for_too(logistic):
    hand, learner = Hand(LOGISTIC, 0, 7), PartyLearner(logistic, weights_of(LOGISTIC.spec))
    answer = hand.begin(learner)
    _flip(stored(logistic, hand, PACKED))
    assert read_note(learner.answer(0, hand.hello() | hand.errors(answer)))[WANT] == [BATCH]
    hand.wanted.clear()
    assert steps(logistic, hand)
    assert hand.wanted == [BATCH]


def test_torn_keys_are_asked_for_again(logistic):
    hand = Hand(LOGISTIC, 0, 7)
    assert steps(logistic, hand)
    for tear in (_cut, _flip):
        hand.wanted.clear()
        tear(logistic.folder / "keys" / f"{hand.keys.fingerprint}.keys.safetensors")
        logistic.let_go()
        assert steps(logistic, hand)
        assert hand.wanted == [KEYS]


def _text(text):
    return {NOTE: np.frombuffer(text.encode(), np.uint8)}


def _spoilt(arrays, name, change):
    return arrays | {name: change(arrays[name].copy())}


def _above(array):
    array.flat[3] = 2**63
    return array


def _hostile(hand, other):
    """What a stranger may send, and what is said to it."""
    told = json.loads(hand.hello()[NOTE].tobytes())
    batch = hand.hello() | hand.upload([BATCH])
    keys = hand.hello() | hand.upload([KEYS])
    key_file = np.frombuffer(b"trellis-encrypted-1\n" + bytes(100), np.uint8)
    first, seeds = f"{INPUTS}.first", f"{INPUTS}.seeds"
    yield _text("{"), "malformed", "can't be read"
    yield _text("[1]"), "malformed", "no object"
    yield _text("[" * 50_000), "malformed", "can't be read"
    yield _text('{"a":"' + "a" * 100_000 + '"}'), "malformed", "uint8 (100008,)"
    yield {NOTE: np.zeros(4)}, "malformed", "float64"
    yield {NOTE: np.array([[255]], np.uint8)}, "malformed", "(1, 1)"
    for name, value in (
        ("fingerprint", "../../etc/passwd"), ("fingerprint", None), ("fingerprint", "A" * 32),
        ("data", 7), ("data", "0" * 33), ("data", "0" * 31 + "\n"),
        ("batch", -1), ("batch", True), ("batch", 10**9), ("batch", "0"), ("batch", 0.5),
    ):  # fmt: skip
        yield {NOTE: note({**told, name: value})}, "malformed", f"note's {name}"
    stranger = keys | hand.hello(fingerprint=other.keys.fingerprint)
    yield stranger, "malformed", "another key"
    yield _spoilt(keys, "keys.first", _above), "malformed", "not below its prime"
    yield _spoilt(keys, "keys.first", lambda array: array[1:]), "malformed", "shape"
    yield _spoilt(keys, "keys.seeds", np.float64), "malformed", "float64"
    yield _spoilt(keys, "keys.elements", lambda array: array + 2), "malformed", "automorphisms"
    yield keys | {"keys.more": np.zeros(1)}, "malformed", "others"
    yield _spoilt(batch, first, _above), "malformed", "not below its prime"
    yield _spoilt(batch, first, lambda array: array[1:]), "malformed", first
    yield _spoilt(batch, first, lambda array: array[..., :-1]), "malformed", first
    yield _spoilt(batch, first, np.float32), "malformed", "float32"
    yield _spoilt(batch, seeds, lambda array: array[:, 1:]), "malformed", seeds
    yield {name: array for name, array in batch.items() if name != seeds}, "malformed", seeds
    yield {n: a for n, a in batch.items() if PACKED not in n}, "malformed", "nothing"
    yield hand.hello() | {f"{ERRORS}.first": np.zeros(3)}, "malformed", "errors.first"
    yield hand.hello() | {"gift": key_file}, "malformed", "secret key"


def test_what_strangers_send_is_refused_with_a_reason_and_the_next_step_is_served(logistic):
    hand, weights = Hand(LOGISTIC, 0, 7), weights_of(LOGISTIC.spec)
    assert steps(logistic, hand)
    hand.wanted.clear()
    other = Hand(LOGISTIC, 1, 8, OwnerKeys.generate(LOGISTIC.ring))
    learner = PartyLearner(logistic, weights)
    for arrays, code, reason in _hostile(hand, other):
        with pytest.raises(Refused, match=re.escape(reason)) as refused:
            learner.answer(0, arrays)
        assert refused.value.reason == code, reason
        assert hand.agrees(hand.step(learner), weights)
    assert hand.wanted == []


@pytest.mark.parametrize("arrays", [{}, {f"{ERRORS}.first": np.zeros(1, np.uint64)}])
def test_a_step_begins_with_a_note(logistic, arrays):
    with pytest.raises(Refused, match="begins with a note") as refused:
        PartyLearner(logistic, weights_of(LOGISTIC.spec)).answer(0, arrays)
    assert refused.value.reason == "phase"


def test_errors_that_are_none_can_be_sent_again(logistic):
    hand, weights = Hand(LOGISTIC, 0, 7), weights_of(LOGISTIC.spec)
    learner = PartyLearner(logistic, weights)
    errors = hand.hello() | hand.errors(hand.begin(learner))
    for change in (_above, lambda array: array[1:], np.int64):
        with pytest.raises(Refused) as refused:
            learner.answer(0, _spoilt(errors, f"{ERRORS}.first", change))
        assert refused.value.reason == "malformed"
    assert hand.agrees(hand.gradients(learner.answer(0, errors)), weights)


def _private_context():
    return tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 60])


@pytest.mark.parametrize("secret", [lambda: keys_of(LOGISTIC.ring), _private_context])
def test_a_secret_key_is_refused_where_it_could_be_handed_over(tmp_path, logistic, secret):
    for handed in ({"plan": secret()}, {"memory": secret()}, {"folder": secret()}):
        with pytest.raises(SecretKeyError):
            ComputeParty(**{"plan": LOGISTIC, "folder": tmp_path} | handed)
    with pytest.raises(SecretKeyError):
        PartyLearner(logistic, weights_of(LOGISTIC.spec) | {"layers.0.weight": secret()})


def test_torn_labels_are_asked_for_again(tmp_path):
    with ComputeParty(STRICT, tmp_path, workers=1) as party:
        hand = Hand(STRICT)
        assert steps(party, hand)
        _flip(stored(party, hand, LABELS))
        hand.wanted.clear()
        assert steps(party, hand)
        assert hand.wanted == [BATCH]
