"""What a key may still tell: costs add up over runs, promises are kept, and the ledger is where the key is."""

from concurrent.futures import ThreadPoolExecutor
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.encrypted.flooding import Flooding, Release
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.ledger import Charge, ReleaseLedger
from clients.encrypted.ring import Ring
from strategies.wire import Refused
from tests.support import encrypted as support

PRINT = "ab" * 16


@pytest.fixture
def ledger(tmp_path):
    return ReleaseLedger(tmp_path / "owner.key", PRINT)


def told(ledger, name, noise_bits=None, decryptions=4096, **chosen):
    """A step of one value, by name, under the run's settings."""
    keys = support.keys_of(Ring(4096, (54, 55)))
    flooding = Flooding(noise_bits=noise_bits, decryptions=decryptions, **chosen)
    return Release(keys, ledger, flooding, 1e-3)({"a": np.full(4, float(name))})


def refused(ledger, *args, **chosen):
    with pytest.raises(Refused) as found:
        told(ledger, *args, **chosen)
    return found.value.reason


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.floats(0, 30), st.integers(1, 9)), min_size=1, max_size=12
    )
)  # fmt: skip
def test_costs_of_all_runs_never_exceed_what_any_of_them_promised(tmp_path_factory, runs):
    ledger = ReleaseLedger(tmp_path_factory.mktemp("key") / "owner.key", PRINT)
    spent, promised = 0.0, 0.0
    for name, (bits, decryptions) in enumerate(runs):
        flooding = Flooding(noise_bits=bits, decryptions=decryptions)
        cost = 12 / flooding.deviation(1.0, 7) ** 2
        assert cost == pytest.approx(2**-bits / decryptions)
        fits = spent + cost <= 2 ** -max(promised, bits) * (1 + 1e-9)
        try:
            ledger.charge(Charge(f"{name}", cost, decryptions, bits))
        except Refused:
            assert not fits
            continue
        assert fits
        spent, promised = spent + cost, max(promised, bits)
    assert spent <= 2**-promised * (1 + 1e-9)


@pytest.mark.parametrize("decryptions", [1, 3, 7, 1000])
@pytest.mark.parametrize("noise_bits", [0, 1.3, 20])
def test_a_key_tells_exactly_as_many_steps_as_its_noise_is_made_for(
    ledger, decryptions, noise_bits
):
    cost = 12 / Flooding(noise_bits=noise_bits, decryptions=decryptions).deviation(1.0, 3) ** 2
    every = [Charge(f"{name}", cost, decryptions, noise_bits) for name in range(decryptions)]
    lines = [" ".join(("released", PRINT, *charge.words())) for charge in every[1:]]
    ledger.path.write_text("\n".join(lines))
    ledger.charge(every[0])
    with pytest.raises(Refused, match="worn"):
        ledger.charge(Charge("more", cost, decryptions, noise_bits))
    ledger.charge(every[-1])  # was told before


def test_after_steps_without_a_promise_none_may_be_made(ledger):
    for name in range(3):
        told(ledger, name)
    assert refused(ledger, 9, noise_bits=20) == "worn"
    told(ledger, 3)


def test_a_weaker_promise_leaves_no_room_for_a_stronger_one(ledger):
    told(ledger, 0, noise_bits=0)
    assert refused(ledger, 9, noise_bits=16) == "worn"


def test_a_promise_is_kept_against_later_runs(ledger):
    told(ledger, 0, noise_bits=16)
    assert refused(ledger, 9) == "worn"  # its noise is less than the promise takes
    assert refused(ledger, 9, noise_bits=0, decryptions=1) == "worn"
    with pytest.raises(Refused, match="worn"):
        ledger.charge_exact()
    told(ledger, 1, noise_bits=16)
    told(ledger, 2, multiple=12 * sqrt(2**20) * 4096)  # as good as promised, whatever it is called


def test_after_exact_values_no_promise_may_be_made(ledger):
    for _ in range(2):
        ledger.charge_exact()
    assert ledger.path.read_text().count("exact") == 1
    assert refused(ledger, 9, noise_bits=0) == "worn"
    told(ledger, 3)


def test_without_a_promise_steps_of_all_runs_count(ledger):
    told(ledger, 0, decryptions=2)
    told(ledger, 1, decryptions=4)
    told(ledger, 2, decryptions=4)
    assert refused(ledger, 3, decryptions=4096) == "worn"


def test_a_ledger_is_found_by_whatever_path_leads_to_the_key(tmp_path):
    path = tmp_path / "own" / "owner.key"
    OwnerKeys.generate(Ring(4096, (54, 55))).save(path)
    (tmp_path / "link.key").symlink_to(path)
    told(ReleaseLedger(path, PRINT), 0, decryptions=1)
    assert refused(ReleaseLedger(tmp_path / "link.key", PRINT), 1, decryptions=1) == "worn"
    assert refused(ReleaseLedger(tmp_path / "own/../own/owner.key", PRINT), 1, decryptions=1)
    assert ReleaseLedger(path, PRINT).path.stat().st_mode & 0o077 == 0


def test_another_key_in_the_same_file_begins_anew(tmp_path):
    told(ReleaseLedger(tmp_path / "k", PRINT), 0, decryptions=1)
    told(ReleaseLedger(tmp_path / "k", "cd" * 16), 1, noise_bits=20)


def test_a_line_that_was_cut_off_told_nothing_and_one_that_is_no_ledgers_stops_all(ledger):
    told(ledger, 0, decryptions=3)
    with ledger.path.open("a") as file:
        file.write(f"\nreleased {PRINT} 00ff 0.00")
    told(ledger, 1, decryptions=3)
    told(ledger, 2, decryptions=3)
    assert refused(ledger, 3, decryptions=3) == "worn"
    ledger.path.write_text(f"released {PRINT} 00ff nothing - 3")
    assert refused(ledger, 4) == "key"


def _many(path, first):
    ledger, became = ReleaseLedger(path, PRINT), 0
    for name in range(first, first + 8):
        try:
            ledger.charge(Charge(f"{name}", 0.1, 10))
        except Refused:
            continue
        became += 1
    return became


def test_two_owners_at_once_share_what_a_key_may_tell(tmp_path):
    path = tmp_path / "owner.key"
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda at: _many(path, 10 * at), range(4))) == 10


def test_charges_are_read_as_they_were_written():
    for charge in (Charge("a", 2.0**-31 / 3, 7, 1 / 3), Charge("b", 1e300, 1 << 40)):
        assert Charge.of(charge.words()) == charge
