"""The polynomial network: its arithmetic, its initial weights, and gradients that a polynomial of the loss gives."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.encrypted.network import ACTIVATIONS, PolynomialNet
from clients.tasks import Mnist
from clients.trainers.fedsgd import squared_loss

SHAPE = (1, 28, 28)


def dense(model: PolynomialNet, inputs: torch.Tensor) -> np.ndarray:
    """Logits by numpy in float64, from the names that the encrypted side reads."""
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    hidden = model.featurise(inputs).double().numpy()
    for index in range(len(model.sizes) - 1):
        if index:
            hidden = sum(c * hidden**power for power, c in enumerate(model.coefficients))
        hidden = hidden @ state[f"layers.{index}.weight"].T + state[f"layers.{index}.bias"]
    return hidden


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.integers(1, 12), max_size=3),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.integers(2, 11),
    st.integers(0, 2**31),
)
def test_logits_are_the_polynomial_of_the_features(hidden, activation, classes, seed):
    torch.manual_seed(seed)
    model = PolynomialNet((6,), classes, hidden=hidden, activation=activation, features="raw")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        inputs = torch.randn(4, 6)
        found = model(inputs)
    assert found.shape == (4, classes)
    assert model.sizes == (6, *hidden, classes)
    expected = dense(model, inputs)
    assert np.abs(found.numpy() - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


def test_the_state_is_the_linear_layers_alone():
    model = PolynomialNet(SHAPE, 10, hidden=(32, 16))
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == {
        name: shape
        for index, (fan_in, out) in enumerate(pairwise((64, 32, 16, 10)))
        for name, shape in (
            (f"layers.{index}.weight", (out, fan_in)),
            (f"layers.{index}.bias", (out,)),
        )
    }
    assert list(model.buffers()) == []


def test_features_take_no_gradients_and_stay_what_they_are():
    model, images = PolynomialNet(SHAPE, 10), Mnist().test().inputs[:9]
    found = model.featurise(images)
    assert (found.shape, found.dtype, found.requires_grad) == ((9, 64), torch.float32, False)
    assert torch.equal(found, model.features(images))


@pytest.mark.parametrize(
    ("activation", "hidden"),
    [("square", ()), ("square", (256,)), ("square", (256, 256)), ("cubic", (256,))],
)
def test_initial_scales_are_those_of_pre_activations_and_logits(activation, hidden):
    """Their mean squares over 60 draws of the weights. One draw's has a relative standard deviation of at most 0.2, as
    found over 1,000 of them, so that 15% is more than 4 standard errors. The seed is fixed."""
    inputs, squares = torch.randn(16, 64, generator=torch.Generator().manual_seed(5)), []
    inputs *= 8 / inputs.norm(dim=1, keepdim=True)
    torch.manual_seed(11)
    for _ in range(60):
        model = PolynomialNet(
            (64,), 64, hidden=hidden, activation=activation, features="raw",
            hidden_scale=0.5, logit_scale=0.3,
        )  # fmt: skip
        with torch.no_grad():
            values, each = inputs, []
            for index, layer in enumerate(model.layers):
                values = layer(model.activate(values) if index else values)
                each.append(values.square().mean().item())
        squares.append(each)
    expected = [0.25] * len(hidden) + [0.09]
    np.testing.assert_allclose(np.mean(squares, axis=0), expected, rtol=0.15)


def test_biases_and_an_unscaled_output_start_at_zero():
    model = PolynomialNet(SHAPE, 10, hidden=(), logit_scale=0)
    assert all(not parameter.any() for parameter in model.parameters())
    assert not any(layer.bias.any() for layer in PolynomialNet(SHAPE, 10).layers)


def test_the_start_of_the_logits_biases_can_be_set():
    first, last = PolynomialNet(SHAPE, 10, logit_bias=0.1).layers
    assert not first.bias.any()
    assert torch.equal(last.bias, torch.full((10,), 0.1))


def test_the_callers_seed_decides_the_initial_weights():
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in PolynomialNet(SHAPE, 10).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_gradients_of_the_squared_loss_are_the_products_that_ciphertexts_are_multiplied_to():
    """δ = o − y; ∂W₂ = mean δ·φ(z)ᵀ and ∂W₁ = mean (W₂ᵀδ ∘ φ'(z))·xᵀ, with φ = z² by hand."""
    torch.manual_seed(3)
    model, examples = PolynomialNet(SHAPE, 10, hidden=(5,)), Mnist().train().take(range(40))
    squared_loss(model(examples.inputs), examples.targets).backward()
    x, (first, second) = model.featurise(examples.inputs), model.layers
    with torch.no_grad():
        z = first(x)
        delta = second(z.square()) - F.one_hot(examples.targets, 10)
        back = delta @ second.weight * 2 * z
        for parameter, expected in (
            (second.weight, delta.T @ z.square() / 40),
            (second.bias, delta.mean(0)),
            (first.weight, back.T @ x / 40),
            (first.bias, back.mean(0)),
        ):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_tokens_and_unknown_activations_are_refused():
    with pytest.raises(ValueError, match="inputs are tokens: use Gru"):
        PolynomialNet((12,), 4, 50, features="raw")
    with pytest.raises(ValueError, match="activation='relu': choose one of square, cubic"):
        PolynomialNet(SHAPE, 10, activation="relu")
    with pytest.raises(ValueError, match=r"use model\.features=raw"):
        PolynomialNet((12,), 4)
