"""Vectors there and back through SEAL: what a sum is worth, what is refused, and what its noise is."""

import math
import subprocess
import sys

import numpy as np
import pytest
import tenseal
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri

from strategies.ckks import (
    Cipher,
    CiphertextError,
    CkksParameters,
    SecretKeyError,
    SharedKey,
    Sum,
    public_only,
)
from strategies.ckks.parameters import ring
from strategies.ckks.vectors import _uniform, sum_residues


def total(parameters: CkksParameters, key: SharedKey, vectors) -> bytes:
    cipher, added = Cipher(parameters, key), Sum(parameters, len(vectors[0]))
    for vector in vectors:
        added.add(cipher.encrypt(vector).blob)
    return added.to_bytes()


@settings(max_examples=12, deadline=None)
@given(size=st.integers(1, 9000), seed=st.integers(0, 2**32 - 1), count=st.integers(1, 4))
def test_a_sum_is_that_of_the_vectors_within_its_error(key, size, seed, count):
    parameters = CkksParameters()
    vectors = np.random.default_rng(seed).uniform(-1, 1, (count, size)).astype(np.float32)
    released = Cipher(parameters, key).release(total(parameters, key, vectors), size)
    assert released.shape == (size,)
    assert np.abs(released - vectors.sum(0, dtype=np.float64)).max() <= parameters.error


def test_with_its_defaults_the_error_is_below_6e_7_for_a_hundred_members():
    assert CkksParameters().members == 100
    assert CkksParameters().error <= 6e-7


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("limit", [2.0**-10, 1.0, 37.0])
@pytest.mark.parametrize("members", [2, 100])
def test_a_full_sum_of_extreme_values_does_not_wrap_round(parameters, keys, sign, limit, members):
    """All slots equal is the worst case: then one coefficient holds them all."""
    parameters = CkksParameters(parameters.degree, parameters.bits, members, limit)
    cipher, added = Cipher(parameters, keys), Sum(parameters, parameters.degree)
    blob = cipher.encrypt(np.full(parameters.degree, sign * limit, np.float32)).blob
    for _ in range(members):
        added.add(blob)
    released = cipher.release(added.to_bytes(), parameters.degree)
    # One ciphertext that often has its noise that often too, where honest ones' add up by squares.
    allowed = parameters.error * math.sqrt(members)
    assert np.abs(released - sign * limit * members).max() <= allowed
    with pytest.raises(CiphertextError, match="full"):
        added.add(blob)


def test_a_larger_scale_would_wrap_round(key):
    parameters = CkksParameters(members=2, limit=1.0)
    room = parameters.modulus / 2
    assert 0.999 < math.sqrt(2) * 2 * parameters.scale / room < 1
    assert CkksParameters(members=2, limit=2.0**-20).scale == parameters.scale


def test_values_beyond_the_limit_are_cut_and_counted(key):
    parameters = CkksParameters(limit=0.5)
    vector = np.array([0.4, -0.5, 0.6, -3.0, 0.1], np.float32)
    encrypted = Cipher(parameters, key).encrypt(vector)
    assert encrypted.saturated == 2
    added = Sum(parameters, 5)
    added.add(encrypted.blob)
    released = Cipher(parameters, key).release(added.to_bytes(), 5)
    np.testing.assert_allclose(released, [0.4, -0.5, 0.5, -0.5, 0.1], atol=parameters.error)


def test_the_factor_multiplies_before_the_limit(key):
    encrypted = Cipher(CkksParameters(), key).encrypt(np.array([1.5], np.float32), 0.5)
    assert encrypted.saturated == 0


@pytest.mark.parametrize("vector", [[np.nan], [np.inf, 0], []])
def test_what_is_not_finite_is_not_encrypted(key, vector):
    with pytest.raises(ValueError, match="finite"):
        Cipher(CkksParameters(), key).encrypt(np.array(vector, np.float32))


def test_a_fresh_ciphertext_takes_eight_bytes_a_value(key):
    parameters = CkksParameters()
    blob = Cipher(parameters, key).encrypt(np.zeros(40_960, np.float32)).blob
    assert len(blob) == parameters.upload_bytes(40_960)
    assert len(blob) / 40_960 < 8.03


def test_two_encryptions_of_the_same_vector_differ(key):
    cipher = Cipher(CkksParameters(), key)
    assert cipher.encrypt(np.ones(3)).blob != cipher.encrypt(np.ones(3)).blob


# ---- hostile bytes ----


def test_bytes_of_another_length_are_refused(parameters, keys):
    added = Sum(parameters, 10)
    blob = Cipher(parameters, keys).encrypt(np.ones(10)).blob
    # One byte less or more, none, three components' worth, and two primes' worth of a higher level.
    for bad in (blob[:-1], blob + b"\0", b"", blob + bytes(8 * parameters.degree), blob * 2):
        with pytest.raises(CiphertextError, match="bytes came"):
            added.add(bad)
    assert added.members == 0


def test_ciphertexts_of_other_parameters_are_refused():
    small, large = CkksParameters(4096), CkksParameters(8192)
    blob = Cipher(small, SharedKey.generate(small)).encrypt(np.ones(10)).blob
    with pytest.raises(CiphertextError, match="bytes came"):
        Sum(large, 10).add(blob)
    # The same length under a smaller prime: residues of the larger one are not below it.
    narrow = CkksParameters(4096, (50,))
    with pytest.raises(CiphertextError, match="modulus"):
        Sum(narrow, 10).add(blob)


def test_residues_that_are_not_below_the_modulus_are_refused(key):
    parameters = CkksParameters()
    blob = bytearray(Cipher(parameters, key).encrypt(np.ones(10)).blob)
    blob[:8] = parameters.modulus.to_bytes(8, "little")
    with pytest.raises(CiphertextError, match="modulus"):
        Sum(parameters, 10).add(bytes(blob))
    whole = np.zeros((1, 2, 4096), "<u8")
    whole[0, 1, 7] = parameters.modulus
    with pytest.raises(CiphertextError, match="modulus"):
        Cipher(parameters, key).release(whole.tobytes(), 10)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_flipped_bits_are_refused_or_give_another_sum_and_never_more(key, data):
    parameters = CkksParameters()
    blob = bytearray(Cipher(parameters, key).encrypt(np.ones(10)).blob)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(blob) - 1))
        blob[at] ^= 1 << data.draw(st.integers(0, 7))
    added = Sum(parameters, 10)
    try:
        added.add(bytes(blob))
    except CiphertextError:
        assert added.members == 0
    else:
        assert len(sum_residues(parameters, added.to_bytes(), 10)) == 1


def test_a_refused_upload_leaves_the_sum_as_it_was(key):
    parameters = CkksParameters()
    added, cipher = Sum(parameters, 2), Cipher(parameters, key)
    added.add(cipher.encrypt(np.array([0.5, 0.25])).blob)
    before = added.to_bytes()
    with pytest.raises(CiphertextError):
        added.add(b"\xff" * parameters.upload_bytes(2))
    assert (added.to_bytes(), added.members) == (before, 1)


def test_a_sum_of_nothing_is_not_sent():
    with pytest.raises(ValueError, match="no ciphertexts"):
        Sum(CkksParameters(), 3).to_bytes()


# ---- the key stays with the clients ----


def test_another_key_opens_nothing(key, other_key):
    parameters = CkksParameters()
    blob = total(parameters, key, np.full((3, 100), 0.5, np.float32))
    found = Cipher(parameters, other_key).release(blob, 100)
    assert np.abs(found - 1.5).min() > 0.01


def test_a_key_of_another_ring_is_refused(key):
    with pytest.raises(ValueError, match="degree and bits"):
        Cipher(CkksParameters(8192), key)


def test_a_context_with_a_secret_key_is_no_server_context(key):
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 60])
    for private in (context, key, Cipher(CkksParameters(), key)):
        with pytest.raises(SecretKeyError, match="must not hold the secret key"):
            public_only(private)
        with pytest.raises(SecretKeyError):
            Sum(private, 10)
    context.make_context_public()
    public_only(context)
    public_only(CkksParameters())


def test_a_server_that_adds_never_meets_a_secret_key(key, tmp_path):
    """A process that does the server's part: nothing of SEAL's that holds or uses a key is ever made in it."""
    parameters = CkksParameters()
    (tmp_path / "blob").write_bytes(Cipher(parameters, key).encrypt(np.ones(5)).blob)
    script = """
import pathlib, sys
from tenseal import sealapi
class Met(Exception): pass
def refuse(*_, **__): raise Met
for name in ("SecretKey", "KeyGenerator", "Decryptor", "Encryptor"):
    setattr(sealapi, name, refuse)
from strategies.ckks import CkksParameters, Sum
total = Sum(CkksParameters(), 5)
blob = pathlib.Path(sys.argv[1]).read_bytes()
total.add(blob); total.add(blob)
assert len(total.to_bytes()) == CkksParameters().sum_bytes(5)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "blob")], check=True)


def test_tenseal_is_imported_by_those_who_encrypt_only():
    script = "import sys, strategies, strategies.collectors, strategies.ckks; assert 'tenseal' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


# ---- the noise of what is released ----


def test_the_same_sum_is_released_with_the_same_noise_by_all(key, tmp_path):
    parameters = CkksParameters()
    blob = total(parameters, key, np.full((2, 500), 0.25, np.float32))
    key.save(tmp_path / "key")
    again = Cipher(parameters, SharedKey.load(tmp_path / "key"))
    ours = Cipher(parameters, key)
    assert np.array_equal(ours.release(blob, 500), again.release(blob, 500))


def test_another_sum_or_key_has_other_noise(key, other_key):
    parameters = CkksParameters()
    one, two = (total(parameters, key, np.zeros((2, 500), np.float32)) for _ in range(2))
    ours = Cipher(parameters, key)
    assert abs(np.corrcoef(ours._flood(one, 500), ours._flood(two, 500))[0, 1]) < 0.3
    theirs = Cipher(parameters, other_key)
    assert abs(np.corrcoef(ours._flood(one, 500), theirs._flood(one, 500))[0, 1]) < 0.3


def test_the_noise_is_gaussian_of_the_stated_deviation(key):
    """A false alarm once in 10^6: Kolmogorov-Smirnov's p-value and the chi-square range of the variance."""
    from scipy import stats

    parameters, size = CkksParameters(), 200_000
    blob = total(parameters, key, np.zeros((1, size), np.float32))
    cipher = Cipher(parameters, key)
    assert stats.kstest(cipher._flood(blob, size) / parameters.flooding, "norm").pvalue > 5e-7
    noise = (cipher.release(blob, size) - cipher.decrypt(blob, size)) / parameters.flooding
    # Rounding to the grid adds its own variance.
    expected = size * (1 + (parameters.grid / parameters.flooding) ** 2 / 12)
    low, high = stats.chi2.ppf([2.5e-7, 1 - 2.5e-7], size)
    assert low < float(noise @ noise) * size / expected < high


def test_the_error_is_within_the_bound_that_the_noise_is_scaled_to(parameters, keys):
    """The L2 norm of one ciphertext's error, the exact sum being known; all 100 members' noise is in it."""
    cipher, added = Cipher(parameters, keys), Sum(parameters, parameters.degree)
    rng, exact = np.random.default_rng(1), np.zeros(parameters.degree)
    for _ in range(100):
        vector = rng.uniform(-1, 1, parameters.degree).astype(np.float32)
        added.add(cipher.encrypt(vector).blob)
        exact += vector
    error = np.linalg.norm(cipher.decrypt(added.to_bytes(), parameters.degree) - exact)
    assert error <= parameters.noise_norm
    assert error >= parameters.noise_norm / 10  # and the bound is not a waste
    assert parameters.flooding == pytest.approx(
        math.sqrt(12 * 4096) * 2**2.5 * parameters.noise_norm
    )


def test_what_is_released_lies_on_the_grid(key):
    parameters = CkksParameters()
    released = Cipher(parameters, key).release(
        total(parameters, key, np.full((1, 9), 0.3, np.float32)), 9
    )
    steps = released / parameters.grid
    assert np.array_equal(steps, np.round(steps))
    assert parameters.flooding / 16 < parameters.grid <= parameters.flooding / 8


def test_rings_are_made_once(parameters):
    assert ring(*parameters.ring) is ring(*parameters.ring)


def test_no_word_of_the_keystream_gives_noise_without_bound():
    words = np.array([0, 1 << 11, 1 << 63, 2**64 - 1], np.uint64)
    noise = ndtri(_uniform(words))
    assert np.isfinite(noise).all()
    assert (np.diff(noise) > 0).all()
    assert np.abs(noise).max() < 9


def test_two_scales_of_flooding_are_not_the_same_noise() -> None:
    """Else the difference of two releases would give the noise, and with it the exact sum."""
    key = SharedKey.generate()
    quiet, loud = CkksParameters(noise_bits=2.0), CkksParameters(noise_bits=6.0)
    sums = Sum(quiet, 512)
    sums.add(Cipher(quiet, key).encrypt(np.zeros(512)).blob)
    blob = sums.to_bytes()
    first, second = (Cipher(p, key).release(blob, 512) for p in (quiet, loud))
    # Independent: the correlation of 512 pairs is beyond 0.3 once in 10^11.
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.3
