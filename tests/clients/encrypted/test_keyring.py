"""The compute party's key ring: kept over restarts, bounded, and never trusting a damaged file."""

import logging
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.encrypted.key_frames import EvaluationKeys, evaluation_bytes
from clients.encrypted.keyring import Keyring
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.ring import Ring
from strategies.ckks import CiphertextError, SecretKeyError

RING, ELEMENTS = Ring(4096, (54, 55)), (5, 4097)
ROOM = 10 * evaluation_bytes(RING, ELEMENTS)


@pytest.fixture(scope="module")
def keys():
    return OwnerKeys.generate(RING).evaluation(ELEMENTS)


@pytest.fixture(scope="module")
def file_of(keys, tmp_path_factory):
    """A folder with the keys' file, and its bytes."""
    folder = tmp_path_factory.mktemp("ring")
    Keyring(folder, ROOM).save(keys)
    (path,) = folder.glob("*.safetensors")
    return path, path.read_bytes()


def test_keys_are_there_after_a_restart(tmp_path, keys):
    Keyring(tmp_path / "ring", ROOM).save(keys)
    again = Keyring(tmp_path / "ring", ROOM).load(keys.fingerprint, RING, ELEMENTS)
    assert again.digest == keys.digest
    assert (again.fingerprint, again.elements) == (keys.fingerprint, keys.elements)
    assert again.seal(RING)[0].size() == 1
    assert (tmp_path / "ring").stat().st_mode & 0o777 == 0o700
    assert {path.name for path in (tmp_path / "ring").iterdir()} == {
        ".lock",
        f"{keys.fingerprint}.keys.safetensors",
    }


def test_keys_that_are_not_there_are_asked_for(tmp_path, keys):
    ring = Keyring(tmp_path, ROOM)
    assert ring.load(keys.fingerprint, RING, ELEMENTS) is None
    ring.save(keys)
    assert ring.load("0" * 32, RING, ELEMENTS) is None
    assert ring.load(keys.fingerprint, RING, (5,)) is None
    assert ring.load(keys.fingerprint, Ring(8192, (60, 52, 60)), ELEMENTS) is None


@given(data=st.data())
def test_a_torn_or_altered_file_is_named_and_asked_for_again(file_of, keys, data):
    path, whole = file_of
    head = int.from_bytes(whole[:8], "little") + 8
    kind = data.draw(st.sampled_from(["cut", "head", "body", "longer"]))
    if kind == "cut":
        spoiled = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif kind == "longer":
        spoiled = whole + bytes(data.draw(st.integers(1, 10_000)))
    else:
        start, stop = (0, head) if kind == "head" else (head, len(whole))
        at = data.draw(st.integers(start, stop - 1))
        other = whole[at] ^ data.draw(st.integers(1, 255))
        spoiled = whole[:at] + bytes([other]) + whole[at + 1 :]
    path.write_bytes(spoiled)
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("clients.encrypted.keyring")
    logger.addHandler(handler)
    try:
        found = Keyring(path.parent, ROOM).load(keys.fingerprint, RING, ELEMENTS)
    finally:
        logger.removeHandler(handler)
    if found is None:
        (record,) = records
        assert str(path) in record.getMessage()
        assert "asked for again" in record.getMessage()
    else:  # a byte of the head that says nothing: a space, say
        assert found.digest == keys.digest


def test_a_damaged_file_is_replaced_by_what_comes_again(file_of, keys):
    path, whole = file_of
    path.write_bytes(whole[:1000])
    ring = Keyring(path.parent, ROOM)
    assert ring.load(keys.fingerprint, RING, ELEMENTS) is None
    ring.save(keys)
    assert ring.load(keys.fingerprint, RING, ELEMENTS).digest == keys.digest


def test_a_file_under_another_keys_name_is_refused(tmp_path, keys, caplog):
    ring = Keyring(tmp_path, ROOM)
    ring.save(keys)
    (path,) = tmp_path.glob("*.safetensors")
    path.rename(tmp_path / f"{'a' * 32}.keys.safetensors")
    assert ring.load("a" * 32, RING, ELEMENTS) is None
    assert "another secret key" in caplog.text


def test_a_huge_file_is_refused_before_it_is_read(tmp_path, keys, caplog):
    ring = Keyring(tmp_path, ROOM)
    ring.save(keys)
    (path,) = tmp_path.glob("*.safetensors")
    os.truncate(path, 1 << 40)
    assert ring.load(keys.fingerprint, RING, ELEMENTS) is None
    assert "at most" in caplog.text


@pytest.mark.parametrize(
    "fingerprint", ["", "../../etc/passwd", "A" * 32, "a" * 33, "a" * 31 + "\n"]
)
def test_only_a_fingerprint_names_a_file(tmp_path, fingerprint):
    with pytest.raises(CiphertextError, match="no fingerprint"):
        Keyring(tmp_path, ROOM).load(fingerprint, RING, ELEMENTS)


def test_a_full_ring_lets_go_of_what_was_used_longest_ago(tmp_path, keys):
    each = evaluation_bytes(RING, ELEMENTS)
    ring = Keyring(tmp_path, int(3.5 * each))
    names = [f"{index:032x}" for index in range(4)]
    strangers = [EvaluationKeys(name, keys.elements, keys.first, keys.seeds) for name in names]
    for index, stranger in enumerate(strangers[:3]):
        ring.save(stranger)
        (path,) = tmp_path.glob(f"{names[index]}*")
        os.utime(path, (1000 + index, 1000 + index))
    assert ring.load(names[0], RING, ELEMENTS) is not None  # used again: 1 is the oldest now
    ring.save(strangers[3])
    held = [name for name in names if ring.load(name, RING, ELEMENTS) is not None]
    assert held == [names[0], names[2], names[3]]
    ring.save(strangers[3])  # in place of itself: nobody else goes
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_keys_larger_than_the_ring_are_refused(tmp_path, keys):
    with pytest.raises(CiphertextError, match="key ring holds"):
        Keyring(tmp_path / "ring", evaluation_bytes(RING, ELEMENTS) - 1).save(keys)
    assert not (tmp_path / "ring").exists()


def test_what_a_killed_process_left_goes(tmp_path, keys):
    (tmp_path / ".0123.part").write_bytes(bytes(100))
    Keyring(tmp_path, ROOM).save(keys)
    assert not list(tmp_path.glob(".*.part"))


def test_a_secret_key_has_no_place_in_a_ring(tmp_path):
    with pytest.raises(SecretKeyError):
        Keyring(tmp_path, ROOM).save(OwnerKeys.generate(RING))
    assert not list(tmp_path.iterdir())


def test_what_is_read_is_not_a_view_of_a_file_that_may_change(tmp_path, keys):
    ring = Keyring(tmp_path, ROOM)
    ring.save(keys)
    found = ring.load(keys.fingerprint, RING, ELEMENTS)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(bytes(path.stat().st_size))
    np.testing.assert_array_equal(found.first, keys.first)
