"""Public feature maps: what an image is turned into before it is encrypted.

They are made of no data, so that they tell nothing and cost no depth: an owner computes them in the clear, whoever
computes on ciphertexts never does. Each is scaled by a constant that depends on sizes alone, so that a feature of
standardised pixels has a root mean square of about 1; bounds and scales of ciphertexts rest on that order of magnitude.
`dct` keeps the lowest frequencies of the two-dimensional cosine transform (N. Ahmed, T. Natarajan and K. R. Rao,
"Discrete Cosine Transform", 1974), `hog` is `clients.models.Hog`'s histograms (N. Dalal and B. Triggs, 2005).

A map is a module without parameters or buffers: nothing of it travels with a model. It knows nothing of ciphertexts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from math import isqrt, prod, sqrt
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clients.models import Hog

Kind = Literal["raw", "dct", "pool", "hog"]

_CELLS = 4
"""Of `hog`, on a side."""
_FORMAT = 1
"""Counted up when a map gives other numbers for the same settings."""


class Features(nn.Module):
    """A map from inputs to features.

    Attributes:
        kind: its name among the maps.
        input_shape: of one input.
        size: d, numbers of one input's features.
    """

    def __init__(self, kind: Kind, input_shape: Sequence[int], size: int) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.input_shape = tuple(input_shape)
        self.size = size

    @property
    def digest(self) -> str:
        """SHA-256 in hex of what decides the map; maps of one digest give the same features up to rounding."""
        told = [_FORMAT, self.kind, list(self.input_shape), self.size]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


class Raw(Features):
    """The inputs as they are, flattened."""

    def __init__(self, input_shape: Sequence[int], number: int | None = None) -> None:
        size = prod(input_shape)
        if number not in (None, size):
            raise ValueError(f"features=raw takes all {size} numbers of an input, not {number}")
        super().__init__("raw", input_shape, size)

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, d) of inputs, (n, *input_shape) float32."""
        return inputs.flatten(1)


class Dct(Features):
    """The lowest coefficients of the orthonormal DCT-II of each channel, by u + v and then by u.

    They are divided by √(height · width / number): pixels of variance 1 whose energy is all in these frequencies, as
    that of natural images nearly is, have coefficients of variance 1.
    """

    def __init__(self, input_shape: Sequence[int], number: int | None = None) -> None:
        channels, height, width = _image("dct", input_shape)
        number = min(64, height * width) if number is None else number
        if not 1 <= number <= height * width:
            raise ValueError(
                f"features=dct has 1 to {height * width} coefficients of an image of {height} x {width}, not {number}"
            )
        super().__init__("dct", input_shape, channels * number)
        u, v = np.divmod(np.arange(height * width), width)
        lowest = np.lexsort((u, u + v))[:number]
        basis = np.einsum("ka,kb->kab", _cosines(height)[u[lowest]], _cosines(width)[v[lowest]])
        basis *= np.sqrt(number / (height * width))
        # No buffer: it is no part of the model's state, and would keep clients from being trained together.
        self._basis = torch.from_numpy(basis.reshape(number, -1).T.astype(np.float32))

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, channels · number) of images, (n, channels, height, width) float32, one channel after another."""
        return (inputs.flatten(2) @ self._basis.to(inputs.device)).flatten(1)


class Pool(Features):
    """Means over a square grid of cells, of each channel."""

    def __init__(self, input_shape: Sequence[int], number: int | None = None) -> None:
        channels, height, width = _image("pool", input_shape)
        side = isqrt(49 if number is None else max(number, 0))
        if not 1 <= side <= min(height, width) or number not in (None, side * side):
            raise ValueError(
                f"features=pool has a square number of cells, on a side at most {min(height, width)}: not {number}"
            )
        super().__init__("pool", input_shape, channels * side * side)
        self._side = side

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, channels · number) of images, (n, channels, height, width) float32."""
        return F.adaptive_avg_pool2d(inputs, self._side).flatten(1)


class Histograms(Features):
    """Histograms of oriented gradients of 4 x 4 cells, times √number."""

    def __init__(self, input_shape: Sequence[int], number: int | None = None) -> None:
        _image("hog", input_shape)
        number = 4 * _CELLS**2 if number is None else number
        orientations, rest = divmod(number, _CELLS**2)
        if rest or orientations < 2:
            raise ValueError(
                f"features=hog has {_CELLS**2} numbers for each of at least two orientations, not {number}"
            )
        super().__init__("hog", input_shape, number)
        # A bound method, so that the model's own linear layer is no part of this module.
        self._histograms = Hog(input_shape, 1, cells=_CELLS, orientations=orientations).features

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, number) of images, (n, channels, height, width) float32, whose channels are averaged."""
        histograms: Tensor = self._histograms(inputs)
        return histograms * sqrt(self.size)


def feature_map(kind: Kind, input_shape: Sequence[int], number: int | None = None) -> Features:
    """The map of a name.

    Args:
        kind: `raw` | `dct` | `pool` | `hog`.
        input_shape: of one input; all but `raw` need an image's, (channels, height, width).
        number: how many: coefficients a channel of `dct` (64 by default), cells a channel of `pool` (49), 16 for each
            orientation of `hog` (64); `raw` takes what there is.

    Raises:
        ValueError: there is no such map of such inputs.
    """
    maps: dict[str, type[Raw | Dct | Pool | Histograms]] = {
        "raw": Raw,
        "dct": Dct,
        "pool": Pool,
        "hog": Histograms,
    }
    if kind not in maps:
        raise ValueError(f"features={kind!r}: choose one of {', '.join(maps)}")
    return maps[kind](input_shape, number)


def _image(kind: str, input_shape: Sequence[int]) -> tuple[int, int, int]:
    if len(input_shape) != 3:
        raise ValueError(
            f"features={kind} takes images of shape (channels, height, width), not {tuple(input_shape)}: "
            "use model.features=raw"
        )
    channels, height, width = input_shape
    return channels, height, width


def _cosines(length: int) -> np.ndarray:
    """The orthonormal DCT-II, (length, length): row u is the cosine of frequency u."""
    places = np.arange(length)
    rows: np.ndarray = np.cos(np.pi * np.outer(places, places + 0.5) / length)
    rows *= np.sqrt(2 / length)
    rows[0] /= np.sqrt(2)
    return rows
