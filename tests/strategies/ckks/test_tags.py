"""Tags: they add up as ciphertexts do, and only for the members and the ciphertexts that they are of."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.ckks import CkksParameters, Member, Tagger, add_tags

MODULUS = CkksParameters().modulus


def residues(seed: int, ciphertexts: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, MODULUS, (ciphertexts, 2, 4096), np.uint64)


def member(client: int) -> Member:
    return Member(client, bytes([client]) * 16)


def summed(tagger: Tagger, count: int):
    uploads = [residues(client) for client in range(count)]
    total, tag = np.zeros_like(uploads[0]), bytes(16)
    for client, upload in enumerate(uploads):
        total = (total + upload) % np.uint64(MODULUS)
        tag = add_tags(tag, tagger.tag(upload, member(client)), MODULUS)
    return total, [member(client) for client in range(count)], tag


@settings(max_examples=10, deadline=None)
@given(count=st.integers(1, 6))
def test_tags_of_uploads_add_up_to_that_of_their_sum(key, count):
    tagger = Tagger(key, b"session", MODULUS)
    assert tagger.verify(*summed(tagger, count))


def test_products_are_exact(key):
    """Against whole numbers of any length, at the largest residues there are."""
    tagger = Tagger(key, b"session", MODULUS)
    largest = np.full((2, 2, 4096), MODULUS - 1, np.uint64)
    from strategies.ckks.tags import keystream

    weights = np.frombuffer(keystream(tagger._weights[0], 4 * largest.size), "<u4")
    assert tagger._products(largest)[0] == (MODULUS - 1) * sum(map(int, weights))


def test_what_was_changed_is_refused(key, other_key):
    tagger = Tagger(key, b"session", MODULUS)
    total, members, tag = summed(tagger, 3)
    changed = total.copy()
    changed[0, 1, 17] ^= np.uint64(1)
    twice = (total + total) % np.uint64(MODULUS)
    forged = (
        (changed, members, tag),
        (twice, members, add_tags(tag, tag, MODULUS)),  # k times the sum
        (twice, members * 2, add_tags(tag, tag, MODULUS)),
        (residues(0), members, tag),  # one client's upload in place of the sum
        (residues(0), members[:1], tag),
        (total, members[:2], tag),
        (total, [*members, member(9)], tag),
        (total, [Member(0, b"another nonce..."), *members[1:]], tag),
        (total, members, bytes(16)),
        (total, members, tag[:8]),
    )
    assert tagger.verify(total, members, tag)
    assert not any(tagger.verify(*attempt) for attempt in forged)
    assert not Tagger(key, b"another", MODULUS).verify(total, members, tag)
    assert not Tagger(other_key, b"session", MODULUS).verify(total, members, tag)


def test_a_client_counts_once(key):
    """Even where it has uploaded twice to one session."""
    tagger = Tagger(key, b"session", MODULUS)
    one, two = Member(1, bytes(16)), Member(1, b"x" * 16)
    total = (residues(1) + residues(2)) % np.uint64(MODULUS)
    tag = add_tags(tagger.tag(residues(1), one), tagger.tag(residues(2), two), MODULUS)
    assert not tagger.verify(total, [one, two], tag)


@pytest.mark.parametrize("degree", [4096, 8192])
def test_both_rings_fit_the_blocks(key, degree):
    tagger = Tagger(key, b"session", MODULUS)
    whole = np.zeros((3, 2, degree), np.uint64)
    assert tagger.verify(whole, [member(1)], tagger.tag(whole, member(1)))
