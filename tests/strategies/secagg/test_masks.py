"""Masks are published keystreams, cancel in pairs, and leave nothing of what they hide."""

import os

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from strategies.secagg.masks import BLOCK, add_masks, keystream

keys = st.binary(min_size=32, max_size=32)
ciphers = st.sampled_from(["aes", "chacha"])
sizes = st.sampled_from([0, 1, 2, 3, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 7])


def mask(key, size, cipher):
    vector = np.zeros(size, np.uint32)
    add_masks(vector, [key], [], cipher=cipher)
    return vector


def aes_blocks(key, size):
    """Counter mode written out: the block cipher on 2, 3, 4, … as 128-bit big-endian numbers."""
    counters = b"".join(number.to_bytes(16, "big") for number in range(2, 2 - (-4 * size // 16)))
    encryptor = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    return np.frombuffer(encryptor.update(counters)[: 4 * size], "<u4").astype(np.uint32)


def chacha_stream(key, size):
    encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * size)), "<u4").astype(np.uint32)


REFERENCE = {"aes": aes_blocks, "chacha": chacha_stream}


@given(sizes, st.lists(keys, max_size=4), st.lists(keys, max_size=4), ciphers, st.integers(0, 9))
def test_masks_add_up_as_written_out(size, plus, minus, cipher, seed):
    vector = np.random.default_rng(seed).integers(0, 1 << 32, size, dtype=np.uint32)
    expected = vector.astype(object)
    for sign, some in ((1, plus), (-1, minus)):
        for key in some:
            expected = expected + sign * REFERENCE[cipher](key, size).astype(object)
    add_masks(vector, plus, minus, cipher=cipher)
    assert np.array_equal(vector, expected % (1 << 32))


@given(sizes, st.lists(keys, max_size=5), ciphers)
def test_what_one_adds_another_takes_off(size, pairwise, cipher):
    one, other = np.arange(size, dtype=np.uint32), np.full(size, 7, np.uint32)
    add_masks(one, pairwise, [], cipher=cipher)
    add_masks(other, [], pairwise, cipher=cipher)
    assert np.array_equal(one + other, np.arange(size, dtype=np.uint32) + np.uint32(7))


def test_all_pairs_of_a_complete_graph_cancel_in_the_sum():
    clients, size = 6, BLOCK + 3
    pair = {(i, j): os.urandom(32) for j in range(clients) for i in range(j)}
    total = np.zeros(size, np.uint32)
    for client in range(clients):
        masked = np.full(size, client, np.uint32)
        add_masks(
            masked,
            [key for (i, _), key in pair.items() if i == client],
            [key for (_, j), key in pair.items() if j == client],
        )
        total += masked
    assert (total == sum(range(clients))).all()


def test_a_longer_mask_begins_with_the_shorter_one():
    key = os.urandom(32)
    for cipher in ("aes", "chacha"):
        assert np.array_equal(mask(key, 2 * BLOCK + 5, cipher)[:1_001], mask(key, 1_001, cipher))


def test_the_aes_mask_is_the_published_keystream():
    """Zeros under a zero key and nonce: test case 14 of McGrew & Viega's GCM, "The Galois/Counter Mode of Operation".

    Counter mode written out above starts where test case 14 does.
    """
    first = mask(bytes(32), 4, "aes").astype("<u4").tobytes()
    assert first.hex() == "cea7403d4d606b6e074ec5d3baf39d18"
    assert np.array_equal(mask(bytes(32), 999, "aes"), aes_blocks(bytes(32), 999))


def test_the_chacha_mask_is_the_published_keystream():
    """RFC 8439, appendix A.1, test vectors 1 and 2: zero key and nonce, counters 0 and 1."""
    words = mask(bytes(32), 32, "chacha").astype("<u4").tobytes()
    assert words[:64].hex() == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )
    assert words[64:].hex() == (
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )


@pytest.mark.parametrize("cipher", ["aes", "chacha"])
def test_a_masked_vector_looks_uniform(cipher):
    """Chi-square over the bytes of 200,000 masked zeros; keys are the system's, false alarms 1 in a million a case."""
    hidden = mask(os.urandom(32), 200_000, cipher).view(np.uint8)
    for place in range(4):
        counts = np.bincount(hidden[place::4], minlength=256)
        expected = counts.sum() / 256
        statistic = ((counts - expected) ** 2).sum() / expected
        assert chi2.ppf(1e-6 / 8, 255) < statistic < chi2.isf(1e-6 / 8, 255)


def test_what_cannot_be_right_is_refused():
    vector = np.zeros(4, np.uint32)
    with pytest.raises(ValueError, match="32 bytes long, this one 16"):
        add_masks(vector, [bytes(16)], [])
    with pytest.raises(ValueError, match="choose 'aes' or 'chacha'"):
        keystream(bytes(32), "rot13")
    with pytest.raises(TypeError, match="int64, not uint32"):
        add_masks(np.zeros(4, np.int64), [bytes(32)], [])
    assert not vector.any()
