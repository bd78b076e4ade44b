"""The graph of who masks with whom, and the odds that parts of it come loose.

Bell et al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead". For a server that follows the
protocol, all stand in a circle in random order, each joined to the next few on either side. Against a malicious one,
each draws its own neighbours. The holders of a client's shares are its neighbours and itself, as in Bonawitz et al.
2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", where the graph is complete.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from strategies.secagg.tails import log2_binomial, log2_tails


def circulant(order: Sequence[int], degree: int) -> dict[int, tuple[int, ...]]:
    """Each node's neighbours, sorted: the degree/2 next in `order` on either side, in a circle.

    Args:
        order: the nodes, each once, in an order that is uniformly random.
        degree: even; or len(order) − 1, the complete graph.

    Raises:
        ValueError: a degree that there is no such graph of, or a node given twice.
    """
    members = len(order)
    if len(set(order)) < members:
        raise ValueError("the order of a graph names a node twice")
    if not 1 <= degree < members or (degree % 2 and degree != members - 1):
        raise ValueError(f"degree {degree} among {members}: must be even, or {members - 1} for all")
    if degree == members - 1:
        return {node: tuple(sorted(set(order) - {node})) for node in order}
    steps = [step for near in range(1, degree // 2 + 1) for step in (near, -near)]
    return {
        node: tuple(sorted(order[(place + step) % members] for step in steps))
        for place, node in enumerate(order)
    }


def log2_falls_apart(members: int, degree: int, removed: int) -> float:
    """A bound on log₂ P[the circulant graph without `removed` random nodes is not connected].

    It falls apart only if two separate runs of degree/2 nodes are gone. There are fewer than n²/2 such pairs, and any
    `degree` nodes are all gone with probability Π (removed − j) / (n − j), j < degree.
    """
    if removed < degree or degree >= members - 1:
        return -math.inf
    gone = np.arange(degree)
    return 2 * math.log2(members) - 1 + float(np.log2((removed - gone) / (members - gone)).sum())


def log2_splits_off(members: int, degree: int, inside: int, size: int) -> float:
    """A bound on log₂ P[some `size` nodes each drew at least `inside` of their `degree` neighbours among themselves].

    There are (members choose size) such sets, and all draw uniformly and independently.
    """
    each = float(log2_tails(members - 1, size - 1, degree)[inside])
    return float(log2_binomial(members, np.array([size]))[0]) + size * each
