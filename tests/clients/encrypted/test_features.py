"""Public feature maps: what they are, and that no data and no state is in them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn

from clients.encrypted.features import feature_map
from clients.models import Hog
from clients.tasks import Digits, Mnist

KINDS = ("raw", "dct", "pool", "hog")


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(2, 12), st.integers(2, 12), st.integers(0, 2**31), st.data())
def test_dct_is_scipys_lowest_orthonormal_coefficients_of_each_channel(
    channels, height, width, seed, data
):
    number = data.draw(st.integers(1, height * width))
    images = np.random.default_rng(seed).normal(size=(2, channels, height, width))
    found = feature_map("dct", (channels, height, width), number)(torch.tensor(images).float())
    whole = dctn(images, axes=(2, 3), norm="ortho")
    lowest = sorted((u + v, u, v) for u in range(height) for v in range(width))[:number]
    kept = np.stack([whole[:, :, u, v] for _, u, v in lowest], axis=2)
    expected = kept.reshape(2, -1) * (number / (height * width)) ** 0.5
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_all_of_dct_keeps_lengths():
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = feature_map("dct", (1, 8, 8), 64)(images)
    torch.testing.assert_close(found.norm(dim=1), images.flatten(1).norm(dim=1))


def test_raw_is_the_input():
    inputs = torch.randn(3, 2, 4)
    assert torch.equal(feature_map("raw", (2, 4))(inputs), inputs.reshape(3, 8))


def test_pool_is_the_mean_of_each_cell():
    images = torch.arange(2 * 36.0).reshape(1, 2, 6, 6)
    found = feature_map("pool", (2, 6, 6), 9)(images)
    expected = images.reshape(1, 2, 3, 2, 3, 2).mean(dim=(3, 5)).reshape(1, 18)
    torch.testing.assert_close(found, expected)


def test_hog_is_the_models_own_histograms():
    images = Mnist().test().inputs[:7]
    found = feature_map("hog", (1, 28, 28), 96)(images)
    expected = Hog((1, 28, 28), 10, cells=4, orientations=6).features(images) * 96**0.5
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", [Mnist, Digits])
def test_features_of_real_images_have_a_root_mean_square_of_about_one(kind, task):
    made = feature_map(kind, task.input_shape)
    found = made(task().train().inputs)
    assert found.shape == (len(task().train()), made.size)
    assert found.dtype == torch.float32
    assert 0.7 <= found.square().mean().sqrt() <= 1.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_has_no_state_and_draws_nothing_that_shows(kind):
    torch.manual_seed(1)
    first = feature_map(kind, (1, 28, 28))
    torch.manual_seed(2)
    second = feature_map(kind, (1, 28, 28))
    images = Mnist().test().inputs[:5]
    assert torch.equal(first(images), second(images))
    assert list(first.parameters()) == list(first.buffers()) == []
    assert first.state_dict() == {}


def test_digests_tell_maps_apart_and_nothing_else():
    made = [
        feature_map(kind, shape, number)
        for kind, shape, number in (
            ("raw", (1, 28, 28), None),
            ("raw", (784,), None),
            ("dct", (1, 28, 28), None),
            ("dct", (1, 28, 28), 36),
            ("dct", (1, 32, 32), None),
            ("pool", (1, 28, 28), 64),
            ("hog", (1, 28, 28), None),
            ("hog", (1, 28, 28), 96),
        )
    ]
    assert len({one.digest for one in made}) == len(made)
    assert feature_map("dct", [1, 28, 28], 64).digest == feature_map("dct", (1, 28, 28)).digest


@pytest.mark.parametrize("kind", ["dct", "pool", "hog"])
def test_what_is_no_image_is_told_to_take_raw(kind):
    with pytest.raises(ValueError, match=f"features={kind} takes images .* use model.features=raw"):
        feature_map(kind, (30,))


@pytest.mark.parametrize(
    ("kind", "number", "said"),
    [
        ("raw", 10, "takes all 784 numbers"),
        ("dct", 0, "has 1 to 784 coefficients"),
        ("dct", 785, "has 1 to 784 coefficients"),
        ("pool", 50, "a square number of cells"),
        ("pool", 900, "on a side at most 28"),
        ("pool", -4, "a square number of cells"),
        ("hog", 40, "16 numbers for each"),
        ("hog", 16, "at least two orientations"),
        ("wavelet", None, "choose one of raw, dct, pool, hog"),
    ],
)
def test_a_number_that_there_is_not_is_refused(kind, number, said):
    with pytest.raises(ValueError, match=said):
        feature_map(kind, (1, 28, 28), number)
