"""What clients do so that activations tell less of their texts: noise on them, or a loss that keeps them apart.

Noise: a normal number on each element. NoPeek: a term in the clients' loss, α times the distance correlation between
what goes into the model and what leaves the cut (Vepakomma, Singh, Gupta & Raskar 2020, "NoPeek: Information leakage
reduction to share activations in distributed deep learning", §3), as Székely, Rizzo & Bakirov 2007, "Measuring and
testing dependence by correlation of distances", eq. 2.8 to 2.10, define it for samples.

**Neither promises an ε.** Activations have no bound, and so noise on them no sensitivity to be measured against; a
correlation is an average, and says nothing of any one text. What they are worth against which attack is for an audit
to measure. Nothing is known here of models or of what travels.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from clients.split.coding import pack_rows
from strategies.privacy.noise import Entropy, gaussian
from strategies.ranges import Ranged

_SAME = 2.0**-44
"""Squared distances below this share of the largest are rounding errors of float64, and count as zero."""


@dataclass(frozen=True)
class GaussianNoise(Ranged):
    """Independent normal numbers on each element of an activation.

    Attributes:
        std: their standard deviation, in units of the median token's root mean square. In absolute units a setting
            would mean another thing at each cut, since a block adds to its input and activations grow with depth. It
            is the median since some models have a few tokens a hundred times as long as the others (Sun et al. 2024,
            "Massive Activations in Large Language Models"), and one unit for all tokens of a batch since noise in
            units of each token's own would leave its length to be seen.
    """

    std: Annotated[float, Ge(0)] = 0.0

    def __call__(self, activation: Tensor, entropy: Entropy = os.urandom) -> Tensor:
        """The activation (..., h) with noise: a new tensor, whose gradient is the activation's own.

        Args:
            activation: finite; vectors of zeros, as padding has, do not count for the median.
            entropy: gives that many uniform bytes; the operating system's but in tests.
        """
        lengths = activation.detach().double().norm(dim=-1)
        lengths = lengths[lengths > 0]
        if not self.std or not lengths.numel():
            return activation.clone()
        scale = self.std * lengths.median().item() / math.sqrt(activation.shape[-1])
        noise = torch.from_numpy(gaussian(activation.numel(), entropy)).mul_(scale)
        return activation + noise.view(activation.shape).to(activation)


@dataclass(frozen=True)
class NoPeek(Ranged):
    """α times the distance correlation between embeddings and activations, token by token.

    Each token is an observation, not each text's mean: an attacker inverts the vector of one token, and of the few
    texts in a batch the correlation of samples is near 1 whatever they are. With many dimensions it rises to 1 even for
    independent ones (Székely & Rizzo 2013, "The distance correlation t-test of independence in high dimension"): of
    independent normal vectors of 384 numbers it is 0.997 among 8 and 0.87 among 512. So a figure means something only
    beside another of as many tokens, and no figure is near zero.

    Attributes:
        alpha: weight in the clients' loss.
        most: tokens that are compared, evenly spread over the batch; the cost grows with their square.
    """

    alpha: Annotated[float, Ge(0)] = 0.0
    most: Annotated[int, Ge(2)] = 512

    def __call__(self, embeddings: Tensor, activation: Tensor, lengths: Tensor) -> Tensor:
        """The term of the loss, a scalar with a gradient; `alpha` times `correlation`."""
        return self.alpha * self.correlation(embeddings, activation, lengths)

    def correlation(self, embeddings: Tensor, activation: Tensor, lengths: Tensor) -> Tensor:
        """From 0 to 1; draws no random numbers, so that a forward pass can be repeated. 0 of fewer than two tokens.

        Args:
            embeddings: (b, l, e), what goes into the first block.
            activation: (b, l, h), what leaves the last one.
            lengths: tokens of each text, (b,) long; padding is left out.

        Raises:
            ValueError: shapes or lengths do not fit.
        """
        inputs, outputs = pack_rows(embeddings, lengths), pack_rows(activation, lengths)
        if len(inputs) < 2:
            return outputs.sum() * 0
        some = torch.linspace(0, len(inputs) - 1, min(self.most, len(inputs)), dtype=torch.float64)
        chosen = some.round().long().to(inputs.device)
        return distance_correlation(inputs[chosen], outputs[chosen])


def distance_correlation(first: Tensor, second: Tensor) -> Tensor:
    """The distance correlation of n paired observations, a scalar of `second`'s type with a gradient to both.

    With a the distances among the first's rows and A = a − row means − column means + mean, b and B likewise:

        R² = Σ A·B / √(Σ A² · Σ B²),   and R = 0 where one of them is constant.

    1 where one is the other moved, turned, mirrored or scaled; between independent ones it vanishes as n grows, the
    more slowly the more dimensions there are. Distances are taken in float64, from products: n² numbers of memory.

    Args:
        first: (n, p).
        second: (n, q).

    Raises:
        ValueError: fewer than two observations, or not as many in both, or not in rows.
    """
    if first.dim() != 2 or second.dim() != 2 or len(first) != len(second) or len(first) < 2:
        raise ValueError(
            f"distance correlation of {tuple(first.shape)} with {tuple(second.shape)}: two or more "
            f"observations in rows are needed, as many in both"
        )
    a, b = _centred(_distances(first.double())), _centred(_distances(second.double()))
    size = (a * a).sum() * (b * b).sum()
    if not size > 0:
        return (second.sum() * 0).to(second.dtype)
    squared = (a * b).sum() / size.sqrt()
    # No less than zero by definition; where rounding leaves none of it, there is no slope to go down.
    return squared.clamp(min=torch.finfo(torch.float64).eps).sqrt().to(second.dtype)


def _distances(rows: Tensor) -> Tensor:
    """Between all pairs of rows, (n, n); at distance zero the gradient is zero, as good as any."""
    rows = rows - rows.mean(dim=0)  # less to cancel
    squares = (rows * rows).sum(dim=1)
    squared = squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * (rows @ rows.T)
    apart = squared > _SAME * squared.detach().max()
    return torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)


def _centred(distances: Tensor) -> Tensor:
    means = distances.mean(dim=0)
    return distances - means.unsqueeze(0) - means.unsqueeze(1) + means.mean()
