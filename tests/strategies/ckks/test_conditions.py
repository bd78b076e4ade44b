"""A device's own conditions on encrypted sums, and what it still opens under its key."""

import stat

import pytest

from strategies.ckks.conditions import Conditions, KeyLedger
from strategies.ckks.settings import CkksSettings
from strategies.wire import Refused

SESSION = bytes(16)


def test_without_a_word_of_the_operators_the_settings_defaults_are_the_floor():
    Conditions.of({}).check(CkksSettings())
    Conditions.of({}).check(CkksSettings(quorum=9, noise_bits=20, decryptions=1))


@pytest.mark.parametrize(
    ("node", "run", "words"),
    [
        ({}, {"quorum": 2}, r"collector\.quorum=2 .* ckks-least-quorum=3"),
        ({}, {"noise_bits": 0}, r"collector\.noise_bits=0 .* ckks-least-noise-bits=5"),
        ({}, {"decryptions": 4097}, r"collector\.decryptions=4097 .* ckks-most-decryptions=4096"),
        ({"ckks-least-quorum": 5}, {"quorum": 4}, "ckks-least-quorum=5"),
        ({"ckks-least-noise-bits": 9.5}, {"noise_bits": 9}, r"ckks-least-noise-bits=9\.5"),
        ({"ckks-most-decryptions": 10}, {"decryptions": 11}, "ckks-most-decryptions=10"),
    ],
)
def test_a_run_that_offers_less_is_refused_by_name(node, run, words):
    with pytest.raises(ValueError, match=words):
        Conditions.of(node).check(CkksSettings(**run))


def test_an_operator_may_ask_for_less():
    node = {"ckks-least-quorum": 2, "ckks-least-noise-bits": 0, "ckks-most-decryptions": 9000}
    Conditions.of(node).check(CkksSettings(quorum=2, noise_bits=0, decryptions=9000))


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"ckks-least-quorum": "5"}, "ckks-least-quorum is '5': a whole number"),
        ({"ckks-least-quorum": 5.0}, "a whole number"),
        ({"ckks-most-decryptions": True}, "a whole number"),
        ({"ckks-least-noise-bits": "5"}, "ckks-least-noise-bits is '5': a number"),
        ({"ckks-least-noise-bits": 65}, "least_noise_bits = 65"),
    ],
)
def test_a_condition_that_is_none_is_named(node, words):
    with pytest.raises(ValueError, match=words):
        Conditions.of(node)


def test_a_key_opens_as_many_ciphertexts_as_its_noise_is_made_for(tmp_path):
    ledger = KeyLedger(tmp_path / "ckks", "aa")
    ledger.open(SESSION, "one", 6, 10)
    ledger.open(SESSION, "one", 6, 10)  # the same sum again
    with pytest.raises(Refused, match="worn"):
        ledger.open(SESSION, "two", 5, 10)
    KeyLedger(tmp_path / "ckks", "aa").open(SESSION, "two", 4, 10)  # whoever opens it next
    with pytest.raises(Refused, match="worn"):
        ledger.open(bytes(range(16)), "one", 1, 10)
    KeyLedger(tmp_path / "ckks", "bb").open(SESSION, "two", 10, 10)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "ckks").rglob("ledger")}
    assert modes == {0o600}


def test_what_a_run_with_less_noise_has_opened_counts_for_more(tmp_path):
    ledger = KeyLedger(tmp_path / "ckks", "aa")
    ledger.open(SESSION, "one", 5, 10)
    with pytest.raises(Refused, match="worn"):
        ledger.open(SESSION, "two", 501, 1000)
    ledger.open(SESSION, "two", 500, 1000)


def test_a_line_that_was_cut_off_is_no_opening(tmp_path):
    ledger = KeyLedger(tmp_path / "ckks", "aa")
    with ledger.locked():
        ledger.record("opened", SESSION.hex(), "one")
    ledger.open(SESSION, "two", 10, 10)
