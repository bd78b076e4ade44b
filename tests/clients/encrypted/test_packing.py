"""Where numbers lie in ciphertexts, and that packed means are right, apart from each other, and all that is told."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from clients.encrypted.packing import Packer, Slots, encode
from clients.encrypted.ring import Desk, Ring, centred
from tests.support.encrypted import coefficients, keys_of

RING = Ring(4096, (54, 55))
PRIME = RING.primes[0]
COPIES = (1, 2, 8)
SCALE = 2.0**30
FALSE_ALARM = 1e-6


@pytest.mark.parametrize("copies", COPIES)
def test_slots_are_seals(copies):
    slots, desk, rng = Slots(RING, copies), Desk(RING), np.random.default_rng(copies)
    values = rng.normal(size=(slots.samples, 2 * copies))
    for vector in (slots.packed(values), slots.repeated(values[:, 0]), slots.pair(*values.T[:2])):
        plaintext = encode(RING, vector, SCALE, 1)
        whole = desk.transformed(desk.plain_residues(plaintext, 1), back=True)[0]
        exact = coefficients(RING, vector) * SCALE
        assert np.abs(centred(whole, PRIME) - exact).max() < 0.51


@given(
    copies=st.sampled_from(COPIES),
    count=st.integers(1, 40),
    numbers=st.integers(1, 16),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25)
def test_means_of_a_packed_vector_times_a_repeated_one_are_2b_coefficients(
    copies, count, numbers, seed
):
    slots, rng = Slots(RING, copies), np.random.default_rng(seed)
    numbers = min(numbers, 2 * copies)
    packed, repeated = rng.normal(size=(count, numbers)), rng.normal(size=count)
    whole = coefficients(RING, slots.packed(packed) * slots.repeated(repeated))
    found = slots.means(whole[slots.places(1)[0]]) * slots.samples / count
    wanted = np.zeros(2 * copies)
    wanted[:numbers] = packed.T @ repeated / count
    np.testing.assert_allclose(found, wanted, atol=1e-10)


@pytest.mark.parametrize("copies", COPIES)
def test_a_mask_puts_a_repeated_vector_in_its_place_and_x_to_the_half_is_plus_or_minus_j(copies):
    slots, rng = Slots(RING, copies), np.random.default_rng(0)
    values = rng.normal(size=(slots.samples, 2 * copies))
    total = sum(slots.mask(f) * slots.repeated(values[:, f]) for f in range(2 * copies))
    np.testing.assert_allclose(total, slots.packed(values), atol=1e-12)
    np.testing.assert_allclose(slots.second**2, -1, atol=1e-12)


@given(copies=st.sampled_from((1, 2, 8, 32)), leaves=st.integers(1, 2048))
def test_places_of_leaves_are_disjoint(copies, leaves):
    slots = Slots(RING, copies)
    leaves = min(leaves, slots.most_leaves)
    places = slots.places(leaves)
    assert places.shape == (leaves, 2 * copies)
    assert len(np.unique(places)) == places.size
    assert 0 <= places.min() <= places.max() < RING.degree


class Party:
    """A packer with keys of its own, and the owner's eyes."""

    def __init__(self, copies):
        self.slots, self.desk = Slots(RING, copies), Desk(RING)
        keys = keys_of(RING)
        first = self.slots.first
        elements = [(1 << level) + 1 for level in range(first, RING.degree.bit_length())]
        _, galois = keys.evaluation(elements).seal(RING)
        self.packer = Packer(self.slots, self.desk, galois)
        self.encryptor = RING.seal.Encryptor(RING.context, keys.seal_key())
        self.decryptor = RING.seal.Decryptor(RING.context, keys.seal_key())
        self.evaluator = RING.seal.Evaluator(RING.context)

    def leaf(self, vector, shrink):
        """An encrypted product, made smaller by what the tree enlarges."""
        made = RING.seal.Ciphertext()
        self.encryptor.encrypt_symmetric(encode(RING, vector, SCALE, 1), made)
        self.evaluator.multiply_plain_inplace(made, shrink)
        return made

    def pack(self, products, bits=8):
        """One ciphertext of them."""
        shrink = self.packer.shrink(len(products), bits)
        return self.packer.pack([partial(self.leaf, vector, shrink) for vector in products])

    def seen(self, packed):
        """What the owner decrypts: coefficients, centred."""
        plaintext = RING.seal.Plaintext()
        self.decryptor.decrypt(packed, plaintext)
        whole = self.desk.transformed(self.desk.plain_residues(plaintext, 1), back=True)[0]
        return centred(whole, PRIME)


@pytest.fixture(scope="module")
def parties():
    return {copies: Party(copies) for copies in COPIES}


@given(copies=st.sampled_from(COPIES), leaves=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=12)
def test_means_are_right_for_any_number_of_leaves(parties, copies, leaves, seed):
    party, rng = parties[copies], np.random.default_rng(seed)
    slots = party.slots
    packed = rng.normal(size=(slots.samples, 2 * copies))
    units = rng.normal(size=(leaves, slots.samples))
    products = [slots.packed(packed) * slots.repeated(unit) for unit in units]
    found = party.pack(products)
    assert found.scale == SCALE * 2.0**8
    useful = party.seen(found)[slots.places(leaves)] / found.scale
    np.testing.assert_allclose(slots.means(useful), units @ packed / slots.samples, atol=2e-5)


def test_a_full_tree_and_one_with_a_leaf_more_than_a_power_of_two(parties):
    party = parties[8]
    slots, rng = party.slots, np.random.default_rng(5)
    assert slots.most_leaves == 256
    numbers = rng.normal(size=(256, 16))
    ones = np.ones((slots.samples, 1))
    products = [slots.packed(ones * row) for row in numbers]
    for leaves in (129, 256):
        seen = party.seen(party.pack(products[:leaves]))
        found = slots.means(seen[slots.places(leaves)] / (SCALE * 2.0**8))
        np.testing.assert_allclose(found, numbers[:leaves], atol=1e-4)


@pytest.mark.parametrize(("copies", "leaves"), [(1, 3), (2, 16), (8, 1), (8, 33)])
def test_what_is_no_mean_is_uniform_and_new_each_time(parties, copies, leaves):
    """Kolmogorov and Smirnov; a false alarm once in a million for each of the two tests."""
    party, rng = parties[copies], np.random.default_rng(leaves)
    slots = party.slots
    products = [slots.packed(rng.normal(size=(slots.samples, 2 * copies))) for _ in range(leaves)]
    first, second = (party.seen(party.pack(products)) for _ in range(2))
    hidden = np.setdiff1d(np.arange(RING.degree), slots.places(leaves))
    assert len(hidden) > RING.degree / 4
    for seen in (first, second - first):
        assert kstest(seen[hidden] % PRIME / PRIME, "uniform").pvalue > FALSE_ALARM
    # The same means, apart from the noise of encryptions.
    useful = slots.places(leaves)
    assert np.abs(first[useful] - second[useful]).max() < SCALE / 2**10 * 2**8


def test_what_is_masked_would_tell_without_the_mask(parties, monkeypatch):
    """The test above can fail: sums of single samples stand in those coefficients."""
    party, rng = parties[8], np.random.default_rng(1)
    monkeypatch.setattr(party.packer, "_hide", lambda packed, leaves: None)
    slots = party.slots
    seen = party.seen(party.pack([slots.packed(rng.normal(size=(slots.samples, 16)))]))
    hidden = np.setdiff1d(np.arange(RING.degree), slots.places(1))
    assert kstest(seen[hidden] % PRIME / PRIME, "uniform").pvalue < FALSE_ALARM


def test_a_tree_that_fills_the_ring_has_nothing_to_mask(parties):
    party = parties[8]
    slots = party.slots
    places = slots.places(slots.most_leaves)
    assert np.array_equal(np.sort(places.reshape(-1)), np.arange(RING.degree))
