"""Bounds on a step's values, by weights alone: they hold, and blown-up weights are refused before anything wraps."""

from math import log2

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clients.encrypted.network import PolynomialNet
from clients.encrypted.plan import HEADROOM, plan_of
from clients.encrypted.ranges import FEATURE_RMS, MOST_ERROR, RangeError, check
from clients.encrypted.spec import Spec
from clients.tasks import Digits
from tests.support.encrypted import batch, network, parameters, shadow

LOSSES = ["cross_entropy", "squared"]
hidden = st.lists(st.integers(1, 24), min_size=1, max_size=2)


def reached(spec, weights, features, targets):
    """The largest mean magnitude of each value, which a coefficient can reach at the most, as log2."""
    values = shadow(spec, weights, features, targets)
    return {name: log2(max(np.abs(value).mean(0).max(), 1e-12)) for name, value in values.items()}


def outputs_have_diverged(spec, weights, features, targets):
    """Whether a squared loss is so large that its owner stops: bounds say nothing then."""
    delta = shadow(spec, weights, features, targets)["delta"]
    return spec.loss == "squared" and np.mean(np.square(delta).sum(1)) > MOST_ERROR**2


def holds(spec, weights, features, targets):
    """Whether no value is above its bound, where there is one."""
    plan = plan_of(spec)
    left = check(plan, weights)
    bounds = {name: plan.formats[name].room - bits for name, bits in left.items()}
    found = reached(spec, weights, features, targets)
    assert not outputs_have_diverged(spec, weights, features, targets)
    return bool(bounds) and all(found[name] <= bound + 1e-9 for name, bound in bounds.items())


@settings(max_examples=60)
@given(hidden, st.sampled_from(LOSSES), st.floats(0.1, 1.0), st.integers(0, 1000))
def test_bounds_hold_for_standard_normal_features(hidden, loss, scale, seed):
    spec = Spec((16, *hidden, 5), loss=loss)
    weights = parameters(network(spec, seed, hidden_scale=scale))
    features, targets = batch(spec, 300, seed)
    assume(not refused(plan_of(spec), weights))  # a step of theirs is not taken
    assume(not outputs_have_diverged(spec, weights, features, targets))
    assert holds(spec, weights, features, targets)


@pytest.mark.parametrize("activation", ["square", "cubic"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["hog", "dct", "raw"])
def test_bounds_hold_for_features_of_real_images(kind, loss, activation):
    task = Digits()
    data = task.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        number = None if kind == "raw" else 64
        model = PolynomialNet(
            task.input_shape, task.num_classes, hidden=(32,), features=kind, number=number,
            activation=activation, hidden_scale=0.25 if loss == "squared" else 1.0,
        )  # fmt: skip
    features = model.features(data.inputs[:512]).double().numpy()
    assert np.sqrt(np.mean(features**2)) <= FEATURE_RMS
    weights = {name: array for name, array in parameters(model).items() if "layers" in name}
    spec = Spec((features.shape[1], 32, 10), activation=activation, loss=loss)
    assert holds(spec, weights, features, data.targets[:512].numpy())


def refused(plan, weights):
    """Whether the weights are refused."""
    try:
        check(plan, weights)
    except RangeError:
        return True
    return False


@settings(max_examples=40)
@given(st.sampled_from(LOSSES), st.sampled_from(["square", "cubic"]), st.integers(0, 1000))
def test_blown_up_weights_are_refused_before_an_inner_value_wraps(loss, activation, seed):
    spec = Spec((16, 8, 5), loss=loss, activation=activation)
    plan, weights = plan_of(spec), parameters(network(spec, seed))
    features, targets = batch(spec, 300, seed)
    inner = check(plan, weights).keys()
    for power in range(60):
        blown = {name: 2.0**power * array for name, array in weights.items()}
        if refused(plan, blown) or outputs_have_diverged(spec, blown, features, targets):
            break
        found = reached(spec, blown, features, targets)
        assert all(found[name] <= plan.formats[name].room - HEADROOM for name in inner)
    assert power < 59


@pytest.mark.parametrize("activation", ["square", "cubic"])
def test_blown_up_weights_are_refused(activation):
    plan = plan_of(Spec((16, 8, 5), activation=activation))
    weights = {name: 1e4 * array for name, array in parameters(network(plan.spec)).items()}
    with pytest.raises(RangeError, match=r"lower server\.lr"):
        check(plan, weights)


@pytest.mark.parametrize("part", ["layers.0.weight", "layers.0.bias", "layers.1.weight"])
def test_one_array_is_enough_to_be_refused(part):
    plan = plan_of(Spec((16, 8, 5)))
    weights = parameters(network(plan.spec))
    weights[part] = weights[part] + 1e9
    with pytest.raises(RangeError, match="may reach"):
        check(plan, weights)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(wrong):
    plan = plan_of(Spec((16, 8, 5)))
    for part in plan.spec.shapes:
        weights = parameters(network(plan.spec))
        weights[part].flat[0] = wrong
        with pytest.raises(RangeError):
            check(plan, weights)


def test_logistic_regression_has_no_inner_values():
    plan = plan_of(Spec((16, 5)))
    assert check(plan, parameters(network(plan.spec))) == {}
