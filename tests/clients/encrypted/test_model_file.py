"""A model's file gives back what was saved, and a stranger's file does no harm."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from clients.encrypted import model_file
from clients.encrypted.model_file import FeatureTerms, ModelFileError, TrainedModel, load
from clients.encrypted.network import PolynomialNet
from tests.support.examples import many


def network(**settings) -> PolynomialNet:
    settings = {"hidden": (3,), "features": "pool", "number": 4} | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return PolynomialNet((1, 8, 8), 5, **settings)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "model.safetensors"
    found.write_bytes(TrainedModel.of(network(), 16.0, "run-s0 (1a2b)").to_bytes())
    return found


def changed(path: Path, head=None, tensors=None, metadata=None) -> Path:
    """The file with entries of its head and its tensors replaced, None for those that go."""
    with safe_open(path, framework="numpy") as file:
        told = json.loads(file.metadata()["model"]) | (head or {})
    told = {key: value for key, value in told.items() if value is not None}
    arrays = load_file(path) | (tensors or {})
    arrays = {key: value for key, value in arrays.items() if value is not None}
    save_file(arrays, path, metadata or {"model": json.dumps(told)})
    return path


@pytest.mark.parametrize(
    "kept",
    [
        {},
        {"hidden": ()},
        {"activation": "cubic"},
        {"features": "dct", "number": 7},
        {"features": "raw", "number": None},
        {"features": "hog", "number": 32},
    ],
    ids=str,
)
def test_a_saved_model_comes_back_the_same(tmp_path: Path, kept) -> None:
    model = TrainedModel.of(network(**kept), 12.5, "run-s0 (1a2b)")
    path = tmp_path / "model.safetensors"
    path.write_bytes(model.to_bytes())
    found = load(path)
    inputs = torch.randn(9, 1, 8, 8)
    assert torch.equal(found.network(inputs), model.network(inputs))
    assert (found.bound, found.trained_by, found.plan) == (12.5, model.trained_by, model.plan)
    assert (found.digest, found.features) == (model.digest, model.features)
    assert found.features.map().digest == model.network.features.digest


def test_the_map_of_an_image_with_channels_is_found_again() -> None:
    terms = FeatureTerms.of(PolynomialNet((3, 8, 8), 2, features="dct", number=5).features)
    assert (terms.number, terms.size) == (5, 15)
    assert terms.map().size == 15


def test_the_arrays_compute_what_the_network_does() -> None:
    net = network(hidden=(4, 3), activation="cubic")
    inputs = torch.randn(9, 1, 8, 8)
    found = model_file.polynomial(net, 16.0)(net.featurise(inputs).numpy())
    assert np.allclose(found, net(inputs).detach().numpy(), atol=1e-4)


def test_another_weight_bound_or_run_is_another_digest() -> None:
    first = TrainedModel.of(network(), 16.0, "a")
    other = network()
    with torch.no_grad():
        other.layers[0].bias[0] = 0.5
    digests = {
        first.digest,
        TrainedModel.of(other, 16.0, "a").digest,
        TrainedModel.of(network(), 8.0, "a").digest,
        TrainedModel.of(network(), 16.0, "b").digest,
    }
    assert len(digests) == 4


def test_a_model_that_has_diverged_is_not_planned() -> None:
    net = network()
    with torch.no_grad():
        net.layers[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 1 holds a number that is not finite"):
        TrainedModel.of(net, 16.0)


_FEATURES = FeatureTerms.of(network().features).model_dump(mode="json")


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ({"format": "trellis-encrypted-model-9"}, "format"),
        ({"more": 1}, "more: Extra inputs"),
        ({"classes": None}, "classes: Field required"),
        ({"classes": 10**12}, "classes: Input should be less than"),
        ({"classes": "5"}, "classes: Input should be a valid integer"),
        ({"classes": 6}, r"layers\.1\.weight is F32 \[5, 3\]"),
        ({"hidden": [4]}, r"layers\.0\.bias is F32 \[3\]|layers\.0\.weight is F32"),
        ({"hidden": [0]}, "hidden.0"),
        ({"hidden": [16384, 16384]}, "more than 67108864 bytes"),
        ({"hidden": [2] * 9}, "hidden"),
        ({"activation": "relu"}, "activation"),
        ({"coefficients": [0.0, 0.0, 2.0, 0.0]}, "other coefficients"),
        ({"bound": -1.0}, "bound"),
        ({"bound": 1e30}, "bits of headroom"),
        ({"bound": float("inf")}, "bound: Input should be a finite"),
        ({"bits": [60, 60, 60, 60]}, "128-bit secure"),
        ({"bits": [60, 60, 60]}, "56 bits or less"),
        ({"degree": 65536}, "CKKS degree 65536"),
        ({"degree": 8192.5}, "degree"),
        ({"bits": [55, 56]}, "bits of headroom|inputs at 2"),
        ({"input_bits": 45}, "bits of headroom"),
        ({"input_bits": 0}, "inputs at 2"),
        ({"weight_bits": [15]}, "weight bits"),
        ({"weight_bits": [15, 10**9]}, "weight bits"),
        ({"features": _FEATURES | {"kind": "vgg"}}, "features.kind"),
        ({"features": _FEATURES | {"digest": "00"}}, "are others in this version"),
        ({"features": _FEATURES | {"size": 5}}, "are others in this version"),
        ({"features": _FEATURES | {"number": 5}}, "square number of cells"),
        ({"features": _FEATURES | {"input_shape": [1, 16384, 16384]}}, "too many"),
        ({"features": _FEATURES | {"input_shape": [64]}}, "takes images"),
        ({"trained_by": "x" * 201}, "trained_by"),
    ],
    ids=str,
)
def test_a_head_that_says_something_else_is_refused(path: Path, head, said: str) -> None:
    with pytest.raises(ModelFileError, match=said) as refused:
        load(changed(path, head))
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"layers.0.weight": np.full((3, 4), np.nan, np.float32)}, "not finite"),
        ({"layers.1.bias": np.full(5, np.inf, np.float32)}, "not finite"),
        ({"layers.0.weight": np.ones((4, 3), np.float32)}, "should be F32"),
        ({"layers.0.weight": np.ones((3, 4), np.float64)}, "is F64"),
        ({"layers.0.weight": np.ones((3, 4), np.int32)}, "is I32"),
        ({"layers.0.weight": None}, "the sizes ask for"),
        ({"layers.2.weight": np.ones((3, 4), np.float32)}, "the sizes ask for"),
        ({"layers.0.weight": np.full((3, 4), 1e30, np.float32)}, "bits of headroom"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_are_not_the_models_are_refused(path: Path, tensors, said: str) -> None:
    with pytest.raises(ModelFileError, match=said):
        load(changed(path, tensors=tensors))


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"other": "x"}, "another kind of file"),
        ({"model": "{"}, "Invalid JSON"),
        ({"model": "[" * 100_000}, "Invalid JSON|recursion"),
        ({"model": "null"}, "should be an object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_metadata_that_are_no_head_are_refused(path: Path, metadata, said: str) -> None:
    with pytest.raises(ModelFileError, match=said):
        load(changed(path, metadata=metadata))


@pytest.mark.parametrize("kept", [0, 7, 8, 200, -1])
def test_a_torn_file_is_refused(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelFileError, match="no safetensors file"):
        load(path)


def test_what_is_no_such_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelFileError, match="can't be read: No such file"):
        load(tmp_path / "none")
    with pytest.raises(ModelFileError, match=r"can't be read|no safetensors file"):
        load(tmp_path)
    pickled = tmp_path / "pickled"
    pickled.write_bytes(pickle.dumps({"layers.0.weight": [1.0]}))
    with pytest.raises(ModelFileError, match="no safetensors file"):
        load(pickled)
    with pickled.open("wb") as file:
        file.truncate(model_file.LARGEST_FILE + 1)
    with pytest.raises(ModelFileError, match="more than 67108864 bytes"):
        load(pickled)


@given(data=st.data())
@settings(max_examples=many(100), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_with_some_bytes_changed_is_a_model_or_refused(path: Path, data) -> None:
    whole = TrainedModel.of(network(), 16.0, "run-s0 (1a2b)").to_bytes()
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(broken)
    try:
        found = load(path)
    except ModelFileError:
        return
    assert found.plan.headroom_bits >= 3
    assert all(bool(torch.isfinite(value).all()) for value in found.network.state_dict().values())
