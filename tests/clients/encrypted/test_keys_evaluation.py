"""Evaluation keys over the wire: what they do on SEAL's side, and what of a stranger's never gets there."""

import pickle

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st

from clients.encrypted.key_frames import EvaluationKeys, evaluation_bytes
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.ring import Ring
from strategies.ckks import CiphertextError

ELEMENTS = (2 * 8192 - 1, 5, 9, 17, 8193)
SMALL, FEW = Ring(4096, (54, 55)), (5, 4097)
SCALE = 2.0**40


@pytest.fixture(
    scope="module", params=[(60, 52, 60), (56, 55, 54, 53)], ids=["cross-entropy", "strict"]
)
def keys(request):
    return OwnerKeys.generate(Ring(8192, request.param))


@pytest.fixture(scope="module")
def evaluation(keys):
    """Keys as the compute party has them."""
    return EvaluationKeys.from_arrays(sent(keys.evaluation(ELEMENTS)), keys.ring, ELEMENTS)


@pytest.fixture(scope="module")
def few():
    return OwnerKeys.generate(SMALL).evaluation(FEW).to_arrays()


def sent(keys):
    """Through Flower's own records."""
    return {name: Array(array).numpy() for name, array in keys.to_arrays().items()}


def encrypt(keys, values):
    seal, context = keys.ring.seal, keys.ring.context
    plaintext, ciphertext = seal.Plaintext(), seal.Ciphertext()
    seal.CKKSEncoder(context).encode(values.tolist(), SCALE, plaintext)
    seal.Encryptor(context, keys.seal_key()).encrypt_symmetric(plaintext, ciphertext)
    return ciphertext


def decrypt(keys, ciphertext):
    seal, context = keys.ring.seal, keys.ring.context
    plaintext = seal.Plaintext()
    seal.Decryptor(context, keys.seal_key()).decrypt(ciphertext, plaintext)
    return np.array(seal.CKKSEncoder(context).decode_complex(plaintext))


def permuted(values, element, degree):
    """The slots of p(X^g) from those of p: slot j is the value at the root ζ^(3^j), conjugates at its inverse."""
    exponents = np.array([pow(3, j, 2 * degree) for j in range(degree // 2)])
    at = np.empty(2 * degree, np.complex128)
    at[exponents], at[2 * degree - exponents] = values, values.conj()
    return at[exponents * element % (2 * degree)]


def test_keys_from_the_wire_relinearise_a_square(keys, evaluation):
    values = np.random.default_rng(0).uniform(-1, 1, keys.ring.slots)
    relinearisation, _ = evaluation.seal(keys.ring)
    evaluator, ciphertext = keys.ring.seal.Evaluator(keys.ring.context), encrypt(keys, values)
    evaluator.square_inplace(ciphertext)
    evaluator.relinearize_inplace(ciphertext, relinearisation)
    assert ciphertext.size() == 2
    np.testing.assert_allclose(decrypt(keys, ciphertext), values**2, atol=1e-4)


@pytest.mark.parametrize("element", ELEMENTS)
def test_keys_from_the_wire_permute(keys, evaluation, element):
    rng = np.random.default_rng(1)
    values = rng.uniform(-1, 1, keys.ring.slots) + 1j * rng.uniform(-1, 1, keys.ring.slots)
    _, galois = evaluation.seal(keys.ring)
    ciphertext = encrypt(keys, values)
    keys.ring.seal.Evaluator(keys.ring.context).apply_galois_inplace(ciphertext, element, galois)
    wanted = permuted(values, element, keys.ring.degree)
    np.testing.assert_allclose(decrypt(keys, ciphertext), wanted, atol=1e-4)


def test_exactly_the_automorphisms_that_were_asked_for_are_there(keys, evaluation):
    _, galois = evaluation.seal(keys.ring)
    there = [one for one in range(3, 2 * keys.ring.degree, 2) if galois.has_key(one)]
    assert there == sorted(ELEMENTS) == list(evaluation.elements)


def test_keys_of_no_automorphism_relinearise_alone():
    keys = OwnerKeys.generate(SMALL)
    relinearisation, galois = EvaluationKeys.from_arrays(sent(keys.evaluation(())), SMALL, ()).seal(
        SMALL
    )
    assert (relinearisation.size(), galois.size()) == (1, 0)


def test_their_bytes_are_known_beforehand_and_half_of_seals(keys, evaluation):
    arrays = evaluation.to_arrays()
    assert sum(array.nbytes for array in arrays.values()) == evaluation_bytes(keys.ring, ELEMENTS)
    relinearisation, _ = evaluation.seal(keys.ring)
    whole = sum(
        len(row) * 2 * 8 * len(keys.ring.bits) * keys.ring.degree for row in relinearisation.data()
    )
    assert 0.5 < (arrays["first"][0].nbytes + arrays["seeds"][0].nbytes) / whole < 0.501


def test_no_second_component_is_zero(keys, evaluation):
    """Of such a key, the first component would be the secret."""
    relinearisation, galois = evaluation.seal(keys.ring)
    for table in (relinearisation, galois):
        for row in table.data():
            assert not any(key.data().is_transparent() for key in row)


def test_keys_go_to_a_worker_as_they_are(keys, evaluation):
    again = pickle.loads(pickle.dumps(evaluation))
    assert (again.digest, again.fingerprint) == (evaluation.digest, keys.fingerprint)


def test_keys_of_another_ring_are_not_handed_to_seal(evaluation):
    with pytest.raises(CiphertextError, match="another ring"):
        evaluation.seal(SMALL)


@pytest.mark.parametrize("element", [1, 4, -3, 8193, 10**9])
def test_what_is_no_automorphism_is_refused_on_both_sides(few, element):
    with pytest.raises(ValueError, match="Galois element"):
        OwnerKeys.generate(SMALL).evaluation([element])
    with pytest.raises(ValueError, match="Galois element"):
        EvaluationKeys.from_arrays(few, SMALL, [element])


# ---- what strangers send ----


def refused(arrays, which):
    with pytest.raises(CiphertextError, match=which):
        EvaluationKeys.from_arrays(arrays, SMALL, FEW)


@given(data=st.data(), name=st.sampled_from(["elements", "fingerprint", "first", "seeds"]))
def test_an_array_of_another_shape_or_type_is_refused_by_name(few, data, name):
    array = few[name]
    broken = data.draw(
        st.sampled_from(
            [
                array[:-1],
                array[..., :-1],
                np.concatenate([array, array]),
                array[None],
                array.reshape(-1)[None],
                array.astype(np.int64),
                array.astype(np.float64),
                array.astype(">u8"),
                array.astype(object),
                array.astype(np.uint32),
                np.zeros((), np.uint64),
                np.zeros((0, *array.shape[1:]), np.uint64),
                np.broadcast_to(np.uint64(0), (1 << 40,)),
                array.tobytes(),
                array.tolist()[:1],
                None,
            ]
        )
    )
    refused(few | {name: broken}, f"array {name}")


@given(
    key=st.integers(0, len(FEW)),
    prime=st.integers(0, 1),
    place=st.integers(0, SMALL.degree - 1),
    beyond=st.integers(0, 2**64 - 1),
)
def test_a_residue_that_is_not_below_its_prime_is_refused_with_its_key(
    few, key, prime, place, beyond
):
    first = few["first"].copy()
    first[key, 0, prime, place] = max(beyond, SMALL.primes[prime])
    which = f"key of Galois element {FEW[key - 1]}" if key else "relinearisation key"
    refused(few | {"first": first}, f"array first, {which}: a residue is not below")


@given(
    key=st.integers(0, len(FEW)),
    prime=st.integers(0, 1),
    place=st.integers(0, SMALL.degree - 1),
    below=st.integers(0, min(SMALL.primes) - 1),
)
def test_any_residue_below_its_prime_is_taken_by_seal(few, key, prime, place, below):
    """What passes here can't be refused, or worse, later: keys that are wrong only compute what is wrong."""
    first = few["first"].copy()
    first[key, 0, prime, place] = below
    relinearisation, galois = EvaluationKeys.from_arrays(few | {"first": first}, SMALL, FEW).seal(
        SMALL
    )
    assert (relinearisation.size(), galois.size()) == (1, len(FEW))


def test_arrays_that_lack_or_are_too_many_are_refused(few):
    refused({name: array for name, array in few.items() if name != "seeds"}, "lacks.*seeds")
    refused(few | {"secret": np.zeros((2, 4096), np.uint64)}, "1 others")
    refused({}, "lacks")
    refused({3: few["first"]}, "lacks")


def test_keys_for_other_automorphisms_than_were_asked_for_are_refused(few):
    refused(few | {"elements": np.array([5, 9], np.uint64)}, "array elements")
    refused(few | {"elements": few["elements"][::-1]}, "array elements")


def test_a_secret_key_has_no_place_among_the_arrays(few):
    """Its polynomial is (primes, N); every array has another shape."""
    keys = OwnerKeys.generate(SMALL)
    secret = np.zeros((len(SMALL.bits), SMALL.degree), np.uint64)
    for name in few:
        refused(few | {name: secret}, f"array {name}: shape")
    with pytest.raises(CiphertextError):
        EvaluationKeys.from_arrays({"secret": keys}, SMALL, FEW)
