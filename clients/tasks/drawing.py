"""The partitions of flwr-datasets that are a few array operations, row for row what its partitioners give.

flwr-datasets brings pandas, Arrow and seaborn: 170 MB in the memory of a device that trains 30 kB of weights, and
seconds before its first batch. These five need none of it, so they are drawn here, by the same calls of the same
generator; tests hold each against flwr-datasets' own, whose definitions stand. The others are drawn by flwr-datasets
itself (`clients.tasks.partitioners`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from clients.tasks.partition_settings import PartitionName, PartitionSettings


def draw(settings: PartitionSettings, column: np.ndarray, seed: int) -> list[np.ndarray]:
    """Draw a partition of the rows of `column`; arguments and result as in `clients.tasks.partitioners.draw`.

    Raises:
        KeyError: a partition that is not one of `DIRECT`.
    """
    return DIRECT[settings.name](settings, column, seed)


def _iid(settings: PartitionSettings, column: np.ndarray, seed: int) -> list[np.ndarray]:
    return np.array_split(np.arange(len(column)), settings.num_clients)


def _by_size(
    units: np.ndarray, settings: PartitionSettings, column: np.ndarray
) -> list[np.ndarray]:
    """Blocks of rows in the ratio of the units, rounded down; the last client has what is left."""
    sizes = np.array(units / units.sum() * len(column), dtype=np.int64)
    return np.split(np.arange(len(column)), np.cumsum(sizes)[:-1])


def _linear(settings: PartitionSettings, column: np.ndarray, seed: int) -> list[np.ndarray]:
    return _by_size(np.arange(1.0, settings.num_clients + 1), settings, column)


def _square(settings: PartitionSettings, column: np.ndarray, seed: int) -> list[np.ndarray]:
    return _by_size(np.arange(1.0, settings.num_clients + 1) ** 2, settings, column)


def _natural(settings: PartitionSettings, column: np.ndarray, seed: int) -> list[np.ndarray]:
    """One client an owner."""
    return _by_owner(np.arange(len(column)), column, settings.num_clients)


def _dirichlet(settings: PartitionSettings, column: np.ndarray, seed: int) -> list[np.ndarray]:
    """Each class in pieces as a draw of Dirichlet(alpha) says, one a client; then each client's rows shuffled."""
    rng = np.random.default_rng(seed)
    alpha = np.full(settings.num_clients, float(settings.alpha))
    rows, owners = [], []
    for label in np.unique(column):
        of_class = np.flatnonzero(column == label)
        ends = (np.cumsum(rng.dirichlet(alpha)) * len(of_class)).astype(int)[:-1]
        pieces = np.diff(ends, prepend=0, append=len(of_class))
        rows.append(of_class)
        owners.append(np.repeat(np.arange(settings.num_clients), pieces))
    parts = _by_owner(np.concatenate(rows), np.concatenate(owners), settings.num_clients)
    for part in parts:
        rng.shuffle(part)
    return parts


def _by_owner(rows: np.ndarray, owners: np.ndarray, clients: int) -> list[np.ndarray]:
    """Rows of each owner, in the order in which they come."""
    order = np.argsort(owners, kind="stable")
    ends = np.cumsum(np.bincount(owners, minlength=clients))[:-1]
    return np.split(rows[order], ends)


DIRECT: Mapping[PartitionName, Callable[..., list[np.ndarray]]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "linear": _linear,
    "square": _square,
    "natural": _natural,
}
"""Those that are drawn here, by name."""
