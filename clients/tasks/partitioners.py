"""The partitioners of flwr-datasets, asked for row numbers only.

They work on an in-memory `datasets.Dataset` of one column: no network, no file. Importing this module
takes seconds (flwr-datasets brings pandas, Arrow and seaborn), so it is imported when a partition is
drawn and not before.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from datasets import Dataset
from flwr_datasets import partitioner as flwr_partitioners

from clients.tasks.partition_settings import PartitionSettings


def draw(settings: PartitionSettings, column: np.ndarray, seed: int) -> list[np.ndarray]:
    """Draw a partition of the rows of `column`.

    Args:
        settings: which partitioner, and its numbers; `min_partition_size` is the caller's to check.
        column: (n,) int64, the labels or owners that the partitioner looks at, numbered from 0;
            sorted where the partition is "shard".
        seed: of the draw.

    Returns:
        For each client the (k,) int64 rows it holds.

    Raises:
        ValueError: the partitioner refuses, with its reason.
    """
    partitioner = _partitioner(settings, len(column), seed)
    ledger = _RowLedger.from_dict({"column": column})
    partitioner.dataset = ledger
    rows = []
    with _known_warnings():
        for client in range(settings.num_clients):
            partitioner.load_partition(client)
            rows.append(ledger.rows)
    return rows


class _RowLedger(Dataset):  # type: ignore[misc]  # datasets ships no types
    """A dataset that notes which rows a partitioner selects instead of selecting them.

    Each partitioner ends in ``dataset.select(rows)``. As an Arrow table that takes about a
    millisecond per client, minutes for 100,000 clients, and only the row numbers are wanted.
    ShardPartitioner also sorts through ``select``, which changes nothing where the column is sorted
    already: Arrow's sort is stable.
    """

    rows: np.ndarray

    def __getitem__(self, key: Any) -> Any:
        """The (n,) int64 column `key`, as an array: as Python numbers a million take seconds."""
        return self.data.column(key).to_numpy()

    def select(self, indices: Any, *args: Any, **options: Any) -> "_RowLedger":
        """Note the (k,) row numbers in `rows`."""
        self.rows = np.asarray(indices, dtype=np.int64)
        return self


def _partitioner(settings: PartitionSettings, examples: int, seed: int) -> Any:
    clients = settings.num_clients
    seeded: dict[str, Any] = {"partition_by": "column", "seed": seed}
    match settings.name:
        case "inner_dirichlet":
            sizes = np.diff(np.arange(clients + 1) * examples // clients)
            return flwr_partitioners.InnerDirichletPartitioner(
                partition_sizes=sizes, alpha=float(settings.alpha), **seeded
            )
        case "pathological":
            return flwr_partitioners.PathologicalPartitioner(
                num_partitions=clients,
                num_classes_per_partition=settings.classes_per_client,
                class_assignment_mode="first-deterministic",
                **seeded,
            )
        case "shard":
            return flwr_partitioners.ShardPartitioner(
                num_partitions=clients,
                num_shards_per_partition=settings.shards_per_client,
                **seeded,
            )
        case _:
            raise ValueError(f"partition={settings.name} is not drawn by flwr-datasets")


@contextmanager
def _known_warnings() -> Iterator[None]:
    """Silence what the caller answers for itself: by an error, or by counting unassigned rows."""
    with warnings.catch_warnings():
        for message, category in (
            ("Classes: .* will NOT be used", UserWarning),
            ("Specifying null_placement", FutureWarning),
            ("invalid value encountered in divide", RuntimeWarning),
        ):
            warnings.filterwarnings("ignore", message=message, category=category)
        yield
