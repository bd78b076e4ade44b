"""What is trained, as both ends must know it before a byte is encrypted: layers, activation, loss, mini-batch."""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Final, Literal, get_args

Loss = Literal["cross_entropy", "squared"]
"""`cross_entropy`: the owner decrypts the logits of its own data, and sends back their errors, encrypted.

`squared` is half the squared distance to the one-hot label: errors are computed on ciphertexts, and the owner decrypts
means alone.
"""

Mode = Literal["ce", "strict"]
LOSSES: Final[dict[Mode, Loss]] = {"ce": "cross_entropy", "strict": "squared"}
"""By the collector's mode."""

Activation = Literal["square", "cubic"]
"""z² or z³."""
POWERS: Final[dict[Activation, int]] = {"square": 2, "cubic": 3}

_MOST_UNITS: Final = 65_536


@dataclass(frozen=True)
class Spec:
    """A fully connected network with a polynomial activation, and one mini-batch of its training.

    Attributes:
        sizes: features, hidden units layer by layer, classes; two numbers are a logistic regression.
        activation: of hidden units.
        loss: what is minimised.
        batch: m, slots for samples; a power of two.

    Raises:
        ValueError: a value is out of its range.
    """

    sizes: tuple[int, ...]
    activation: Activation = "square"
    loss: Loss = "cross_entropy"
    batch: int = 512

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if not 2 <= len(self.sizes) <= 4 or not all(1 <= n <= _MOST_UNITS for n in self.sizes):
            raise ValueError(
                f"sizes {list(self.sizes)} should be features, at most two hidden layers, classes;"
                f" 1 to {_MOST_UNITS} each"
            )
        if self.activation not in POWERS:
            raise ValueError(f"activation {self.activation!r} should be one of {', '.join(POWERS)}")
        if self.loss not in get_args(Loss):
            raise ValueError(f"loss {self.loss!r} should be one of {', '.join(get_args(Loss))}")
        if not 1 <= self.batch <= 8192 or self.batch & (self.batch - 1):
            raise ValueError(f"batch {self.batch} should be a power of two, at most 8192")

    @property
    def power(self) -> int:
        """Degree of the activation."""
        return POWERS[self.activation]

    @property
    def layers(self) -> int:
        """Layers of weights."""
        return len(self.sizes) - 1

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters, in the model's order."""
        found: dict[str, tuple[int, ...]] = {}
        for index, (inputs, outputs) in enumerate(pairwise(self.sizes)):
            found[weight(index)] = (outputs, inputs)
            found[bias(index)] = (outputs,)
        return found

    @property
    def digest(self) -> str:
        """By which both ends know that they mean the same."""
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()[:32]

    def share(self, layer: int, workers: int) -> list[range]:
        """The output units of a layer, cut among workers as evenly as pairs of units can be.

        Where there are fewer pairs than workers, the last shares are empty, and never the first one.
        """
        units = self.sizes[layer + 1]
        pairs = -(-units // 2)
        edges = [min(units, 2 * -(-pairs * index // workers)) for index in range(workers + 1)]
        return [range(start, stop) for start, stop in pairwise(edges)]


def weight(layer: int) -> str:
    """The name of a layer's weights (outputs, inputs)."""
    return f"layers.{layer}.weight"


def bias(layer: int) -> str:
    """The name of a layer's biases (outputs,)."""
    return f"layers.{layer}.bias"
