"""Aggregation rules as pure functions over a matrix of updates: (n, d) float32 in, (d,) float32 out.

    from strategies.combiners.functional import multi_krum
    aggregate = multi_krum(updates, f=2)

They do not change their input and know nothing of clients, messages or models. Give them deltas (or gradients), n ≥ 1
rows of finite numbers whose sums float32 can hold. Every one raises `ValueError` for NaN and infinities, and for fewer
rows than its f needs. Ties go to the first row. `threads` may share the work of the coordinate-wise rules; the result
is the same for any number.
"""

from __future__ import annotations

from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from strategies.combiners.bulyan import Bulyan
from strategies.combiners.clipping import CenteredClipping, NormBounding
from strategies.combiners.coordinates import Median, TrimmedMean
from strategies.combiners.fltrust import FLTrust
from strategies.combiners.geometric_median import GeometricMedian
from strategies.combiners.krum import Krum, MultiKrum
from strategies.combiners.majority_vote import MajorityVote
from strategies.combiners.mixing import Bucketing, NearestNeighborMixing
from strategies.combiners.robust import Robust, Side
from strategies.combiners.rows import Mixed, Rows, Stack
from strategies.combiners.summation import CompensatedSum
from strategies.update import Vector

__all__ = [
    "bucketing",
    "bulyan",
    "centered_clipping",
    "fltrust",
    "geometric_median",
    "krum",
    "majority_vote",
    "mean",
    "median",
    "multi_krum",
    "nnm",
    "norm_bounding",
    "trimmed_mean",
]

Updates = NDArray[np.float32]
"""(n, d) float32; anything that numpy makes such an array of is taken too."""


def mean(updates: Updates, *, weights: ArrayLike | None = None) -> Vector:
    """The (weighted) arithmetic mean (McMahan et al. 2017, Algorithm 1).

    Args:
        updates: (n, d) float32, n ≥ 1.
        weights: (n,) non-negative numbers with a positive sum; equal ones when None.

    Returns:
        (d,) float32. The sum is compensated: its error relative to Σ|w·x| is that of one rounding, for any order.

    Raises:
        ValueError: there is no update, or the weights are not n numbers as described.
    """
    matrix = _matrix(updates)
    scale = np.ones(len(matrix)) if weights is None else np.asarray(weights, np.float64)
    if (
        scale.shape != (len(matrix),)
        or not np.isfinite(scale).all()
        or (scale < 0).any()
        or not scale.sum() > 0
    ):
        raise ValueError(f"weights should be {len(matrix)} finite numbers >= 0, not all 0")
    total = CompensatedSum(matrix.shape[1])
    for weight, row in zip(scale, matrix, strict=True):
        total.add(row, float(weight))
    return total.mean(float(scale.sum())).astype(np.float32)


def krum(updates: Updates, *, f: int) -> Vector:
    """The update nearest to its n − f − 2 nearest others (Blanchard et al. 2017, §4); n ≥ 2f + 3."""
    return _apply(Krum(f=f), updates)


def multi_krum(updates: Updates, *, f: int, keep: int | None = None) -> Vector:
    """The mean of the `keep` updates of smallest Krum score (Blanchard et al. 2017, §4); n ≥ 2f + 3.

    Args:
        updates: (n, d) float32.
        f: updates that may be anything.
        keep: m, at most n − f; None for n − f.
    """
    return _apply(MultiKrum(f=f, keep=keep), updates)


def bulyan(updates: Updates, *, f: int, threads: int = 1) -> Vector:
    """Krum's choices one after the other, trimmed round their median (El Mhamdi et al. 2018, §4); n ≥ 4f + 3."""
    return _apply(Bulyan(f=f), updates, Side(threads=threads))


def median(updates: Updates, *, f: int = 0, threads: int = 1) -> Vector:
    """The coordinate-wise median (Yin et al. 2018, Definition 1); the result does not depend on f; n > 2f."""
    return _apply(Median(f=f), updates, Side(threads=threads))


def trimmed_mean(updates: Updates, *, f: int, threads: int = 1) -> Vector:
    """The coordinate-wise mean without the f smallest and f largest values (Yin et al. 2018, Definition 2); n > 2f."""
    return _apply(TrimmedMean(f=f), updates, Side(threads=threads))


def majority_vote(updates: Updates, *, f: int = 0) -> Vector:
    """The majority's sign of each coordinate, times the median of ‖x‖₁ / d (Bernstein et al. 2019, Algorithm 1).

    Args:
        updates: (n, d) float32; n > 2f.
        f: updates that may be anything; the result does not depend on it.
    """
    return _apply(MajorityVote(f=f), updates)


def geometric_median(
    updates: Updates, *, f: int = 0, smoothing: float = 1e-6, iterations: int = 1000
) -> Vector:
    """The geometric median by smoothed Weiszfeld steps (Pillutla et al. 2022, Algorithm 2); n > 2f.

    Args:
        updates: (n, d) float32.
        f: updates that may be anything; the result does not depend on it.
        smoothing: ν, a distance below which an update pulls no harder.
        iterations: steps at most, from the mean of the closest majority; fewer where they become too short to tell.
    """
    rule = GeometricMedian(f=f, smoothing=smoothing, iterations=iterations)
    return _apply(rule, updates)


def centered_clipping(
    updates: Updates,
    *,
    f: int = 0,
    centre: Vector | None = None,
    tau: float | None = None,
    iterations: int = 1,
) -> Vector:
    """Steps from a centre to the mean of the updates clipped round it (Karimireddy et al. 2021, eq. CC); n > 2f.

    Args:
        updates: (n, d) float32.
        f: updates that may be anything; the result does not depend on it.
        centre: v₀, (d,) float32: the last round's aggregate; None for the origin.
        tau: τ, the distance beyond which an update is clipped; None for the median distance.
        iterations: steps.
    """
    matrix = _matrix(updates)
    side = Side(centre=None if centre is None else (_vector(centre, matrix, "centre"),))
    return _apply(CenteredClipping(f=f, tau=tau, iterations=iterations), matrix, side)


def norm_bounding(updates: Updates, *, f: int = 0, bound: float | None = None) -> Vector:
    """The mean of updates scaled down to a norm (Sun et al. 2019, §4); n > 2f.

    Args:
        updates: (n, d) float32.
        f: updates that may be anything; the result does not depend on it.
        bound: the norm; None for the median of the updates' norms.
    """
    return _apply(NormBounding(f=f, bound=bound), updates)


def fltrust(updates: Updates, *, root: Vector, f: int = 0) -> Vector:
    """The mean by trust in the server's own update (Cao et al. 2021, Algorithm 2); n > f.

    Args:
        updates: (n, d) float32.
        root: g₀, (d,) float32: what the server made of clean data of its own.
        f: updates that may be anything; the result does not depend on it.
    """
    matrix = _matrix(updates)
    return _apply(FLTrust(f=f), matrix, Side(root=(_vector(root, matrix, "root"),)))


@overload
def nnm(updates: Updates, *, f: int) -> Updates: ...
@overload
def nnm(updates: Updates, *, f: int, rule: Robust, threads: int = 1) -> Vector: ...
def nnm(
    updates: Updates, *, f: int, rule: Robust | None = None, threads: int = 1
) -> Vector | Updates:
    """Nearest-neighbour mixing (Allouah et al. 2023, Algorithm 2); n > 2f.

    Args:
        updates: (n, d) float32.
        f: updates that may be anything.
        rule: a combiner, as `TrimmedMean()`, that the means go through without being written down; it takes this f.
        threads: as elsewhere.

    Returns:
        The (n, d) means, each of an update's n − f nearest, itself included; (d,) with a rule.
    """
    side = Side(threads=threads)
    if rule is not None:
        return _apply(NearestNeighborMixing(f=f, rule=rule), updates, side)
    rows = _checked(NearestNeighborMixing(f=f), updates, f)
    return _written(Mixed(rows, NearestNeighborMixing(f=f).mixing(rows, f, side)))


@overload
def bucketing(updates: Updates, *, size: int = 2, seed: int | None = None) -> Updates: ...
@overload
def bucketing(
    updates: Updates,
    *,
    f: int,
    rule: Robust,
    size: int = 2,
    seed: int | None = None,
    threads: int = 1,
) -> Vector: ...
def bucketing(
    updates: Updates,
    *,
    f: int = 0,
    rule: Robust | None = None,
    size: int = 2,
    seed: int | None = None,
    threads: int = 1,
) -> Vector | Updates:
    """Means of random buckets (Karimireddy et al. 2022, Algorithm 1).

    Args:
        updates: (n, d) float32.
        f: updates that may be anything, for the rule.
        rule: a combiner, as `TrimmedMean()`, that the means go through without being written down; it takes this f.
        size: s, updates a bucket.
        seed: of the partition; None draws it from the operating system's entropy.
        threads: as elsewhere.

    Returns:
        The (⌈n / size⌉, d) means, in random order; (d,) with a rule.
    """
    side = Side(threads=threads)
    if rule is not None:
        return _apply(Bucketing(f=f, rule=rule, size=size, seed=seed), updates, side)
    rows = Stack.of(_matrix(updates))
    return _written(Mixed(rows, Bucketing(size=size, seed=seed).mixing(rows, f, side)))


def _apply(rule: Robust, updates: Updates, side: Side | None = None) -> Vector:
    f = rule.f or 0
    return rule.combine(_checked(rule, updates, f), f, side or Side())


def _checked(rule: Robust, updates: Updates, f: int) -> Stack:
    matrix = _matrix(updates)
    if len(matrix) < rule.least(f):
        raise ValueError(
            f"{rule.label} with f = {f} needs at least {rule.least(f)} updates and got {len(matrix)}"
        )
    return Stack.of(matrix)


def _matrix(updates: Updates) -> Updates:
    """The (n, d) float32 matrix, its numbers known to be finite.

    Raises:
        ValueError: it is not that.
    """
    matrix = np.asarray(updates, np.float32)
    if matrix.ndim != 2 or not len(matrix):
        raise ValueError(
            f"updates should be a matrix (n, d) with n >= 1, not of shape {matrix.shape}"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        for index, row in enumerate(matrix):
            # A NaN or an infinity shows in the product with itself; so may huge numbers, which are looked at again.
            if not np.isfinite(row @ row) and not np.isfinite(row).all():
                raise ValueError(f"update {index} holds NaN or an infinity: leave it out")
    return matrix


def _vector(values: Vector, matrix: Updates, name: str) -> Vector:
    vector = np.asarray(values, np.float32)
    if vector.shape != matrix.shape[1:] or not np.isfinite(vector).all():
        raise ValueError(
            f"{name} should be {matrix.shape[1]} finite numbers, not of shape {vector.shape}"
        )
    return vector


def _written(rows: Rows) -> Updates:
    matrix = np.empty((rows.n, rows.size), np.float32)
    for begin, block in rows.blocks():
        matrix[:, begin : begin + block.shape[1]] = block
    return matrix
