"""Order statistics of every column: medians, trimmed means, and means of the values nearest to the median.

Few rows are put in order by a sorting network whose wires are whole rows (odd-even merge sort; Batcher 1968, "Sorting
networks and their applications"), pruned to what is asked for. Many rows are sorted column by column, transposed. Both
work in blocks that stay in a core's cache, and a column gives the same bits whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from strategies.combiners.rows import Rows
from strategies.update import Vector

NETWORK_ROWS: Final = 48
"""Up to so many rows a network is faster than sorting columns."""
_NETWORK_WIDTH: Final = 1 << 15
"""Columns at a time: a comparator's work must outweigh its two calls of numpy."""
_SORT_WIDTH: Final = 1 << 11
"""Columns at a time where they are sorted one by one."""

_DROPPED: Final = -1
"""The class of a wire whose value nobody reads."""


class _Comparator(NamedTuple):
    """Moves the smaller of two wires' values to the first and the larger to the second, as far as each is read."""

    low: int
    high: int
    reads_low: bool
    reads_high: bool


def median(rows: Rows, *, threads: int = 1) -> Vector:
    """The median of each column, the mean of the two middle values where n is even: (d,) float32."""
    n = rows.n
    low, high = (n - 1) // 2, n // 2
    # Which of the two middle values is which does not matter to their mean.
    classes = tuple(0 if low <= wire <= high else _DROPPED for wire in range(n))
    half = np.float32(0.5)

    def by_wires(wires: Sequence[Vector], out: Vector) -> None:
        if low == high:
            np.copyto(out, wires[low])
            return
        np.multiply(wires[low], half, out=out)
        out += wires[high] * half

    def by_columns(columns: Vector, out: Vector) -> None:
        np.multiply(columns[:, low], half, out=out)
        out += columns[:, high] * half

    return _ordered(rows, classes, by_wires, by_columns, threads)


def trimmed_mean(rows: Rows, trim: int, *, threads: int = 1) -> Vector:
    """The mean of each column without its `trim` smallest and `trim` largest values: (d,) float32; n > 2·trim."""
    n = rows.n
    kept = range(trim, n - trim)
    classes = tuple(0 if wire in kept else _DROPPED for wire in range(n))
    share = np.float32(1 / len(kept))

    def by_wires(wires: Sequence[Vector], out: Vector) -> None:
        _sum([wires[wire] for wire in kept], out)
        out *= share

    def by_columns(columns: Vector, out: Vector) -> None:
        np.einsum("ij->i", columns[:, trim : n - trim], out=out)  # a third of numpy's own mean
        out *= share

    return _ordered(rows, classes, by_wires, by_columns, threads)


def mean_around_median(rows: Rows, keep: int, *, threads: int = 1) -> Vector:
    """The mean of the `keep` values of each column that are nearest to its median: (d,) float32.

    In a sorted column they are a window; of two that reach equally far, the one of smaller values is taken.
    """
    n = rows.n
    last = n - keep
    low, high = (n - 1) // 2, n // 2
    share = np.float32(1 / keep)

    def by_wires(wires: Sequence[Vector], out: Vector) -> None:
        middle = (wires[low] * np.float32(0.5)) + (wires[high] * np.float32(0.5))
        sums = _window_sums(wires, keep)
        reach = np.maximum(middle - wires[0], wires[keep - 1] - middle)
        np.copyto(out, sums[0])
        for first in range(1, last + 1):
            other = np.maximum(middle - wires[first], wires[first + keep - 1] - middle)
            _replace(out, other < reach, sums[first])
            np.minimum(reach, other, out=reach)
        out *= share

    def by_columns(columns: Vector, out: Vector) -> None:
        middle = (columns[:, low] * np.float32(0.5)) + (columns[:, high] * np.float32(0.5))
        reach = np.maximum(
            middle[:, None] - columns[:, : last + 1], columns[:, keep - 1 :] - middle[:, None]
        )
        first = np.argmin(reach, axis=1) + np.arange(len(columns)) * n
        window = np.take(columns.reshape(-1), first[:, None] + np.arange(keep))
        np.einsum("ij->i", window, out=out)
        out *= share

    return _ordered(rows, tuple(range(n)), by_wires, by_columns, threads)


def _window_sums(wires: Sequence[Vector], keep: int) -> list[Vector]:
    """Σ of wires j … j + keep − 1 for every window j.

    Built up from what all windows share: a running sum would keep the rounding of a huge value that has left it.
    """
    last = len(wires) - keep
    if last >= keep:
        return [_sum(wires[first : first + keep]) for first in range(last + 1)]
    below = [np.zeros_like(wires[0])]
    for wire in reversed(range(last)):
        below.append(below[-1] + wires[wire])
    above = _sum(wires[last:keep])
    sums = [above + below[-1]]
    for first in range(1, last + 1):
        above += wires[keep + first - 1]
        sums.append(above + below[last - first])
    return sums


def _replace(target: Vector, where: NDArray[np.bool_], source: Vector) -> None:
    """Puts source's values into target where the mask says so: by bits, four times as fast as a masked copy."""
    mask = np.negative(where.astype(np.int32))
    bits = target.view(np.int32)
    mask &= bits ^ source.view(np.int32)
    bits ^= mask


def _sum(vectors: Sequence[Vector], out: Vector | None = None) -> Vector:
    total = np.empty_like(vectors[0]) if out is None else out
    np.copyto(total, vectors[0])
    for vector in vectors[1:]:
        total += vector
    return total


_ByWires = Callable[[Sequence[Vector], Vector], None]
_ByColumns = Callable[[Vector, Vector], None]
_T = TypeVar("_T")


def _ordered(
    rows: Rows,
    classes: tuple[int, ...],
    by_wires: _ByWires,
    by_columns: _ByColumns,
    threads: int,
) -> Vector:
    """Orders every column and has one of the two functions reduce it.

    Args:
        rows: n ≥ 1 vectors.
        classes: for each place in the order, `_DROPPED` or a number that places share which may be interchanged.
        by_wires: given n vectors (w,), ordered as far as the classes ask, fills (w,).
        by_columns: given ordered columns (w, n), fills (w,).
        threads: that share the columns.
    """
    result = np.empty(rows.size, np.float32)
    if rows.n <= NETWORK_ROWS:
        width, network = _NETWORK_WIDTH, _network(rows.n, classes)

        def work(begin: int, end: int) -> None:
            pool = list(np.empty((rows.n + 1, min(width, end - begin)), np.float32))
            for start in range(begin, end, width):
                out = result[start : min(start + width, end)]
                spare = [buffer[: len(out)] for buffer in pool]
                wires = _sorted_wires(rows.views(start, start + len(out)), network, spare)
                with np.errstate(over="ignore"):  # of windows that hold liars, which are not taken
                    by_wires(wires, out)

    else:
        width = _SORT_WIDTH

        def work(begin: int, end: int) -> None:
            columns = np.empty((min(width, end - begin), rows.n), np.float32)
            for start in range(begin, end, width):
                part = columns[: min(width, end - start)]
                # Row by row into columns: a third of the time that a transposed copy of a block takes.
                for index, view in enumerate(rows.views(start, start + len(part))):
                    part[:, index] = view
                part.sort(axis=1)
                with np.errstate(over="ignore"):
                    by_columns(part, result[start : start + len(part)])

    _share(work, rows.size, width, threads)
    return result


def _share(work: Callable[[int, int], None], size: int, width: int, threads: int) -> None:
    """Cuts the columns among threads, at multiples of the width; numpy lets go of the interpreter's lock."""
    share = -(-size // (width * threads)) * width if size else 0
    bounds = [(begin, min(begin + share, size)) for begin in range(0, size, share or 1)]
    if len(bounds) <= 1:
        for begin, end in bounds:
            work(begin, end)
        return
    with ThreadPoolExecutor(len(bounds)) as pool:
        for done in [pool.submit(work, begin, end) for begin, end in bounds]:
            done.result()


def _sorted_wires(
    views: Sequence[Vector], network: Sequence[_Comparator], spare: list[Vector]
) -> list[Vector]:
    """The wires' values after the network, in buffers taken from `spare`; the views are only read."""
    wires, own = list(views), [False] * len(views)
    for low, high, reads_low, reads_high in network:
        first, second = wires[low], wires[high]
        free = [wire for wire, mine in ((first, own[low]), (second, own[high])) if mine]
        if reads_low and reads_high:
            wires[low] = spare.pop()
            np.minimum(first, second, out=wires[low])
            wires[high] = free.pop() if free else spare.pop()
            np.maximum(first, second, out=wires[high])
            own[low] = own[high] = True
        else:
            place, pick = (low, np.minimum) if reads_low else (high, np.maximum)
            wires[place] = free.pop() if free else spare.pop()
            pick(first, second, out=wires[place])
            own[low], own[high] = place == low, place == high
        spare += free
    return wires


@lru_cache(maxsize=256)
def _network(n: int, classes: tuple[int, ...]) -> tuple[_Comparator, ...]:
    """Comparators that bring every value to a place of its class.

    Gone through from the end: a comparator is left out where nothing later reads its wires and both end in the same
    class, and computes one side only where the other is dropped.
    """
    settled = [True] * n
    network: list[_Comparator] = []
    for low, high in reversed(_merge_sort(n)):
        if settled[low] and settled[high] and classes[low] == classes[high]:
            continue
        reads_low = not (settled[low] and classes[low] == _DROPPED)
        reads_high = not (settled[high] and classes[high] == _DROPPED)
        network.append(_Comparator(low, high, reads_low, reads_high))
        settled[low] = settled[high] = False
    return tuple(reversed(network))


def _merge_sort(n: int) -> list[tuple[int, int]]:
    """Batcher's odd-even merge sort of n wires: pairs to compare and exchange, in order."""
    pairs: list[tuple[int, int]] = []
    run = 1
    while run < n:
        step = run
        while step >= 1:
            pairs += [
                (wire, wire + step)
                for begin in range(step % run, n - step, 2 * step)
                for wire in range(begin, min(begin + step, n - step))
                if wire // (2 * run) == (wire + step) // (2 * run)
            ]
            step //= 2
        run *= 2
    return pairs
