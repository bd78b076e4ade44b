"""What an owner's turn and a stored mini-batch take: an honest one's bytes, counted."""

import pytest

from clients.encrypted.notes import BATCH, KEYS, MOST_NOTE, Step
from clients.encrypted.party import ComputeParty
from clients.encrypted.party_learner import PartyLearner
from clients.encrypted.plan import plan_of
from clients.encrypted.sizes import kinds, stored_bytes, turn_bytes
from clients.encrypted.spec import Spec
from strategies.collectors.encrypted import ENCRYPTED
from strategies.collectors.turns import write_turn
from tests.support.party import LOGISTIC, SMALL, STRICT, Hand, weights_of

PAIRED = plan_of(Spec((300, 3)))


@pytest.mark.parametrize("plan", [SMALL, STRICT, LOGISTIC, PAIRED])
def test_no_turn_is_longer_than_its_plan_says_and_the_longest_one_hardly_shorter(plan):
    hand = Hand(plan)
    turn = write_turn(ENCRYPTED, hand.hello() | hand.upload([KEYS, BATCH]), {})
    sent = sum(len(array.data) for array in turn[ENCRYPTED].values())
    assert sent <= turn_bytes(plan) <= sent + MOST_NOTE + 4096


def test_a_turn_of_errors_can_be_the_longest():
    many = plan_of(Spec((2, 100)))
    few = plan_of(Spec((2, 3)))
    assert turn_bytes(many) - turn_bytes(few) > 40 * 8 * many.ring.degree


def test_a_stored_mini_batch_is_as_large_as_said(tmp_path):
    with ComputeParty(STRICT, tmp_path, workers=1) as party:
        hand = Hand(STRICT)
        hand.begin(PartyLearner(party, weights_of(STRICT.spec)))
        step = Step(hand.keys.fingerprint, f"{hand.seed:032x}", 0)
        files = [
            tmp_path / "ciphertexts" / step.key(kind).owner / "0.npy" for kind in kinds(STRICT)
        ]
        size = sum(file.stat().st_size for file in files)
    told = sum(stored_bytes(STRICT).values())
    assert told < size < 1.01 * told
