"""Partitions drawn without flwr-datasets are flwr-datasets' own, row for row; nothing of it is imported for them."""

import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.tasks.drawing import DIRECT, draw
from clients.tasks.partition_settings import PartitionSettings

PLAIN = PartitionSettings(
    num_clients=1,
    name="iid",
    alpha=1.0,
    min_partition_size=1,
    classes_per_client=1,
    shards_per_client=1,
    seed=0,
)


def by_flower(one: PartitionSettings, column: np.ndarray, seed: int) -> list[list[int]]:
    """What flwr-datasets' partitioner gives for a data set of this column."""
    from datasets import Dataset
    from flwr_datasets import partitioner as flower

    clients = one.num_clients
    made = {
        "iid": lambda: flower.IidPartitioner(clients),
        "linear": lambda: flower.LinearPartitioner(clients),
        "square": lambda: flower.SquarePartitioner(clients),
        "natural": lambda: flower.GroupedNaturalIdPartitioner(
            partition_by="column", group_size=1, sort_unique_ids=True
        ),
        "dirichlet": lambda: flower.DirichletPartitioner(
            num_partitions=clients,
            partition_by="column",
            alpha=one.alpha,
            min_partition_size=0,
            seed=seed,
        ),
    }[one.name]()
    made.dataset = Dataset.from_dict({"column": column, "row": np.arange(len(column))})
    return [list(made.load_partition(client)["row"]) for client in range(clients)]


def rows_of(parts: list[np.ndarray]) -> list[list[int]]:
    return [part.tolist() for part in parts]


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(DIRECT)),
    clients=st.integers(1, 7),
    examples=st.integers(150, 300),
    classes=st.integers(1, 12),
    alpha=st.sampled_from([0.01, 0.1, 0.5, 1.0, 100.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_partition_is_what_flower_draws(name, clients, examples, classes, alpha, seed):
    column = np.random.default_rng(seed).integers(classes, size=examples)
    if name == "natural":
        column[:clients] = np.arange(clients)
        column %= clients
    one = replace(PLAIN, num_clients=clients, name=name, alpha=alpha)
    found = draw(one, column, seed)
    assert all(part.dtype == np.int64 for part in found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert rows_of(found) == by_flower(one, column, seed)


def test_a_class_that_is_missing_takes_no_draw():
    """The generator is called once for each class that is there, as Flower does."""
    column = np.array([0, 4, 4, 0, 9, 9, 9, 4] * 8)
    one = replace(PLAIN, num_clients=3, name="dirichlet", alpha=0.5)
    assert rows_of(draw(one, column, 11)) == by_flower(one, column, 11)


def test_a_device_imports_no_pandas_for_its_part():
    code = f"""
import sys
from clients.tasks import Digits, FederatedData, Mnist

class Owned(Mnist):
    def natural_ids(self):
        return [str(row % 7) for row in range(len(self.train()))]

for partition in {sorted(DIRECT)}:
    assert len(FederatedData(Owned(), 4, partition=partition).train(2))
assert len(FederatedData(Digits(), 4).train(2))
heavy = {{"pandas", "pyarrow", "datasets", "flwr_datasets", "matplotlib", "seaborn", "sklearn"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
