"""Tokens from activations by a map that was learnt on other texts.

Whoever holds the clients' half of a model can run public text through it and has pairs of activation and token. Ridge
regression maps activations to the tokens' embeddings (a learned inversion as in Song and Raghunathan 2020, "Information
Leakage in Embedding Models", by a simpler model); cross-entropy over the public tokens' embeddings refines the map by
some epochs of Adam. A guess is the token of the whole vocabulary whose embedding points most nearly the same way, so
tokens that public text does not hold are found as well. What protects the victim's activations must be on the public
ones too: an attacker knows the protocol.

Tensors only: this file knows no wire, run or tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_RIDGE = 1e-3
"""Of a standardised activation's variance."""

_HELD_OUT = 10
"""One token of so many says whether the refined map is the better one."""

_BATCH, _RATE, _SHARPNESS = 256, 1e-3, 3.0


@dataclass(frozen=True)
class Inverter:
    """A linear map from activations to the directions of embeddings.

    Attributes:
        mean: (h,) of public activations.
        deviation: (h,) of them.
        weight: (h, e).
        bias: (e,).
        directions: (V, e), embeddings less their mean, of unit length.
    """

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor
    directions: Tensor

    def guess(self, activations: Tensor) -> Tensor:
        """Token ids, (n,) long, of activations, (n, h)."""
        pointed = self.standardised(activations) @ self.weight + self.bias
        parts = [(part @ self.directions.T).argmax(dim=1) for part in torch.split(pointed, 1024)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)

    def standardised(self, activations: Tensor) -> Tensor:
        """Of mean 0 and variance 1 on public text."""
        return (activations - self.mean) / self.deviation


def fit_inverter(
    activations: Tensor, tokens: Tensor, embeddings: Tensor, *, epochs: int = 3, seed: int = 0
) -> Inverter:
    """Learns to invert; some seconds for 20,000 tokens.

    Args:
        activations: (n, h) float32, of public tokens.
        tokens: (n,) long, which ones.
        embeddings: (V, e) float32, of the vocabulary.
        epochs: of the refinement; 0 for the ridge regression alone.
        seed: of the batches' order.

    Raises:
        ValueError: fewer than 2 · 10 tokens, or an activation that is not finite.
    """
    if len(tokens) < 2 * _HELD_OUT or len(activations) != len(tokens):
        raise ValueError(f"{len(activations)} activations of {len(tokens)} tokens: too few")
    if not activations.isfinite().all():
        raise ValueError("an activation is not finite")
    mean, deviation = activations.mean(dim=0), activations.std(dim=0) + 1e-6
    directions = F.normalize(embeddings - embeddings.mean(dim=0), dim=1)
    x = (activations - mean) / deviation
    gram = x.T @ x + _RIDGE * len(x) * torch.eye(x.shape[1])
    wanted = embeddings[tokens] - embeddings.mean(dim=0)
    weight = torch.linalg.solve(gram, x.T @ wanted)
    ridge = Inverter(mean, deviation, weight, torch.zeros(weight.shape[1]), directions)
    if not epochs:
        return ridge
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    judged, used = order[::_HELD_OUT], order[torch.arange(len(order)) % _HELD_OUT > 0]
    refined = _refined(ridge, x[used], tokens[used], epochs, seed)
    right = [(one.guess(activations[judged]) == tokens[judged]).sum() for one in (ridge, refined)]
    return refined if right[1] > right[0] else ridge


def _refined(start: Inverter, x: Tensor, tokens: Tensor, epochs: int, seed: int) -> Inverter:
    known, places = torch.unique(tokens, return_inverse=True)
    directions = start.directions[known]
    weight, bias = (part.clone().requires_grad_() for part in (start.weight, start.bias))
    sharpness = torch.tensor(_SHARPNESS, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias, sharpness], _RATE)
    random = torch.Generator().manual_seed(seed + 1)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(x), generator=random), _BATCH):
            pointed = F.normalize(x[rows] @ weight + bias, dim=1)
            loss = F.cross_entropy(pointed @ directions.T * sharpness.exp(), places[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return Inverter(start.mean, start.deviation, weight.detach(), bias.detach(), start.directions)
