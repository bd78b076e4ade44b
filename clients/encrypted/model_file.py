"""A trained polynomial network as one safetensors file, for use in the clear and on ciphertexts.

The file has the layers' weights as tensors and, in its metadata, one JSON text: sizes, the activation's coefficients,
the public features and their digest, the bound of inputs, the ring and the scales that encrypted inference needs, and
which run trained it. Nothing is pickled. A file is a stranger's until every number has been looked at: sizes are
bounded before a tensor is read, tensors must be exactly those that the sizes ask for, all finite, the features' digest
must be that of this version's map, and the ring must have room for the weights, whatever the file says.

Nothing here knows a key, a ciphertext or HTTP.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from clients.encrypted.features import Features, Kind, feature_map
from clients.encrypted.inference_plan import InferencePlan, Polynomial, fitted, plan
from clients.encrypted.network import ACTIVATIONS, Activation, Coefficients, PolynomialNet
from clients.encrypted.ring import Ring

LARGEST_FILE: Final = 64 * 2**20
"""Bytes of a file that is opened at all."""
LARGEST_MAP: Final = 1 << 24
"""Numbers of one input times those of its features: what a map's matrix may hold."""

_FORMAT: Final = "trellis-encrypted-model-1"
_KEY: Final = "model"
_Size = Annotated[int, Ge(1), Le(1 << 14)]


class ModelFileError(ValueError):
    """A file that holds no such model, or one that can't be served."""


class FeatureTerms(BaseModel):
    """Which public features an owner computes before it encrypts.

    Attributes:
        kind: of `clients.encrypted.features.feature_map`.
        input_shape: of one input.
        number: as `feature_map` counts them.
        size: d.
        digest: of the map.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    kind: Kind
    input_shape: Annotated[tuple[_Size, ...], MinLen(1), MaxLen(4)]
    number: _Size
    size: _Size
    digest: Annotated[str, MaxLen(64)]

    @classmethod
    def of(cls, features: Features) -> FeatureTerms:
        """What is to be said of a map."""
        per_channel = features.kind in ("dct", "pool")
        channels = features.input_shape[0] if per_channel else 1
        return cls(
            kind=features.kind,
            input_shape=features.input_shape,
            number=features.size // channels,
            size=features.size,
            digest=features.digest,
        )

    def map(self) -> Features:
        """The map that is meant.

        Raises:
            ValueError: it is too large, there is none, or this version's is another one.
        """
        if self.number * prod(self.input_shape) > LARGEST_MAP:
            raise ValueError(f"{self.number} features of inputs {self.input_shape} are too many")
        found = feature_map(self.kind, self.input_shape, self.number)
        if FeatureTerms.of(found) != self:
            raise ValueError(f"features {self.kind} are others in this version of Trellis")
        return found


class _Head(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal["trellis-encrypted-model-1"]
    features: FeatureTerms
    hidden: Annotated[tuple[_Size, ...], MaxLen(8)]
    classes: _Size
    activation: Activation
    coefficients: Annotated[tuple[float, ...], MinLen(3), MaxLen(4)]
    bound: Annotated[float, Gt(0)]
    degree: int
    bits: Annotated[tuple[int, ...], MaxLen(16)]
    input_bits: int
    weight_bits: Annotated[tuple[int, ...], MaxLen(9)]
    trained_by: Annotated[str, MaxLen(200)]


@dataclass(frozen=True)
class TrainedModel:
    """A network, and what it takes to serve it.

    Attributes:
        network: with its public features.
        bound: the largest magnitude of a feature.
        trained_by: the run that trained it, in words.
        plan: ring and scales of encrypted inference.
    """

    network: PolynomialNet
    bound: float
    trained_by: str
    plan: InferencePlan

    @classmethod
    def of(cls, network: PolynomialNet, bound: float, trained_by: str = "") -> TrainedModel:
        """A trained network with the plan that serves it.

        Raises:
            ValueError: no ring has room for it, or a weight is not finite.
        """
        return cls(network, bound, trained_by[:200], plan(polynomial(network, bound)))

    @property
    def polynomial(self) -> Polynomial:
        """Layers and activation as arrays."""
        return polynomial(self.network, self.bound)

    @property
    def features(self) -> FeatureTerms:
        """What an owner must compute."""
        return FeatureTerms.of(self.network.features)

    @property
    def digest(self) -> str:
        """32 hexadecimal digits of all that is in the model's file."""
        found = hashlib.sha256(self._head().encode())
        for name, array in sorted(self._tensors().items()):
            found.update(f"\n{name}\n".encode() + array.tobytes())
        return found.hexdigest()[:32]

    def to_bytes(self) -> bytes:
        """The file's content."""
        return save(self._tensors(), {_KEY: self._head()})

    def _head(self) -> str:
        names: dict[Coefficients, Any] = {held: name for name, held in ACTIVATIONS.items()}
        terms = self.plan.terms
        head = _Head(
            format=_FORMAT,
            features=self.features,
            hidden=self.network.sizes[1:-1],
            classes=self.network.sizes[-1],
            activation=names[self.network.coefficients],
            coefficients=tuple(map(float, self.network.coefficients)),
            bound=float(self.bound),
            degree=terms.ring.degree,
            bits=terms.ring.bits,
            input_bits=terms.input_bits,
            weight_bits=self.plan.weight_bits,
            trained_by=self.trained_by,
        )
        return json.dumps(head.model_dump(), sort_keys=True)

    def _tensors(self) -> dict[str, NDArray[np.float32]]:
        state = self.network.state_dict()
        return {name: np.ascontiguousarray(value.float().numpy()) for name, value in state.items()}


def polynomial(network: PolynomialNet, bound: float) -> Polynomial:
    """A network's layers and activation as arrays.

    Raises:
        ValueError: a weight is not finite, or the bound is none.
    """
    state = {name: value.double().numpy() for name, value in network.state_dict().items()}
    layers = range(len(network.layers))
    return Polynomial(
        tuple(state[f"layers.{layer}.weight"] for layer in layers),
        tuple(state[f"layers.{layer}.bias"] for layer in layers),
        tuple(np.trim_zeros(np.asarray(network.coefficients, np.float64), "b").tolist()),
        bound,
    )


def load(path: Path) -> TrainedModel:
    """The model of a file.

    Raises:
        ModelFileError: there is none, or it is not to be trusted; the message says why.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ModelFileError(f"it has more than {LARGEST_FILE} bytes")
        with safe_open(path, framework="numpy") as file:
            head = _head(file)
            network, bound = _network(head), head.bound
            network.load_state_dict(_state(file, network))
        if tuple(map(float, network.coefficients)) != head.coefficients:
            raise ModelFileError("the activation has other coefficients in this version of Trellis")
        ring = Ring(head.degree, head.bits)
        found = fitted(polynomial(network, bound), ring, head.input_bits, head.weight_bits)
    except OSError as error:
        raise ModelFileError(f"{path} can't be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ModelFileError(f"{path} is no safetensors file: {error}") from error
    except ValueError as error:
        raise ModelFileError(f"{path} holds no model that can be served: {error}") from error
    return TrainedModel(network, bound, head.trained_by, found)


def _head(file: Any) -> _Head:
    text = (file.metadata() or {}).get(_KEY)
    if text is None:
        raise ModelFileError(f"its metadata has no {_KEY!r}: it is another kind of file")
    try:
        return _Head.model_validate_json(text)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ModelFileError("; ".join(list(faults)[:3])) from error


def _network(head: _Head) -> PolynomialNet:
    """A network of the head's sizes, its weights still any."""
    told = head.features
    told.map()
    sizes = (told.size, *head.hidden, head.classes)
    if 4 * sum(map(prod, pairwise(sizes))) > LARGEST_FILE:
        raise ModelFileError(f"layers of {sizes} units are more than {LARGEST_FILE} bytes")
    with torch.random.fork_rng(devices=[]):  # weights are drawn, and thrown away
        return PolynomialNet(
            told.input_shape,
            head.classes,
            hidden=head.hidden,
            activation=head.activation,
            features=told.kind,
            number=told.number,
        )


def _state(file: Any, network: PolynomialNet) -> dict[str, torch.Tensor]:
    """The file's tensors, once they are those that the network asks for."""
    wanted = {name: list(value.shape) for name, value in network.state_dict().items()}
    names = set(file.keys())
    if names != set(wanted):
        raise ModelFileError(f"tensors {sorted(names)[:8]}, and the sizes ask for {list(wanted)}")
    found = {}
    for name, shape in wanted.items():
        part = file.get_slice(name)
        if part.get_shape() != shape or part.get_dtype() != "F32":
            raise ModelFileError(
                f"{name} is {part.get_dtype()} {part.get_shape()}, and should be F32 {shape}"
            )
        found[name] = torch.from_numpy(file.get_tensor(name))
    return found
