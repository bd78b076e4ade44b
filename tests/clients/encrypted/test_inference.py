"""Encrypted predictions are the plaintext's, nothing wraps round, and only who has the key can read them."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.encrypted.inference import EncryptedInference, multiplied
from clients.encrypted.inference_key import InferenceKey
from clients.encrypted.inference_plan import (
    HEADROOM_BITS,
    HeadroomError,
    InferencePlan,
    Polynomial,
    Terms,
    fitted,
    plan,
)
from clients.encrypted.model_file import TrainedModel
from clients.encrypted.ring import Ring
from clients.tasks.mnist import Mnist
from strategies.ckks.streams import CiphertextError
from tests.support.polynomial import logits, trained

SQUARE, CUBIC = (0.0, 0.0, 1.0), (0.25, 1.0, 0.5, 1 / 6)


def polynomial(*sizes: int, activation=SQUARE, bound: float = 4.0, seed: int = 0) -> Polynomial:
    rng = np.random.default_rng(seed)
    pairs = list(pairwise(sizes))
    weights = tuple(rng.normal(size=(out, into)) / np.sqrt(into) for into, out in pairs)
    biases = tuple(rng.normal(size=out) for _, out in pairs)
    return Polynomial(weights, biases, activation, bound)


def predicted(network: Polynomial, found: InferencePlan, inputs: np.ndarray) -> np.ndarray:
    key = InferenceKey(found.terms)
    answer = EncryptedInference(network, found)(*key.encrypt(inputs))
    return key.decrypt(answer, len(inputs))


@pytest.fixture(scope="module")
def small() -> tuple[Polynomial, InferencePlan]:
    network = polynomial(5, 3, 2)
    return network, plan(network)


# -- the same as in the clear --


@pytest.mark.parametrize(
    "kept",
    [
        {"hidden": ()},
        {},
        {"activation": "cubic", "hidden_scale": 0.5},
        pytest.param({"features": "hog", "hidden": (16,)}, marks=pytest.mark.slow),
        pytest.param({"hidden": (32, 16), "hidden_scale": 0.7}, marks=pytest.mark.slow),
        pytest.param({"features": "raw"}, marks=pytest.mark.slow),
    ],
    ids=["logistic", "square", "cubic", "hog", "two hidden layers", "raw pixels"],
)
def test_labels_of_a_thousand_mnist_images_are_those_of_the_network_itself(kept) -> None:
    task = Mnist()
    network, images = trained(task, **kept), task.test().inputs
    model = TrainedModel.of(network, 16.0)
    found = predicted(model.polynomial, model.plan, network.featurise(images).numpy())
    expected = logits(network, images)
    assert len(images) == 1000
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("samples", [1, 3, 2048])
@pytest.mark.parametrize(
    ("sizes", "activation"),
    [
        ((6, 3), SQUARE),
        ((6, 4, 3), SQUARE),
        ((6, 4, 3), (0.5, -1.0, 0.3)),
        ((6, 4, 3), CUBIC),
    ],
)
def test_any_number_of_samples_and_any_polynomial(sizes, activation, samples: int) -> None:
    network = polynomial(*sizes, activation=activation)
    inputs = np.random.default_rng(1).uniform(-4, 4, (samples, sizes[0]))
    found = predicted(network, plan(network), inputs)
    assert found.shape == (samples, 3)
    assert np.abs(found - network(inputs)).max() < 5e-3


def test_two_hidden_layers_in_five_components() -> None:
    network = polynomial(4, 3, 3, 2, bound=2.0)
    found = plan(network)
    inputs = np.random.default_rng(2).uniform(-2, 2, (20, 4))
    assert found.terms.components == 5
    assert np.abs(predicted(network, found, inputs) - network(inputs)).max() < 2e-2


def test_more_inputs_than_are_expanded_at_once() -> None:
    network = polynomial(130, 2)
    inputs = np.random.default_rng(3).uniform(-4, 4, (7, 130))
    assert np.abs(predicted(network, plan(network), inputs) - network(inputs)).max() < 1e-3


def test_a_network_of_zeros_says_zero() -> None:
    nothing = Polynomial((np.zeros((2, 3)),), (np.zeros(2),), SQUARE, 1.0)
    assert np.abs(predicted(nothing, plan(nothing), np.ones((2, 3)))).max() < 1e-6


# -- room --


@pytest.mark.parametrize(("sizes", "activation"), [((8, 2), SQUARE), ((8, 4, 2), SQUARE)])
def test_the_worst_inputs_do_not_wrap_round_at_the_least_headroom(sizes, activation) -> None:
    """Weights of one sign and inputs at the bound reach the largest logit that the plan counted with."""
    drawn = polynomial(*sizes, activation=activation, bound=16.0)
    network = Polynomial(
        tuple(np.abs(weight) for weight in drawn.weights),
        tuple(np.abs(bias) for bias in drawn.biases),
        activation,
        16.0,
    )
    loose = plan(network)
    bits = list(loose.weight_bits)
    bits[-1] += int(loose.headroom_bits - HEADROOM_BITS)  # to the last bit that there is
    tight = fitted(network, loose.terms.ring, loose.terms.input_bits, bits)
    assert HEADROOM_BITS <= tight.headroom_bits < HEADROOM_BITS + 1
    worst = np.vstack([np.full(sizes[0], 16.0), np.full(sizes[0], -16.0)])
    expected = network(worst)
    assert expected.max() == pytest.approx(network.largest())
    assert np.abs(predicted(network, tight, worst) / expected - 1).max() < 1e-3
    bits[-1] += 1
    with pytest.raises(HeadroomError, match="and 3 are needed"):
        fitted(network, loose.terms.ring, loose.terms.input_bits, bits)


def test_what_no_ring_has_room_for_is_refused_with_the_mend() -> None:
    with pytest.raises(HeadroomError, match="fewer layers, smaller weights, or a smaller bound"):
        plan(polynomial(8, 8, 8, 8, 2, activation=CUBIC, bound=100.0))
    with pytest.raises(HeadroomError, match="up to inf"):
        plan(Polynomial((np.full((1, 1), 1e300),) * 2, (np.zeros(1),) * 2, SQUARE, 1e9))


@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=3),
    cubic=st.booleans(),
    bound=st.floats(1e-3, 1e3),
    factor=st.floats(1e-6, 1e3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_a_plan_leaves_headroom_for_every_network_and_its_largest_is_one(
    sizes: list[int], cubic: bool, bound: float, factor: float, seed: int
) -> None:
    drawn = polynomial(*sizes, activation=CUBIC if cubic else SQUARE, bound=bound, seed=seed)
    weights = tuple(weight * factor for weight in drawn.weights)
    network = Polynomial(weights, drawn.biases, drawn.activation, bound)
    inputs = np.random.default_rng(seed).uniform(-bound, bound, (50, sizes[0]))
    assert np.abs(network(inputs)).max() <= network.largest() * (1 + 1e-9)
    try:
        found = plan(network)
    except HeadroomError:
        return
    assert found.headroom_bits >= HEADROOM_BITS
    assert found.terms.components == (1 if len(sizes) == 2 else len(drawn.activation) - 1) + 1


@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_a_monic_activation_makes_the_same_function(sizes: list[int], seed: int) -> None:
    network = polynomial(*sizes, activation=(0.5, -1.0, 2.0, 0.25), seed=seed)
    inputs = np.random.default_rng(seed).uniform(-1, 1, (5, sizes[0]))
    assert np.allclose(network.monic()(inputs), network(inputs), rtol=1e-9)
    assert network.monic().activation[-1] == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation": (0.0, 1.0)}, "needs degree 2 or 3"),
        ({"activation": (0.0, 1.0, 0.0)}, "needs degree 2 or 3"),
        ({"activation": (0.0, np.nan, 1.0)}, "all finite"),
        ({"bound": 0.0}, "greater than 0"),
        ({"bound": np.inf}, "must be finite"),
        ({"weights": (np.full((2, 3), np.nan),)}, "not finite"),
        ({"weights": (np.ones((2, 3)), np.ones((2, 3)))}, "1 biases"),
        ({"biases": (np.zeros(3),)}, "layer 0"),
        ({"weights": ()}, "0 layers"),
    ],
)
def test_what_is_no_network_is_refused(changes, said: str) -> None:
    good = {
        "weights": (np.ones((2, 3)),), "biases": (np.zeros(2),), "activation": SQUARE, "bound": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=said):
        Polynomial(**(good | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input_bits": 0}, "inputs at 2"),
        ({"logit_bits": 54}, "a modulus of 54 bits"),
        ({"logit_bits": 20}, "logits at 2"),
        ({"components": 1}, "components"),
        ({"components": 17}, "components"),
        ({"bound": np.nan}, "bound"),
        ({"ring": Ring(8192, (57, 57, 57))}, "56 bits or less"),
    ],
)
def test_terms_that_no_plan_has_are_refused(changes, said: str) -> None:
    ring = Ring(4096, (54, 55))
    good = {"ring": ring, "input_bits": 20, "logit_bits": 40, "components": 2, "bound": 1.0}
    with pytest.raises(ValueError, match=said):
        Terms(**(good | changes))


def test_a_plan_of_another_network_is_refused(small) -> None:
    with pytest.raises(ValueError, match="for another network"):
        EncryptedInference(polynomial(5, 2), small[1])


# -- only who has the key --


def test_another_key_decrypts_to_nothing_like_the_logits(small) -> None:
    """What comes out is spread over some 10⁵: of 16 numbers half are within 10³ less than once in 10⁹ times."""
    network, found = small
    inputs = np.ones((1, 5))
    answer = EncryptedInference(network, found)(*InferenceKey(found.terms).encrypt(inputs))
    garbage = np.array([InferenceKey(found.terms).decrypt(answer, 1) for _ in range(8)])
    assert np.median(np.abs(garbage - network(inputs))) > 1e3


def test_the_same_inputs_are_never_encrypted_alike(small) -> None:
    key = InferenceKey(small[1].terms)
    first, seeds = key.encrypt(np.zeros((1, 5)))
    again, other = key.encrypt(np.zeros((1, 5)))
    assert len({seed.tobytes() for seed in (*seeds, *other)}) == 10
    assert np.count_nonzero(first == again) <= 5  # of 80,000 residues of 55 bits


def test_a_fresh_ciphertext_looks_uniform_whatever_is_in_it(small) -> None:
    """The top four bits of 80,000 residues of zeros: χ² of 15 degrees, wrong once in 10^9."""
    key, ring = InferenceKey(small[1].terms), small[1].terms.ring
    first, _ = key.encrypt(np.zeros((1, 5)))
    primes = np.array(ring.primes[: ring.levels], np.float64)[:, None]
    counts = np.bincount((first / primes * 16).astype(int).ravel(), minlength=16)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 75


def test_a_key_stays_where_it_is(small) -> None:
    key = InferenceKey(small[1].terms)
    with pytest.raises(TypeError, match="stays in the process"):
        pickle.dumps(key)
    assert len(repr(key)) < 80


# -- what is refused --


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (np.full((1, 5), np.nan), "finite numbers only"),
        (np.full((1, 5), np.inf), "finite numbers only"),
        (np.full((1, 5), 4.01), "room up to 4"),
        (np.ones(5), "1 to 4096 rows"),
        (np.ones((0, 5)), "1 to 4096 rows"),
        (np.ones((4097, 5)), "1 to 4096 rows"),
    ],
)
def test_inputs_that_there_is_no_room_for_are_not_encrypted(small, inputs, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        InferenceKey(small[1].terms).encrypt(inputs)


def test_residues_of_another_shape_are_no_inputs_and_no_logits(small) -> None:
    network, found = small
    key, inference = InferenceKey(found.terms), EncryptedInference(network, found)
    first, seeds = key.encrypt(np.ones((1, 5)))
    with pytest.raises(CiphertextError, match="not the model's inputs"):
        inference(first[:4], seeds[:4])
    with pytest.raises(CiphertextError, match="not the model's inputs"):
        inference(first, seeds[:4])
    answer = inference(first, seeds)
    with pytest.raises(CiphertextError, match="no encrypted logits"):
        key.decrypt(answer[:, :2], 1)
    answer[0, 0, 0, 0] = found.terms.ring.primes[0]
    with pytest.raises(CiphertextError, match="not below its prime"):
        key.decrypt(answer, 1)


# -- arithmetic --


@given(
    st.sampled_from([(8192, (55, 55, 56)), (8192, (30, 56, 60)), (4096, (40, 54))]),
    st.integers(0, 2**32 - 1),
)
def test_products_of_residues_are_exact(shape, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for prime in Ring(*shape).primes[:-1]:
        left = np.r_[rng.integers(0, prime, 40, np.uint64), [0, 1, prime - 1, prime - 1]]
        right = np.r_[rng.integers(0, prime, 40, np.uint64), [prime - 1, 1, 1, prime - 1]]
        left, right = left.astype(np.uint64), right.astype(np.uint64)
        exact = left.astype(object) * right.astype(object) % prime
        assert (multiplied(left, right, prime).astype(object) == exact).all()
