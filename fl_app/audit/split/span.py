"""Which tokens a batch held, from the gradient of the first adapter alone.

Petrov et al. 2024, "DAGER: Exact Gradient Inversion for Large Language Models": a linear layer's gradient
is a sum of outer products with its inputs, so its rows lie in the inputs' span, and where it has the rank of that span,
the tokens whose input lies in it are those of the batch, in one matrix product and without optimisation. For A of a
LoRA layer W·x + s·B·A·x the gradient is s·Bᵀ·δ·xᵀ: at most r rows. Layers that share their input (query and value)
share its span, and their rows are taken together. So a batch of no more tokens than m·r of m such layers is read
exactly; of a longer one the rows span a part only, and what is left is a ranking of the vocabulary by how far each
token lies from that part.

It reads one gradient, or one plain step's change. Tensors and one callable: this file knows no run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Inputs = Callable[[Tensor], Tensor]
"""Tokens, (b,) long, to what the layer would be given for them at each place of a text, (b, places, n) float32."""

MEMBER = 0.05
"""Relative distance below which a token counts as in the span: rounding leaves 1e-3 and less, strangers lie beyond 0.3
unless the span fills nearly all of the input space."""

_RANK = 1e-5
"""Singular values below this share of the largest are rounding."""


def row_space(gradients: Sequence[Tensor], tolerance: float = _RANK) -> Tensor:
    """An orthonormal basis, (rank, n) float32, of the rows of all gradients, (r, n) each.

    Raises:
        ValueError: there are none, of different widths, or one is not finite.
    """
    if not gradients or len({one.shape[1] for one in gradients}) != 1:
        raise ValueError("gradients of layers with the same input are needed")
    rows = torch.cat(list(gradients)).double()
    if not rows.isfinite().all():
        raise ValueError("a gradient is not finite")
    rows = rows[rows.norm(dim=1) > 0]
    if not len(rows):
        return torch.zeros(0, gradients[0].shape[1])
    rows = rows / rows.norm(dim=1, keepdim=True)
    _, singular, basis = torch.linalg.svd(rows, full_matrices=False)
    kept: Tensor = basis[singular > tolerance * singular[0]].float()
    return kept


def distances(
    bases: Sequence[Tensor],
    inputs: Inputs,
    vocabulary: Tensor,
    *,
    batch: int = 256,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """How far each token lies from each span, (k, V) in 0 … 1: of its places the nearest, over its input's length.

    Args:
        bases: k of them, orthonormal rows, (rank, n).
        inputs: what the first layer is given for a token.
        vocabulary: (V,) long.
        batch: tokens at once.
        progress: told of tokens that are done, and of how many.
    """
    found: list[Tensor] = []
    with torch.no_grad():
        for part in torch.split(vocabulary, batch):
            x = inputs(part)
            squares = x.square().sum(dim=2).clamp(min=1e-30)
            within = torch.stack([(x @ basis.T).square().sum(dim=2) for basis in bases]) / squares
            found.append((1 - within).clamp(min=0).sqrt().amin(dim=2))
            progress(sum(part.shape[1] for part in found), len(vocabulary))
    return torch.cat(found, dim=1)


def in_span(apart: Tensor, vocabulary: Tensor, member: float = MEMBER) -> Tensor:
    """The tokens that count as in the span, (k,) long."""
    return vocabulary[apart < member]


def closest(apart: Tensor, vocabulary: Tensor, count: int) -> Tensor:
    """The `count` tokens nearest to the span, (count,) long."""
    return vocabulary[apart.argsort(stable=True)[:count]]
