"""Residues in and out of SEAL's own streams."""

import os

import numpy as np
import pytest

from strategies.ckks import Cipher, CiphertextError, CkksParameters, Sum
from strategies.ckks.parameters import ring
from strategies.ckks.streams import Streams, scratch


def test_a_fresh_ciphertext_and_a_whole_one_are_the_same(key):
    """The seed that travels in place of the second component gives SEAL's own second component."""
    theirs, parameters = ring(4096, (60,)), CkksParameters()
    encryptor = theirs.seal.Encryptor(theirs.context, key.seal_key())
    plaintext = theirs.seal.Plaintext()
    theirs.seal.CKKSEncoder(theirs.context).encode([0.5] * 2048, parameters.scale, plaintext)
    with scratch() as file:
        streams = Streams(theirs, 4096, file, parameters.scale)
        first, seed = streams.fresh(encryptor.encrypt_symmetric(plaintext))
        whole = streams.whole(streams.load(first, seed))
        assert np.array_equal(whole[0], first)
        assert np.array_equal(streams.whole(streams.load(whole)), whole)
        assert len(seed) == 64
    assert (whole < parameters.modulus).all()


def test_seal_itself_refuses_residues_beyond_the_modulus():
    theirs = ring(4096, (60,))
    with scratch() as file:
        streams = Streams(theirs, 4096, file, CkksParameters().scale)
        with pytest.raises(CiphertextError, match="SEAL refuses"):
            streams.load(np.full((2, 4096), 2**64 - 1, np.uint64))


def test_where_there_are_no_files_in_memory_a_private_folder_serves(key, monkeypatch, tmp_path):
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    parameters = CkksParameters()
    cipher, added = Cipher(parameters, key), Sum(parameters, 3)
    with scratch() as file:
        (folder,) = tmp_path.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        assert file.write(b"x").startswith(str(folder))
    added.add(cipher.encrypt(np.array([0.5, -0.25, 1.0])).blob)
    released = cipher.release(added.to_bytes(), 3)
    np.testing.assert_allclose(released, [0.5, -0.25, 1.0], atol=parameters.error)
    assert not list(tmp_path.iterdir())
