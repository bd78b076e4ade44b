"""The shared key's file, and what of the key is ever shown."""

import pickle
import stat

import numpy as np
import pytest

from strategies.ckks import Cipher, CkksParameters, KeyFileError, SharedKey, Sum


def test_a_key_is_read_back_as_it_was_written(tmp_path, parameters, keys):
    path = tmp_path / "deep" / "shared.key"
    keys.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == ["shared.key"]
    again = SharedKey.load(path)
    assert (again.fingerprint, again.ring) == (keys.fingerprint, keys.ring)
    added = Sum(parameters, 3)
    added.add(Cipher(parameters, keys).encrypt(np.array([0.5, -0.5, 0.25])).blob)
    released = Cipher(parameters, again).release(added.to_bytes(), 3)
    np.testing.assert_allclose(released, [0.5, -0.5, 0.25], atol=parameters.error)


def test_a_key_is_never_written_over_another(tmp_path, key, other_key):
    key.save(tmp_path / "key")
    with pytest.raises(FileExistsError):
        other_key.save(tmp_path / "key")
    assert SharedKey.load(tmp_path / "key").fingerprint == key.fingerprint
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def test_a_key_that_others_can_read_is_refused(tmp_path, key):
    key.save(tmp_path / "key")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        SharedKey.load(tmp_path / "key")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"x" + data[1:],
        lambda data: data[:15] + b"\xff" + data[16:],
        lambda data: data[:-8] + b"\xff" * 8,
        lambda data: data * 9,
    ],
)
def test_a_file_that_holds_no_key_is_refused(tmp_path, key, spoil):
    key.save(tmp_path / "key")
    (tmp_path / "key").write_bytes(spoil((tmp_path / "key").read_bytes()))
    with pytest.raises(KeyFileError, match="holds no CKKS key"):
        SharedKey.load(tmp_path / "key")


def test_a_missing_file_is_named_with_the_mend(tmp_path):
    with pytest.raises(KeyFileError, match=r"nowhere.*trellis keys ckks"):
        SharedKey.load(tmp_path / "nowhere")


def test_a_key_is_made_once_where_several_ask_for_it(tmp_path):
    made = SharedKey.load_or_make(tmp_path / "clients" / "key", CkksParameters())
    again = SharedKey.load_or_make(tmp_path / "clients" / "key", CkksParameters())
    assert made.fingerprint == again.fingerprint


def test_a_key_shows_nothing_of_itself(key):
    assert key.fingerprint in repr(key)
    assert len(repr(key)) < 100
    with pytest.raises(TypeError, match="never pickled"):
        pickle.dumps(key)


def test_fingerprints_tell_keys_apart(key, other_key):
    assert len(key.fingerprint) == 32
    assert key.fingerprint != other_key.fingerprint
    assert key.derive("a") != key.derive("b")
    assert key.derive("a", b"x") != key.derive("a", b"y")
