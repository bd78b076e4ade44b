"""The model that is trained on ciphertexts: public features, linear layers, and a polynomial between them.

Ciphertexts add and multiply and do nothing else, so a unit's activation is a polynomial of low degree. `square`, z², is
CryptoNets' (R. Gilad-Bachrach et al., "CryptoNets: Applying Neural Networks to Encrypted Data with High Throughput and
Accuracy", 2016); `cubic`, z³, is the cube of D. Chen and C. Manning, "A Fast and Accurate Dependency Parser using
Neural Networks", 2014, §3.1: a unit is a sum of products of two, or of three, inputs. Neither has a constant to
choose, and what its derivative needs, z or z², is there from the forward pass. A sigmoid's least-squares cubic (M. Kim
et al., "Secure Logistic Regression Based on Homomorphic Encryption", 2018) is nearly a straight line, and trains worse
in few steps; a rectifier's has no cubic term.

The module is an ordinary one, and the plaintext twin of what is computed on ciphertexts; it knows neither keys nor
levels. Its parameters are `layers.i.weight` (out, in) and `layers.i.bias` (out,).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import sqrt
from typing import Annotated, Final, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from clients.encrypted.features import Kind, feature_map

Activation = Literal["square", "cubic"]
Coefficients = tuple[float, float, float, float]

ACTIVATIONS: Final[dict[str, Coefficients]] = {"square": (0, 0, 1, 0), "cubic": (0, 0, 0, 1)}
"""c₀, c₁, c₂ and c₃ of c₀ + c₁z + c₂z² + c₃z³."""
_GAUSSIAN_MOMENTS: Final = (1, 0, 1, 0, 3, 0, 15)
"""E zᵏ of a standard Gaussian, for k = 0 … 6."""


class PolynomialNet(nn.Module):
    """Linear layers on public features, with a polynomial between them; without hidden layers, logistic regression.

    Weights are Gaussian, hidden units' biases 0. For features of root mean square 1 every hidden unit's pre-activation
    has standard deviation `hidden_scale` at the start, and every logit `logit_scale` (behind a second hidden layer only
    as layers get wide, and cubes late); a ciphertext's bounds begin from them. Logistic regression is convex:
    `logit_scale=0` starts it at 0.

    Args:
        input_shape: shape of one input.
        num_classes: K, number of logits.
        vocab_size: of a task with tokens, which is refused: an id is no quantity.
        hidden: units of each hidden layer, from the input to the output; none for logistic regression.
        activation: `square` | `cubic`.
        features: `raw` | `dct` | `pool` | `hog`, of `clients.encrypted.features`; all but `raw` need images.
        number: of features, as `clients.encrypted.features.feature_map` counts them; None for the map's own.
        hidden_scale: see above.
        logit_scale: see above.
        logit_bias: of each logit at the start. Under the squared loss 1 / K is the best constant to start from.

    Attributes:
        features: the map.
        sizes: (d, units of each hidden layer …, K).
        coefficients: c₀ … c₃ of the activation.

    Raises:
        ValueError: the inputs are tokens, there is no such activation, or no such map of such inputs.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        vocab_size: int | None = None,
        *,
        hidden: Sequence[Annotated[int, Ge(1)]] = (32,),
        activation: Activation = "square",
        features: Kind = "dct",
        number: Annotated[int, Ge(1)] | None = None,
        hidden_scale: Annotated[float, Gt(0)] = 1.0,
        logit_scale: Annotated[float, Ge(0)] = 0.7,
        logit_bias: float = 0.0,
    ) -> None:
        super().__init__()
        if vocab_size is not None:
            raise ValueError(
                "takes numbers, and this task's inputs are tokens: use Gru (model=gru)"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        self.features = feature_map(features, input_shape, number)
        self.sizes: tuple[int, ...] = (self.features.size, *hidden, num_classes)
        self.coefficients = ACTIVATIONS[activation]
        self.layers: Sequence[nn.Linear] = nn.ModuleList(  # type: ignore[assignment]  # of linear layers alone
            nn.Linear(fan_in, out) for fan_in, out in pairwise(self.sizes)
        )
        self._draw(hidden_scale, logit_scale)
        nn.init.constant_(self.layers[-1].bias, logit_bias)

    @torch.no_grad()
    def _draw(self, hidden_scale: float, logit_scale: float) -> None:
        scales = [hidden_scale] * (len(self.layers) - 1) + [logit_scale]
        size = 1.0  # root mean square of what goes into the layer
        for layer, fan_in, scale in zip(self.layers, self.sizes, scales, strict=False):
            nn.init.normal_(layer.weight, std=scale / (size * sqrt(fan_in)))
            nn.init.zeros_(layer.bias)
            size = _root_mean_square(self.coefficients, scale)

    def featurise(self, inputs: Tensor) -> Tensor:
        """(n, d) float32 of inputs, (n, *input_shape) float32, without gradients: what an owner encrypts."""
        with torch.no_grad():
            found: Tensor = self.features(inputs).float()
            return found

    def activate(self, values: Tensor) -> Tensor:
        """The activation, element by element."""
        c0, c1, c2, c3 = self.coefficients
        return c0 + values * (c1 + values * (c2 + values * c3))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, (n, K), of inputs, (n, *input_shape) float32."""
        hidden: Tensor = self.features(inputs)
        for index, layer in enumerate(self.layers):
            hidden = layer(self.activate(hidden) if index else hidden)
        return hidden


def _root_mean_square(coefficients: Coefficients, scale: float) -> float:
    """√E φ(z)² of z ~ N(0, scale²)."""
    return sqrt(
        sum(
            left * right * _GAUSSIAN_MOMENTS[i + j] * scale ** (i + j)
            for i, left in enumerate(coefficients)
            for j, right in enumerate(coefficients)
        )
    )
