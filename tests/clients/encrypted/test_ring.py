"""Rings: none is weaker than the standard's table or SEAL's own, and residues come through SEAL unchanged."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.encrypted.ring import Desk, Ring, centred, in_range
from strategies.ckks.streams import CiphertextError

STANDARD = {4096: 109, 8192: 218, 16384: 438}
"""Albrecht et al. 2018, Table 1: log2 q of 128-bit security, ternary secret, classical attacks."""
RING = Ring(4096, (54, 55))


@pytest.mark.parametrize(
    ("degree", "bits"),
    [
        (4096, (55, 55)),
        (8192, (60, 60, 60, 39)),
        (16384, (60,) * 7 + (30,)),
        (8192, (60, 52, 60, 60)),
    ],
)
def test_a_ring_beyond_the_standards_table_is_refused_with_the_mend(degree, bits):
    assert sum(bits) > STANDARD[degree]
    with pytest.raises(ValueError, match=rf"at most {STANDARD[degree]}.*larger degree"):
        Ring(degree, bits)


def test_the_table_is_no_laxer_than_seals():
    seal = RING.seal
    for degree, most in STANDARD.items():
        assert most <= seal.CoeffModulus.MaxBitCount(degree, seal.SEC_LEVEL_TYPE.TC128)


@pytest.mark.parametrize(
    ("degree", "bits", "told"),
    [
        (2048, (27, 27), "one of"),
        (32768, (60, 60), "one of"),
        (5000, (54, 55), "one of"),
        (4096, (54,), "two primes"),
        (4096, (), "two primes"),
        (8192, (61, 60), "30 to 60"),
        (8192, (60, 29), "30 to 60"),
    ],
)
def test_what_is_no_ring_is_refused(degree, bits, told):
    with pytest.raises(ValueError, match=told):
        Ring(degree, bits)


def test_a_ring_travels_without_seals_objects():
    ring = Ring(8192, (60, 52, 60))
    again = pickle.loads(pickle.dumps(ring))
    assert again == ring
    assert again.primes == ring.primes
    assert ring.slots == 4096
    assert ring.levels == 2
    assert [prime.bit_length() for prime in ring.primes] == [60, 52, 60]
    assert all(prime % (2 * ring.degree) == 1 for prime in ring.primes)


@given(level=st.integers(1, 2), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_residues_come_through_seal_unchanged(level, seed):
    ring = Ring(8192, (60, 52, 60))
    rng, desk = np.random.default_rng(seed), Desk(ring)
    primes = np.array(ring.primes[:level], np.uint64)[:, None]
    residues = rng.integers(0, primes, (2, level, ring.degree), dtype=np.uint64)
    ciphertext = desk.ciphertext(residues, 2.0**20)
    assert ciphertext.coeff_modulus_size() == level
    assert ciphertext.scale == 2.0**20
    np.testing.assert_array_equal(desk.residues(ciphertext), residues)
    plaintext = desk.plaintext(residues[0])
    np.testing.assert_array_equal(desk.plain_residues(plaintext, level), residues[0])


@given(position=st.integers(0, RING.degree - 1), value=st.integers(1, 2**40))
@settings(max_examples=10)
def test_a_monomial_transforms_to_powers_of_a_root_and_back(position, value):
    desk, prime = Desk(RING), RING.primes[0]
    whole = np.zeros((1, RING.degree), np.uint64)
    whole[0, position] = value
    moved = desk.transformed(whole)
    # Each is value times a root of X^N + 1 to the position: its N-th power is value^N (-1)^position.
    chosen = [0, 1, RING.degree // 2, RING.degree - 1]
    found = {pow(int(moved[0, at]), RING.degree, prime) for at in chosen}
    assert found == {pow(value, RING.degree, prime) * (-1) ** position % prime}
    np.testing.assert_array_equal(desk.transformed(moved, back=True), whole)


def test_nothing_transforms_to_nothing():
    nothing = np.zeros((1, RING.degree), np.uint64)
    assert not Desk(RING).transformed(nothing).any()
    assert not Desk(RING).transformed(nothing, back=True).any()


def test_constants_multiply_residues():
    ring = Ring(8192, (60, 52, 60))
    desk, rng = Desk(ring), np.random.default_rng(0)
    primes = np.array(ring.primes[:2], np.uint64)[:, None]
    residues = rng.integers(0, primes, (2, 2, ring.degree), dtype=np.uint64)
    ciphertext = desk.ciphertext(residues, 1.0)
    ring.seal.Evaluator(ring.context).multiply_plain_inplace(ciphertext, desk.constant([7, 11]))
    factors = np.array([7, 11], object)[:, None]
    wanted = residues.astype(object) * factors % primes.astype(object)
    np.testing.assert_array_equal(desk.residues(ciphertext).astype(object), wanted)


@pytest.mark.parametrize("shape", [(2, 1, 2048), (2, 2, 4096), (2, 0, 4096)])
def test_residues_of_another_ring_make_no_ciphertext(shape):
    with pytest.raises(CiphertextError, match="none of"):
        Desk(RING).ciphertext(np.zeros(shape, np.uint64), 1.0)


def test_residues_beyond_their_prime_are_refused_by_name():
    ring = Ring(8192, (60, 52, 60))
    residues = np.zeros((3, 2, 2, ring.degree), np.uint64)
    residues[:, :, 0] = ring.primes[0] - 1
    in_range(residues, ring, "mine")
    residues[2, 1, 1, -1] = ring.primes[1]  # fits the first prime, and not its own
    with pytest.raises(CiphertextError, match="mine: a residue is not below its prime"):
        in_range(residues, ring, "mine")


@given(st.lists(st.integers(-(2**52), 2**52), min_size=1))
def test_centred_residues_are_the_integers_nearest_to_zero(values):
    prime = RING.primes[0]
    residues = np.array([value % prime for value in values], np.uint64)
    np.testing.assert_array_equal(centred(residues, prime), values)
    assert centred(np.array([prime // 2, prime // 2 + 1], np.uint64), prime).tolist() == [
        prime // 2, -(prime // 2),
    ]  # fmt: skip
