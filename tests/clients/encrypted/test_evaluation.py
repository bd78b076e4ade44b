"""A whole step on ciphertexts: its gradients are autograd's, whatever the batch, the shares and the shapes."""

import numpy as np
import pytest

from clients.encrypted.linear import WeightRangeError
from clients.encrypted.owner import LOSS, WrapAroundError
from clients.encrypted.spec import Spec, bias, weight
from tests.support.encrypted import (
    Bench,
    autograd,
    batch,
    descended,
    images,
    network,
    parameters,
)

STRICT = "squared"
CE = "cross_entropy"


def started(spec, seed=0, shift=0.1):
    """A model as it starts, but with biases that are not 0."""
    rng = np.random.default_rng(seed)
    arrays = parameters(network(spec, seed))
    return {
        name: array + (shift * rng.normal(size=array.shape) if array.ndim == 1 else 0)
        for name, array in arrays.items()
    }


def errors(found, exact):
    """The largest error of each array, as a share of the array's largest number."""
    assert set(found) == set(exact)
    assert all(found[name].shape == array.shape for name, array in exact.items())
    return {
        name: float(np.abs(found[name] - array).max() / np.abs(array).max())
        for name, array in exact.items()
    }


def agree(spec, arrays, examples, most=2e-3, **settings):
    """To 2e-3 of the largest gradient of all, and each array to 2e-2 of its own."""
    found = Bench(spec, **settings).step(arrays, *examples).gradients
    exact = autograd(spec, arrays, *examples)
    own = errors(found, exact)
    assert max(own.values()) < 10 * most, own
    assert own[LOSS] < most
    sizes = {name: np.abs(array).max() for name, array in exact.items() if name != LOSS}
    worst = max(own[name] * size for name, size in sizes.items())
    assert worst < most * max(sizes.values()), own


@pytest.mark.parametrize("loss", [CE, STRICT])
@pytest.mark.parametrize(
    ("sizes", "activation", "size", "samples"),
    [
        ((7, 3), "square", 512, 512),  # full
        ((7, 3), "square", 512, 41),  # short: most slots are padding
        ((7, 4, 3), "square", 512, 512),
        ((7, 5, 3), "cubic", 256, 100),
        ((9, 5, 3), "square", 4096, 3000),  # b = 1
        ((9, 5, 4), "square", 2048, 2048),  # b = 2, and more units than 2 b
        ((7, 19, 18), "square", 512, 16),  # more than 2 b of both
    ],
)
def test_gradients_and_loss_are_autograds(loss, sizes, activation, size, samples):
    spec = Spec(sizes, activation, loss, size)
    agree(spec, started(spec), batch(spec, samples))


@pytest.mark.parametrize("loss", [CE, STRICT])
@pytest.mark.parametrize("sizes", [(259, 3), (258, 3, 2)])
def test_features_that_share_a_ciphertext(loss, sizes):
    spec = Spec(sizes, loss=loss)
    bench = Bench(spec)
    assert bench.plan.paired
    agree(spec, started(spec), batch(spec, 300))


@pytest.mark.slow
@pytest.mark.parametrize("loss", [CE, STRICT])
@pytest.mark.parametrize("activation", ["square", "cubic"])
def test_two_hidden_layers(loss, activation):
    spec = Spec((7, 5, 4, 3), activation, loss)
    arrays = {name: 0.6 * array for name, array in started(spec).items()}
    agree(spec, arrays, batch(spec, 200), shares=2)


@pytest.mark.parametrize("loss", [CE, STRICT])
@pytest.mark.parametrize(("shares", "chunk"), [(2, 512), (5, 1)])
@pytest.mark.parametrize("sizes", [(5, 7, 2), (5, 3)])
def test_any_number_of_shares_and_leaves_of_a_tree(loss, shares, chunk, sizes):
    """Also with fewer units than shares."""
    spec = Spec(sizes, loss=loss)
    agree(spec, started(spec), batch(spec, 64), shares=shares, chunk=chunk)


def test_shares_compute_the_same_residues_as_one_party_alone():
    spec = Spec((5, 9, 3))
    arrays, (features, _) = started(spec), batch(spec, 64)
    found = []
    inputs = Bench(spec).owner.inputs(features)
    for shares in (1, 4):
        bench = Bench(spec, shares=shares)
        value = bench.value(inputs, bench.plan.scales.inputs)
        for worker in bench.workers:
            worker.begin(value.columns)
        found.append(bench.forward(arrays))
    for name, value in found[0].items():
        np.testing.assert_array_equal(value.residues, found[1][name].residues)
        assert value.scale == found[1][name].scale


@pytest.mark.parametrize("loss", [CE, STRICT])
@pytest.mark.parametrize("sizes", [(5, 4, 3), (258, 2, 2), (5, 3)])
def test_rows_of_zeros_make_no_ciphertext_of_nothing(loss, sizes):
    spec = Spec(sizes, loss=loss)
    arrays = started(spec)
    for layer in range(spec.layers):
        arrays[weight(layer)][1] = arrays[bias(layer)][1] = 0
    if spec.layers > 1:
        arrays[weight(1)][:, 0] = 0
    examples = batch(spec, 200)
    found, exact = (
        Bench(spec).step(arrays, *examples).gradients,
        autograd(spec, arrays, *examples),
    )
    for name, array in exact.items():
        assert np.abs(found[name] - array).max() < 2e-3 * max(np.abs(array).max(), 0.05), name


@pytest.mark.parametrize("loss", [CE, STRICT])
def test_a_model_of_zeros(loss):
    spec = Spec((5, 3), loss=loss)
    zeros = {name: np.zeros(shape) for name, shape in spec.shapes.items()}
    agree(spec, zeros, batch(spec, 200))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("huge", [1e9, np.inf, np.nan])
def test_huge_weights_are_refused(layer, huge):
    spec = Spec((5, 4, 3))
    arrays = started(spec)
    arrays[weight(layer)][2, 1] = huge
    with pytest.raises(WeightRangeError):
        Bench(spec).step(arrays, *batch(spec, 20))


@pytest.mark.parametrize(
    ("sizes", "loss", "factor"),
    [
        ((8, 4, 3), STRICT, 30.0),  # mean gradients within the modulus, and too near to half of it
        ((8, 4, 3), STRICT, 3000.0),  # sums that have wrapped round
        ((8, 3), STRICT, 1e4),
        ((8, 4, 3), CE, 1e3),
    ],
)
def test_weights_that_have_blown_up_are_noticed(sizes, loss, factor):
    """Numbers that wrapped are uniform: that all 20 or more stay in the middle eighth is one chance in 10^18."""
    spec = Spec(sizes, loss=loss)
    arrays = {name: factor * array for name, array in started(spec).items()}
    with pytest.raises(WrapAroundError, match=r"diverged.*lower server\.lr"):
        Bench(spec).step(arrays, *batch(spec, 500))


def test_a_step_begins_with_its_batch():
    spec = Spec((5, 3))
    with pytest.raises(ValueError, match="begins with its mini-batch"):
        Bench(spec).forward(started(spec))


def digits(spec, kind="dct"):
    features, targets = images(kind, spec.sizes[0])
    return features[: spec.batch], targets[: spec.batch]


@pytest.mark.parametrize(
    ("spec", "most"),
    [
        (Spec((64, 10)), 1e-4),
        (Spec((64, 10), loss=STRICT), 1e-3),
        (Spec((64, 32, 10)), 5e-4),
        (Spec((64, 32, 10), loss=STRICT), 5e-4),
        pytest.param(Spec((64, 32, 10), "cubic"), 5e-4, marks=pytest.mark.slow),
        pytest.param(Spec((64, 32, 10), "cubic", STRICT), 1e-3, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_precision_on_images_at_the_start(spec, most):
    """Errors as a share of the largest gradient of all; of 512 images, with the default settings."""
    examples, arrays = digits(spec), parameters(network(spec))
    found, exact = (
        Bench(spec).step(arrays, *examples).gradients,
        autograd(spec, arrays, *examples),
    )
    assert exact.pop(LOSS) == pytest.approx(found[LOSS], rel=1e-3)
    largest = max(np.abs(array).max() for array in exact.values())
    worst = max(float(np.abs(found[name] - array).max()) for name, array in exact.items())
    assert worst / largest < most, worst / largest


@pytest.mark.slow
@pytest.mark.parametrize("loss", [CE, STRICT])
def test_errors_are_far_below_what_sampling_does_to_a_mean_after_training(loss):
    """A mean over 512 images has a standard error; of it, the error of each gradient is less than a thirtieth."""
    spec = Spec((64, 32, 10), loss=loss)
    features, targets = images("dct", 64)
    arrays = descended(spec, features, targets, steps=40)
    examples = digits(spec)
    found = Bench(spec).step(arrays, *examples).gradients
    exact = autograd(spec, arrays, *examples)
    parts = [
        autograd(spec, arrays, *(part[start : start + 32] for part in examples))
        for start in range(0, 512, 32)
    ]
    for name in (weight(0), bias(0), weight(1), bias(1)):
        spread = np.std([part[name] for part in parts], axis=0) / np.sqrt(len(parts))
        rms = np.sqrt(np.mean(spread**2))
        assert np.abs(found[name] - exact[name]).max() < rms / 30, name
