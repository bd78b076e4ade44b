"""Robust rules written down plainly from their papers, in float64: what the fast ones must equal."""

from __future__ import annotations

import numpy as np


def pairwise(updates: np.ndarray) -> np.ndarray:
    x = updates.astype(np.float64)
    return np.array([[((a - b) ** 2).sum() for b in x] for a in x])


def krum_score(distances: np.ndarray, among: list[int], i: int, f: int) -> float:
    others = sorted(distances[i, j] for j in among if j != i)
    return sum(others[: max(1, len(among) - f - 2)])


def krum_order(updates: np.ndarray, f: int) -> list[int]:
    distances, everybody = pairwise(updates), list(range(len(updates)))
    return sorted(everybody, key=lambda i: (krum_score(distances, everybody, i, f), i))


def krum(updates: np.ndarray, f: int) -> np.ndarray:
    return updates[krum_order(updates, f)[0]]


def multi_krum(updates: np.ndarray, f: int, keep: int | None = None) -> np.ndarray:
    keep = len(updates) - f if keep is None else keep
    return updates[krum_order(updates, f)[:keep]].astype(np.float64).mean(axis=0)


def bulyan_selection(updates: np.ndarray, f: int) -> list[int]:
    distances, left, taken = pairwise(updates), list(range(len(updates))), []
    while len(taken) < len(updates) - 2 * f:
        choice = min(left, key=lambda i: (krum_score(distances, left, i, f), i))
        taken.append(choice)
        left.remove(choice)
    return sorted(taken)


def around_median(values: np.ndarray, keep: int) -> np.ndarray:
    """Nearness is judged in float32, as by the fast one: ties are ties for both, and go to the smaller values."""
    middle = np.median(values.astype(np.float64), axis=0).astype(np.float32)
    result = np.empty(values.shape[1])
    for column in range(values.shape[1]):
        ascending = np.sort(values[:, column])
        windows = [ascending[j : j + keep] for j in range(len(ascending) - keep + 1)]
        reach = [max(middle[column] - w[0], w[-1] - middle[column]) for w in windows]
        result[column] = windows[int(np.argmin(reach))].astype(np.float64).mean()
    return result


def bulyan(updates: np.ndarray, f: int) -> np.ndarray:
    return around_median(updates[bulyan_selection(updates, f)], len(updates) - 4 * f)


def median(updates: np.ndarray) -> np.ndarray:
    return np.median(updates.astype(np.float64), axis=0)


def trimmed_mean(updates: np.ndarray, f: int) -> np.ndarray:
    return np.sort(updates.astype(np.float64), axis=0)[f : len(updates) - f].mean(axis=0)


def geometric_median(updates: np.ndarray, smoothing: float, iterations: int) -> np.ndarray:
    x = updates.astype(np.float64)
    z = x.mean(axis=0)
    for _ in range(iterations):
        pulls = 1 / np.maximum(smoothing, np.sqrt(((x - z) ** 2).sum(axis=1)))
        z = (pulls[:, None] * x).sum(axis=0) / pulls.sum()
    return z


def centered_clipping(
    updates: np.ndarray, centre: np.ndarray, tau: float, iterations: int
) -> np.ndarray:
    x, v = updates.astype(np.float64), centre.astype(np.float64)
    for _ in range(iterations):
        difference = x - v
        lengths = np.sqrt((difference**2).sum(axis=1))
        v = v + (difference * np.minimum(1, tau / np.maximum(lengths, 1e-300))[:, None]).mean(
            axis=0
        )
    return v


def fltrust(updates: np.ndarray, root: np.ndarray) -> np.ndarray:
    x, g = updates.astype(np.float64), root.astype(np.float64)
    lengths, length = np.sqrt((x**2).sum(axis=1)), np.sqrt((g**2).sum())
    trust = np.maximum(0, x @ g / (lengths * length))
    return (trust[:, None] * x * (length / lengths)[:, None]).sum(axis=0) / trust.sum()


def nnm(updates: np.ndarray, f: int) -> np.ndarray:
    distances, keep = pairwise(updates), len(updates) - f
    x = updates.astype(np.float64)
    return np.array(
        [
            x[sorted(range(len(x)), key=lambda j: (distances[i, j], j))[:keep]].mean(axis=0)
            for i in range(len(x))
        ]
    )
