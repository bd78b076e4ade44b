"""Tokens from activations by looking them up: nothing is learnt and nothing optimised.

Each candidate token is run through the clients' half by itself, between the tokens that begin and end every text; its
activation stands in a dictionary, and an activation that was sent is the token whose entry lies nearest. With few
blocks below the cut a token's activation is mostly its own, whatever stands around it. Ours, and the plainest there is.

It needs the clients' half and no text. Tensors and one callable: this file knows no wire, run or tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Bottom = Callable[[Tensor], Tensor]
"""Tokens, (b, l) long without padding, to activations, (b, l, h) float32."""

_ROWS = 1024


def dictionary(
    bottom: Bottom,
    candidates: Tensor,
    *,
    before: Sequence[int] = (),
    after: Sequence[int] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Each candidate's activation, (c, h).

    Args:
        bottom: the clients' half.
        candidates: (c,) long.
        before: tokens in front of each.
        after: tokens behind it.
        progress: told of candidates that are done, and of how many.
    """
    found: list[Tensor] = []
    with torch.no_grad():
        for part in torch.split(candidates, _ROWS):
            columns = [torch.full_like(part, token) for token in (*before, 0, *after)]
            columns[len(before)] = part
            found.append(bottom(torch.stack(columns, dim=1))[:, len(before)])
            progress(sum(map(len, found)), len(candidates))
    return torch.cat(found)


def nearest(activations: Tensor, entries: Tensor, candidates: Tensor) -> Tensor:
    """The candidates, (n,) long, whose entries, (c, h), lie nearest to activations, (n, h)."""
    squares = (entries**2).sum(dim=1)
    places = [
        (squares - 2 * part @ entries.T).argmin(dim=1) for part in torch.split(activations, _ROWS)
    ]
    return candidates[torch.cat(places)] if places else candidates[:0]
