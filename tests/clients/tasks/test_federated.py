"""A task's training data cut among clients."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.tasks import Digits, Examples, FederatedData, Mnist, PartitionError, Task

COVERING = ["iid", "dirichlet", "inner_dirichlet", "linear", "square", "natural"]
LEAVING = ["pathological", "shard"]


class Labelled(Task):
    """Examples that are their own row numbers, with given labels."""

    input_shape = (1,)

    def __init__(self, labels, owners=None):
        self._targets = torch.as_tensor(np.asarray(labels))
        self._owners = owners
        self.num_classes = int(self._targets.max()) + 1

    def train(self):
        return Examples(torch.arange(float(len(self._targets))).reshape(-1, 1), self._targets)

    def test(self):
        return self.train()

    def natural_ids(self):
        return self._owners


def balanced(examples, classes=5, owners=None):
    return Labelled(np.arange(examples) % classes, owners)


def held(data):
    """The row numbers of every client's two parts, as the examples show them."""
    return [
        [part.inputs.flatten().long().numpy() for part in (data.train(c), data.test(c))]
        for c in range(data.num_clients)
    ]


def counts_of(data):
    return np.array([data.train(c).targets.bincount(minlength=5).numpy() for c in range(4)])


@settings(deadline=None, max_examples=60)
@given(
    partition=st.sampled_from(COVERING + LEAVING),
    examples=st.integers(60, 200),
    clients=st.integers(1, 5),
    fraction=st.sampled_from([0.0, 0.01, 0.2, 0.5, 0.99]),
    seed=st.integers(0, 2**63),
)
def test_every_example_is_in_one_part_of_one_client(partition, examples, clients, fraction, seed):
    task = balanced(examples, owners=[f"owner {i % 7}" for i in range(examples)])
    data = FederatedData(
        task, clients, partition=partition, alpha=1.0, test_fraction=fraction, seed=seed
    )
    parts = held(data)
    rows = np.concatenate([part for client in parts for part in client])
    assert len(np.unique(rows)) == len(rows) == examples - data.unassigned
    assert data.unassigned == 0 or partition in LEAVING
    assert data.sizes.tolist() == [len(train) for train, _ in parts]
    assert data.sizes.dtype == np.int64
    for train, test in parts:
        share = fraction * (len(train) + len(test))
        assert len(train) >= 1
        assert abs(len(test) - share) <= 1
        assert (len(test) >= 1) == (fraction > 0)


@pytest.mark.parametrize("partition", COVERING + LEAVING)
def test_the_seed_alone_decides_the_cut(partition):
    def rows(seed):
        task = balanced(120, owners=[f"{i % 9}" for i in range(120)])
        torch.manual_seed(seed + 100)
        parts = held(FederatedData(task, 4, partition=partition, alpha=1.0, seed=seed))
        return [part.tolist() for client in parts for part in client]

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)


def test_iid_clients_hold_equal_numbers_of_a_shuffled_whole():
    data = FederatedData(balanced(100), 4, partition="iid", test_fraction=0.0)
    assert data.sizes.tolist() == [25] * 4
    assert (counts_of(data) > 0).all()


def test_a_small_alpha_makes_clients_less_alike_than_a_large_one():
    def spread(alpha, partition):
        data = FederatedData(balanced(2000), 4, partition=partition, alpha=alpha)
        shares = data.label_counts() / data.label_counts().sum(axis=1, keepdims=True)
        return shares.std(axis=0).mean()

    for partition in ("dirichlet", "inner_dirichlet"):
        assert spread(0.2, partition) > 2 * spread(100.0, partition)


def test_inner_dirichlet_clients_hold_equal_numbers():
    data = FederatedData(balanced(202), 4, partition="inner_dirichlet", alpha=0.3)
    assert data.label_counts().sum(axis=1).tolist() == [50, 51, 50, 51]


def test_pathological_clients_hold_exactly_the_classes_asked_for():
    data = FederatedData(balanced(200), 8, partition="pathological", classes_per_client=2)
    assert ((data.label_counts() > 0).sum(axis=1) == 2).all()


def test_classes_that_no_client_drew_are_counted_as_unassigned():
    data = FederatedData(balanced(200), 2, partition="pathological", classes_per_client=1)
    assert data.unassigned == 120


def test_shards_hold_few_classes_and_their_remainder_is_counted_as_unassigned():
    data = FederatedData(balanced(203), 5, partition="shard", shards_per_client=2)
    assert data.label_counts().sum(axis=1).tolist() == [40] * 5
    assert data.unassigned == 3
    assert ((data.label_counts() > 0).sum(axis=1) <= 4).all()


def test_linear_and_square_sizes_grow_as_their_names_say():
    linear = FederatedData(balanced(1000), 4, partition="linear", test_fraction=0.0)
    square = FederatedData(balanced(3000), 4, partition="square", test_fraction=0.0)
    assert linear.sizes.tolist() == [100, 200, 300, 400]
    assert square.sizes.tolist() == [100, 400, 900, 1600]


def test_natural_clients_hold_one_owner_each_where_there_are_as_many():
    owners = [f"owner {i % 3}" for i in range(60)]
    data = FederatedData(balanced(60, owners=owners), 3, partition="natural")
    for client, (train, test) in enumerate(held(data)):
        assert {row % 3 for row in [*train, *test]} == {client}


def test_natural_owners_stay_whole_where_clients_are_fewer():
    owners = [f"owner {i % 10}" for i in range(100)]
    data = FederatedData(balanced(100, owners=owners), 4, partition="natural")
    clients_of_owner = [set() for _ in range(10)]
    for client, (train, test) in enumerate(held(data)):
        for row in [*train, *test]:
            clients_of_owner[row % 10].add(client)
    assert all(len(clients) == 1 for clients in clients_of_owner)
    assert set.union(*clients_of_owner) == {0, 1, 2, 3}


def test_labels_need_neither_start_at_zero_nor_be_consecutive():
    task = Labelled([3, 7, 9] * 40)
    for partition in ("dirichlet", "inner_dirichlet", "pathological", "shard"):
        data = FederatedData(task, 3, partition=partition)
        assert data.sizes.min() >= 1
        assert set(np.flatnonzero(data.label_counts().sum(axis=0))) <= {3, 7, 9}


def test_targets_that_are_not_labels_can_be_cut_without_looking_at_them(tmp_path):
    class Regression(Labelled):
        def loss(self, output, targets):
            return (output - targets).square().mean()

    task = Regression(np.linspace(0, 1, 50, dtype=np.float32))
    data = FederatedData(task, 5)
    assert data.label_counts().tolist() == [[10]] * 5
    data.plot(tmp_path / "plot.png")
    with pytest.raises(PartitionError, match="targets are float32 of shape"):
        FederatedData(task, 5, partition="dirichlet")


def test_a_client_s_examples_are_gathered_once():
    data = FederatedData(Mnist(), 10)
    assert data.train(3) is data.train(3)
    assert data.test(3) is data.test(3)


def test_only_the_last_clients_examples_are_kept():
    data = FederatedData(balanced(300), 100)
    first = data.train(0)
    for client in range(1, 100):
        data.train(client)
    again = data.train(0)
    assert again is not first
    assert torch.equal(again.inputs, first.inputs)


def test_rows_are_views_of_one_array_and_sizes_cannot_be_written():
    data = FederatedData(balanced(300), 10)
    assert data.rows(0)[0].base is data.rows(9)[1].base
    with pytest.raises(ValueError, match="read-only"):
        data.sizes[0] = 1


@pytest.mark.parametrize("client", [-1, 10])
def test_a_client_that_is_not_there_is_refused(client):
    data = FederatedData(balanced(300), 10)
    for ask in (data.train, data.test, data.rows):
        with pytest.raises(IndexError, match=f"client {client}: there are clients 0 to 9"):
            ask(client)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"partition": "dirichlt"}, "no such partition; did you mean dirichlet[?] known: iid"),
        ({"partition": "zebra"}, "no such partition; known: iid"),
        ({"num_clients": 0}, "num_clients=0: must be at least 1"),
        ({"alpha": 0.0}, "alpha=0.0: must be greater than 0"),
        ({"alpha": float("nan")}, "alpha=nan: must be greater than 0"),
        ({"min_partition_size": 0}, "min_partition_size=0: must be at least 1"),
        ({"classes_per_client": 0}, "classes_per_client=0: must be at least 1"),
        ({"shards_per_client": 0}, "shards_per_client=0: must be at least 1"),
        ({"test_fraction": 1.0}, "test_fraction=1.0: must be at least 0 and less than 1"),
        ({"test_fraction": -0.1}, "test_fraction=-0.1: must be at least 0"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
    ],
)
def test_a_value_out_of_range_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        FederatedData(balanced(300), **{"num_clients": 10, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clients": 60}, "needs at least 120 training examples, the task has 100: lower num"),
        ({"min_partition_size": 30}, "needs at least 120 .* or min_partition_size"),
        (
            {"partition": "dirichlet", "alpha": 0.01, "min_partition_size": 25},
            "min_partition_size=25, alpha=0.01 cannot be drawn from 100 .* raise alpha, lower num",
        ),
        ({"partition": "inner_dirichlet", "alpha": 1e-9}, "alpha=1e-09 cannot be drawn .* raise"),
        ({"partition": "pathological", "classes_per_client": 6}, "to at most 5"),
        (
            {"partition": "pathological", "num_clients": 50, "classes_per_client": 5},
            "lower num_clients or classes_per_client",
        ),
        ({"partition": "shard", "shards_per_client": 26}, "makes 104 shards of 100 training"),
        ({"partition": "square", "num_clients": 20}, "cannot be drawn from 100 .* lower num_cl"),
        ({"partition": "linear", "num_clients": 20}, "cannot be drawn from 100 .* lower num_cl"),
        ({"partition": "natural"}, "this one has none: choose another partition"),
    ],
)
def test_a_cut_that_cannot_be_made_names_the_numbers_to_change(arguments, message):
    with pytest.raises(PartitionError, match=message):
        FederatedData(balanced(100), **{"num_clients": 4, **arguments})


def test_natural_ids_must_be_one_for_each_example_and_enough_for_the_clients():
    with pytest.raises(PartitionError, match="names 3 owners for 100"):
        FederatedData(balanced(100, owners=["a", "b", "c"]), 2, partition="natural")
    with pytest.raises(PartitionError, match="only 2 natural ids: set num_clients to at most 2"):
        FederatedData(balanced(100, owners=["a", "b"] * 50), 3, partition="natural")


def test_a_hundred_very_unlike_clients_can_be_had():
    data = FederatedData(Mnist(), 100, partition="dirichlet", alpha=0.1)
    assert data.sizes.min() >= 1
    assert data.sizes.sum() < 4000 == data.label_counts().sum()


def test_a_hundred_thousand_clients_are_cut_without_a_walk_through_the_data_for_each():
    data = FederatedData(balanced(300_000), 100_000)
    assert data.sizes.min() == 2
    assert len(data.test(99_999)) == 1


def test_cutting_needs_no_network_and_leaves_no_file(tmp_path):
    script = (
        "import socket\n"
        "def refuse(*_, **__): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from clients.tasks import Digits, FederatedData\n"
        "for name in ('dirichlet', 'shard', 'iid'):\n"
        "    FederatedData(Digits(), 5, partition=name).plot('pictures/plot.png')\n"
    )
    folders = {name: tmp_path / name for name in ("HOME", "TMPDIR", "cwd")}
    for folder in folders.values():
        folder.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "MPLCONFIGDIR": str(tmp_path / "matplotlib"),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(folders["HOME"]),
        "TMPDIR": str(folders["TMPDIR"]),
    }
    run = subprocess.run(
        # typer imports names that click deprecates
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", script],
        cwd=folders["cwd"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    left = [path for folder in folders.values() for path in folder.rglob("*") if path.is_file()]
    assert left == [folders["cwd"] / "pictures" / "plot.png"]


def test_the_digits_can_be_cut_too():
    assert FederatedData(Digits(), 10, partition="dirichlet").sizes.min() >= 1
