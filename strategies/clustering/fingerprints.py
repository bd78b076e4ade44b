"""What tells clients with different tasks apart: the direction in which each moves its adapters' second factors.

In W·x + s·B·A·x all B are zero at first, so a step on B is a step on the product, in coordinates that the clients
share: A is the same for all of them. Angles between clients' updates tell what they learn, as in Sattler et al. 2019,
"Clustered Federated Learning: Model-Agnostic Distributed Multi-Task Optimization under Privacy Constraints". This file
knows names and vectors; which clients are alike is decided in `clusters`.

One update is mostly the noise of its batches: directions are added up over rounds, each of length 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from strategies.update import Layout, Update

Matrix = NDArray[np.float64]

SUFFIX: Final = ".B.weight"
"""Of the names of the arrays that are looked at."""


def trained(update: Update) -> dict[str, int]:
    """The B that a client trains, each with its rank: the second length of (m, r)."""
    part = update.delta.part or update.delta.layout
    return {
        name: shape[1]
        for name, shape in zip(part.names, part.shapes, strict=True)
        if name.endswith(SUFFIX) and len(shape) == 2
    }


def common(ranks: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The B that all clients train, each with the smallest rank: else clients would be grouped by their rank."""
    found: dict[str, int] | None = None
    for each in ranks:
        found = (
            dict(each)
            if found is None
            else {name: min(rank, each[name]) for name, rank in found.items() if name in each}
        )
    return found or {}


def coordinates(layout: Layout, ranks: Mapping[str, int]) -> NDArray[np.int64]:
    """Places in the layout's vector of the first columns of each B, (k,) rising.

    Args:
        layout: of the whole model.
        ranks: how many columns of each B; others are left out.
    """
    places = layout.views(np.arange(layout.size, dtype=np.float64))
    chosen = [places[name][:, :rank].ravel() for name, rank in ranks.items()]
    return np.sort(np.concatenate(chosen)).astype(np.int64) if chosen else np.zeros(0, np.int64)


def units(rows: Matrix) -> Matrix:
    """Rows scaled to length 1, (n, k); a row of zeros stays."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(length > 0, length, 1.0))


def fingerprints(directions: Matrix) -> Matrix:
    """What is left of clients' directions without what they have in common, each of length 1.

    Args:
        directions: (n, k), a row for each client, of any length.

    Returns:
        (n, k) float64: rows of length 1 less their mean, and scaled to length 1 again. All tasks on one pretrained
        model share much of their way; a cosine that includes it says less of what is different.
    """
    rows = units(directions)
    return units(rows - rows.mean(axis=0))
