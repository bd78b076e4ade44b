"""What one round's updates say of the clients that sent them: pure functions of the updates' inner products.

Everything follows from the Gram matrix of each array of the model, made in one pass over the updates: norms, the
geometric median (Weiszfeld 1937; as an aggregation rule: Pillutla et al. 2022, "Robust Aggregation for Federated
Learning") and the distances and cosines to it, the correlation of what the updates have beside it, and the agreement of
each client with all the others. A liar among many moves a geometric median little however long its lie is; a mean is
the lie's.

The products are float64 and not about a centre: a cosine between two honest updates must survive a third that is 10¹⁰
times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strategies.combiners.geometric_median import weiszfeld
from strategies.update import MAXIMUM_SECTIONS, Update, Vector

Matrix = NDArray[np.float64]

_BLOCK_ELEMENTS = 1 << 17
"""Elements of a float64 block over all updates: a megabyte, about a core's second-level cache."""
_LEAST_COSINE = 0.02
"""Cosines to the reference below it count as this much: who sends noise has some cosine by chance."""
_NEAR = 0.25
"""Of the median distance to the reference: a residual shorter than that correlates with its like only."""
_STEPS = 200
"""Of Weiszfeld's iteration at most."""


@dataclass(frozen=True)
class Grams:
    """Inner products of a round's n updates.

    Attributes:
        whole: of the whole updates, (n, n) float64.
        arrays: of the model's weight matrices one by one, each (n, n) float64. Vectors such as biases have so few
            elements that cosines between them are mostly chance; they count where a model has nothing else.
    """

    whole: Matrix
    arrays: tuple[Matrix, ...]


@dataclass(frozen=True)
class Scores:
    """Figures of each of n clients, all (n,) float64 unless they say otherwise.

    Attributes:
        norm: ‖u‖.
        distance: ‖u − r‖ from the round's geometric median r.
        cosine: between u and r; 0 where one of them is zero.
        excess: ln(‖u‖ / median ‖u‖) + ln(median cosine / cosine): how much longer a way the client goes than the median
            client for the same progress along r. Not finite where the update is zero.
        agreement: the mean over the weight matrices of the cosine between the client's array and the sum of all the
            others', each scaled to length 1: who lies long or often still has one voice among n, and none about itself.
        correlation: (n, n), the cosine between the residuals u − r or that between the updates, whichever is less:
            short updates all lack the same r, and are not alike for it. Of residuals, 0 between one much shorter than
            usual and one that is not, 1 where both are zero.
    """

    norm: Matrix
    distance: Matrix
    cosine: Matrix
    excess: Matrix
    agreement: Matrix
    correlation: Matrix


def grams(updates: Sequence[Update]) -> Grams:
    """The inner products of updates with the same layouts.

    Args:
        updates: n ≥ 1, finite. Sections that are reduced by their maximum are left out: they are no directions.
    """
    n = len(updates)
    whole = np.zeros((n, n))
    matrices: list[Matrix] = []
    others: list[Matrix] = []
    for name, section in updates[0].sections.items():
        if name in MAXIMUM_SECTIONS:
            continue
        vectors = [update.sections[name].vector for update in updates]
        offsets, shapes = section.layout.offsets, section.layout.shapes
        for begin, end, shape in zip(offsets[:-1], offsets[1:], shapes, strict=True):
            gram = inner_products([vector[begin:end] for vector in vectors])
            whole += gram
            (matrices if len(shape) > 1 else others).append(gram)
    return Grams(whole, tuple(matrices or others))


def inner_products(vectors: Sequence[Vector]) -> Matrix:
    """⟨xᵢ, xⱼ⟩, (n, n) float64, of n (d,) float32 vectors that are read in blocks of columns."""
    n, size = len(vectors), len(vectors[0])
    width = max(1, _BLOCK_ELEMENTS // n)
    gram = np.zeros((n, n))
    buffer = np.empty((n, min(width, size)))
    for begin in range(0, size, width):
        block = buffer[:, : min(width, size - begin)]
        for row, vector in zip(block, vectors, strict=True):
            row[...] = vector[begin : begin + block.shape[1]]
        gram += block @ block.T
    return gram


def score(found: Grams) -> Scores:
    """All scores of a round."""
    gram = found.whole
    weights = reference_weights(gram)
    products, square = gram @ weights, float(weights @ gram @ weights)
    squares = gram.diagonal()
    norm = np.sqrt(squares)
    cosine = _ratio(products, norm * np.sqrt(square))
    residual = np.eye(len(gram)) - weights
    between = residual @ gram @ residual.T
    # Of copies of the reference nothing is left but rounding, which correlates with anything.
    distances = np.sqrt(np.where(between.diagonal() > 1e-12 * squares, between.diagonal(), 0.0))
    return Scores(
        norm=norm,
        distance=distances,
        cosine=cosine,
        excess=_excess(norm, cosine),
        agreement=agreement(found.arrays),
        correlation=np.minimum(
            _correlation(between, distances), _ratio(gram, np.outer(norm, norm))
        ),
    )


def reference_weights(gram: Matrix) -> Matrix:
    """Weights of the updates in their geometric median, (n,), smoothed over a millionth of their usual length."""
    usual = max(float(np.median(gram.diagonal())), np.finfo(np.float64).tiny)
    return weiszfeld(gram, 1e-6 * np.sqrt(usual), _STEPS)


def agreement(arrays: Sequence[Matrix]) -> Matrix:
    """See `Scores.agreement`; (n,) from the Gram matrix of each array."""
    each = []
    for gram in arrays:
        norm = np.sqrt(gram.diagonal())
        cosines = _ratio(gram, np.outer(norm, norm))
        own, sums = cosines.diagonal(), cosines.sum(axis=1)
        others = sums.sum() - 2 * sums + own  # ‖Σ of the others‖²
        each.append(_ratio(sums - own, np.sqrt(own * np.maximum(others, 0))))
    return np.asarray(np.mean(each, axis=0))


def groups(correlation: Matrix, least: float) -> list[list[int]]:
    """Sets of two or more clients of which every two correlate by at least `least`, each sorted.

    Complete linkage, the likest pairs first: who mixes several clients' updates is like each of them, and does not make
    them like one another.

    Args:
        correlation: (n, n), as in `Scores`.
        least: in (0, 1].
    """
    n = len(correlation)
    member = list(range(n))
    groups_of = {index: [index] for index in range(n)}
    first, second = np.triu_indices(n, 1)
    strong = np.flatnonzero(correlation[first, second] >= least)
    for pair in strong[np.argsort(-correlation[first[strong], second[strong]], kind="stable")]:
        one, other = member[first[pair]], member[second[pair]]
        if one == other:
            continue
        if correlation[np.ix_(groups_of[one], groups_of[other])].min() >= least:
            for index in groups_of[other]:
                member[index] = one
            groups_of[one] += groups_of.pop(other)
    return sorted(sorted(group) for group in groups_of.values() if len(group) > 1)


def deviation(values: Matrix) -> float:
    """A standard deviation from the lower half of the values, 1.4826 · median (median − x | x ≤ median).

    Outliers above the median, less than half of all, hardly move it; of a symmetric measure they have twice the say.
    """
    middle = np.median(values)
    return 1.4826 * float(np.median(middle - values[values <= middle]))


def _excess(norm: Matrix, cosine: Matrix) -> Matrix:
    typical = max(float(np.median(cosine)), _LEAST_COSINE)
    middle = float(np.median(norm))
    if not middle > 0:  # most clients sent nothing: there is no usual length
        return np.where(norm > 0, np.inf, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(
            np.log(norm / middle) + np.log(typical / np.maximum(cosine, _LEAST_COSINE))
        )


def _correlation(between: Matrix, distances: Matrix) -> Matrix:
    correlation = _ratio(between, np.outer(distances, distances))
    # A geometric median may fall on several equal updates, and they are still equal.
    copies = distances == 0
    correlation[np.ix_(copies, copies)] = 1.0
    # So close to the reference, what is left is that one's own error, and points to whoever is far off.
    near = distances < _NEAR * np.median(distances)
    correlation[near[:, None] != near[None, :]] = 0.0
    return correlation


def _ratio(above: Matrix, below: Matrix) -> Matrix:
    """A cosine from its two halves: within ±1, 0 where a length is 0."""
    safe = np.where(below > 0, below, 1.0)
    return np.asarray(np.clip(np.where(below > 0, above / safe, 0.0), -1.0, 1.0))
