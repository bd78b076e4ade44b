"""Owners' mini-batches on a party's disk: bounded an owner and in all, and nobody's loss for another's greed."""

import secrets

import numpy as np
import pytest

from clients.encrypted.footprint import MB
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.memory import BatchKey, CiphertextCache
from clients.encrypted.notes import BATCH, WANT, read_note
from clients.encrypted.party import ComputeParty
from clients.encrypted.party_learner import PartyLearner
from clients.encrypted.sizes import stored_bytes
from clients.encrypted.stock import Held, Stock
from strategies.wire import Refused
from tests.support.party import LOGISTIC, Hand, weights_of

ONE = sum(stored_bytes(LOGISTIC).values())
RESIDUES = np.zeros((8, 2, 1, 8), np.uint64)


def taken(folder) -> int:
    return sum(path.stat().st_size for path in (folder / "ciphertexts").rglob("*.npy"))


def party_of(folder, **settings):
    return ComputeParty(LOGISTIC, folder, workers=1, **settings)


def test_an_owner_has_one_set_of_mini_batches_at_a_time(tmp_path):
    hand = Hand(LOGISTIC, 0, 1)
    with party_of(tmp_path) as party:
        learner = PartyLearner(party, weights_of(LOGISTIC.spec))
        hand.begin(learner)
        before = taken(tmp_path)
        for _ in range(4):
            turn = hand.hello(data=secrets.token_hex(16)) | hand.upload([BATCH])
            assert WANT not in read_note(learner.answer(0, turn))
        assert taken(tmp_path) == before


def test_a_party_that_is_started_again_knows_whose_what_is(tmp_path):
    for seed in (1, 2):
        with party_of(tmp_path) as party:
            Hand(LOGISTIC, 0, seed).begin(PartyLearner(party, weights_of(LOGISTIC.spec)))
    assert taken(tmp_path) < 1.1 * ONE


def test_an_owner_with_another_key_leaves_no_keys_behind(tmp_path):
    with party_of(tmp_path) as party:
        learner = PartyLearner(party, weights_of(LOGISTIC.spec))
        for _ in range(2):
            Hand(LOGISTIC, 0, 1, OwnerKeys.generate(LOGISTIC.ring)).begin(learner)
    assert len(list((tmp_path / "keys").glob("*.safetensors"))) == 1


def test_an_owner_s_mini_batches_take_no_more_than_one_owner_may(tmp_path):
    hand = Hand(LOGISTIC, 0, 1)
    with party_of(tmp_path, owner_disk_mb=3.5 * ONE / MB) as party:
        learner = PartyLearner(party, weights_of(LOGISTIC.spec))
        hand.begin(learner)
        for batch in range(1, 6):
            learner.answer(0, hand.hello(batch=batch) | hand.upload([BATCH]))
            assert taken(tmp_path) <= 3.6 * ONE
        for batch, there in enumerate([False, False, False, True, True, True]):
            assert (WANT in read_note(learner.answer(0, hand.hello(batch=batch)))) is not there


def test_where_not_one_mini_batch_has_room_its_owner_is_refused_and_told_why(tmp_path):
    hand = Hand(LOGISTIC, 0, 1)
    with party_of(tmp_path, owner_disk_mb=0.5 * ONE / MB) as party:
        with pytest.raises(Refused, match="raise disk_mb") as told:
            hand.begin(PartyLearner(party, weights_of(LOGISTIC.spec)))
        assert told.value.reason == "party"
        assert taken(tmp_path) == 0


@pytest.fixture
def stock_of(tmp_path):
    cache = CiphertextCache(tmp_path / "ciphertexts")

    def make(most, most_each=10**6):
        return cache, Stock(cache, tmp_path / "owners.json", most, most_each)

    return make


def put(cache, stock, client, number, letter=None):
    """A mini-batch of an owner; its key."""
    key = BatchKey((letter or "abcdef"[client]) * 8, number)
    stock.assign(client, Held("fingerprint", (key.owner,)))
    stock.reserve(client, {key: RESIDUES.nbytes})
    cache.put(key, RESIDUES)
    return key


def test_who_has_most_makes_room_and_loses_what_it_used_longest_ago(stock_of):
    cache, stock = stock_of(5 * RESIDUES.nbytes)
    small = put(cache, stock, 0, 0)
    greedy = [put(cache, stock, 1, number) for number in range(4)]
    stock.used(greedy[:1])
    more = [put(cache, stock, 2, number) for number in range(2)]
    assert cache.missing([small, *greedy, *more]) == greedy[1:3]
    greedy += [put(cache, stock, 1, number) for number in range(4, 20)]
    assert cache.missing([small, *more]) == []


def test_what_is_nobody_s_goes_first(stock_of):
    cache, _ = stock_of(0)
    orphan = BatchKey("f" * 8, 0)
    cache.put(orphan, RESIDUES)
    cache, stock = stock_of(3 * RESIDUES.nbytes + 100)
    mine = [put(cache, stock, 0, number) for number in range(2)]
    assert cache.missing([orphan, *mine]) == [orphan]


def test_two_owners_of_one_set_keep_it_until_both_have_left(stock_of):
    cache, stock = stock_of(10**6)
    shared = put(cache, stock, 0, 0, "a")
    put(cache, stock, 1, 0, "a")
    put(cache, stock, 0, 0, "b")
    assert shared in cache
    put(cache, stock, 1, 0, "c")
    assert shared not in cache


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"0": []}', "7"])
def test_a_list_of_owners_that_can_not_be_read_counts_as_none(stock_of, tmp_path, text):
    (tmp_path / "owners.json").write_text(text)
    cache, stock = stock_of(10**6)
    assert put(cache, stock, 0, 0) in cache
