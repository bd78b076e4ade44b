"""A task's training data cut among clients."""

from collections import OrderedDict
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
from annotated_types import Ge, Gt, Lt

from clients.tasks.partition_settings import PartitionName, PartitionSettings
from clients.tasks.partitions import cut
from clients.tasks.task import UNLABELLED, Examples, Task, check_task, class_labels

# Clients' parts never overlap, so however large they are, together they hold one copy of the data.
_KEPT_PARTS = 64


class FederatedData:
    """Which client holds which of a task's training examples.

    Each client's examples are cut once more, into a part to train on and a part to test on. The
    cut is a function of the task and of these arguments alone: every process that makes the object
    anew gets the same one. Only row numbers are held; a client's examples are gathered when asked
    for, and those of the last few clients are kept.

    Of a task with several goals each client trains one, in turn (`Task.goal_of`): its examples, both parts, have no
    label for the others. Partitions by class look at the first goal's classes. What the server sets aside has them all.

    The partitions, all but the last row for row those of flwr-datasets' partitioners:

    ==================  ======================================================================
    ``iid``             shuffled, equal sizes
    ``dirichlet``       each class spread over the clients by Dirichlet(alpha): Yurochkin et al.,
                        "Bayesian Nonparametric Federated Learning", 2019, arXiv:1905.12022
    ``inner_dirichlet`` equal sizes, each client's classes mixed by Dirichlet(alpha): Acar et al.,
                        "Federated Learning Based on Dynamic Regularization", 2021
    ``pathological``    classes_per_client classes each: Li et al., "Federated Learning on Non-IID
                        Data Silos", 2021, arXiv:2102.02079
    ``shard``           shards_per_client blocks of the examples sorted by class: McMahan et al.,
                        "Communication-Efficient Learning", 2017, arXiv:1602.05629
    ``linear``          shuffled, sizes in the ratio 1 : 2 : 3 …
    ``square``          shuffled, sizes in the ratio 1 : 4 : 9 …
    ``natural``         by the task's natural ids; where there are more ids than clients, ids
                        that are neighbours by name share a client
    ==================  ======================================================================

    Args:
        task: whose training examples are cut; checked first (`clients.tasks.task.check_task`).
        num_clients: how many clients.
        partition: one of the names above.
        alpha: concentration of the Dirichlet partitions; the smaller, the more unlike the clients.
        min_partition_size: examples that each client holds at least, both parts together.
        classes_per_client: for ``pathological``.
        shards_per_client: for ``shard``.
        test_fraction: share of a client's examples in its test part, rounded to whole examples. A
            client with two or more has at least one in each part; 0 makes every test part empty.
        root_examples: set aside for the server, for rules that hold updates against one of its own (FLTrust): drawn
            evenly from the classes, held by no client, and none of the task's test set.
        seed: of the cut.

    Attributes:
        num_clients: how many clients there are, numbered from 0.
        sizes: (num_clients,) int64, training examples of each client (at least 1); read-only.
        unassigned: training examples of the task that no client holds (``shard`` leaves out a
            remainder, ``pathological`` the classes that no client drew).

    Raises:
        ValueError: an argument is out of its range, or `partition` is not a name above.
        PartitionError: the examples cannot be cut so; a ValueError that names what to change.
    """

    def __init__(
        self,
        task: Task,
        num_clients: Annotated[int, Ge(1)],
        *,
        partition: PartitionName = "iid",
        alpha: Annotated[float, Gt(0)] = 0.5,
        min_partition_size: Annotated[int, Ge(1)] = 2,
        classes_per_client: Annotated[int, Ge(1)] = 2,
        shards_per_client: Annotated[int, Ge(1)] = 2,
        test_fraction: Annotated[float, Ge(0), Lt(1)] = 0.2,
        root_examples: Annotated[int, Ge(0)] = 0,
        seed: Annotated[int, Ge(0)] = 0,
    ) -> None:
        _check_name(partition)
        _check_at_least_one(
            num_clients=num_clients,
            min_partition_size=min_partition_size,
            classes_per_client=classes_per_client,
            shards_per_client=shards_per_client,
        )
        if not alpha > 0:
            raise ValueError(f"alpha={alpha}: must be greater than 0")
        if not 0 <= test_fraction < 1:
            raise ValueError(f"test_fraction={test_fraction}: must be at least 0 and less than 1")
        if seed < 0:
            raise ValueError(f"seed={seed}: must be at least 0")
        check_task(task)
        self._task = task
        self.num_clients = num_clients
        settings = PartitionSettings(
            num_clients=num_clients,
            name=partition,
            alpha=alpha,
            min_partition_size=min_partition_size,
            classes_per_client=classes_per_client,
            shards_per_client=shards_per_client,
            seed=seed,
        )
        targets = class_labels(task)
        self._root, rest = _set_aside(targets, root_examples, seed)
        natural = task.natural_ids() if partition == "natural" else None
        if natural is not None and len(natural) == len(targets):  # `cut` refuses any other number
            natural = [natural[row] for row in rest]
        parts = [rest[part] for part in cut(settings, targets[rest], natural)]
        held = np.array([len(part) for part in parts], dtype=np.int64)
        # Client c holds rows[starts[c] : starts[c + 1]]: its training part, then its test part.
        self._rows = np.concatenate(parts)
        self._starts = np.concatenate([[0], np.cumsum(held)])
        self.sizes = held - _test_sizes(held, test_fraction)
        self.sizes.setflags(write=False)
        self.unassigned = len(rest) - len(self._rows)
        self._title = f"Training data by class: {settings.title()}"
        self._kept: OrderedDict[tuple[int, str], Examples] = OrderedDict()

    def train(self, client: int) -> Examples:
        """The examples that `client` trains on, `sizes[client]` of them.

        Raises:
            IndexError: there is no such client.
        """
        return self._part(client, "train")

    def test(self, client: int) -> Examples:
        """The examples that `client` tests on; none of them is in any client's training part.

        Raises:
            IndexError: there is no such client.
        """
        return self._part(client, "test")

    def root(self) -> Examples:
        """The `root_examples` examples that were set aside for the server."""
        return self._task.train().take(self._root)

    def rows(self, client: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers in `task.train()` of the client's training part and of its test part.

        Returns:
            Two int64 arrays, views of the cut: (sizes[client],) and the rest of the client's rows.

        Raises:
            IndexError: there is no such client.
        """
        if not 0 <= client < self.num_clients:
            raise IndexError(f"client {client}: there are clients 0 to {self.num_clients - 1}")
        start, end = self._starts[client], self._starts[client + 1]
        middle = start + self.sizes[client]
        return self._rows[start:middle], self._rows[middle:end]

    def label_counts(self) -> np.ndarray:
        """How many examples of each class each client holds, both parts together; with goals, of its own goal's.

        Returns:
            (num_clients, num_classes) int64; where the targets are not class labels, one column.
        """
        owner = np.repeat(np.arange(self.num_clients), np.diff(self._starts))
        if self._task.goals:
            return self._label_counts_by_goal(owner)
        targets, classes = self._task.train().targets.numpy()[self._rows], self._task.num_classes
        is_label = targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer)
        if not is_label or targets.min() < 0 or targets.max() >= classes:
            targets, classes = np.zeros_like(owner), 1
        cells = self.num_clients * classes
        counts: np.ndarray = np.bincount(owner * classes + targets, minlength=cells)
        return counts.reshape(self.num_clients, classes)

    def _label_counts_by_goal(self, owner: np.ndarray) -> np.ndarray:
        first = np.array([logits.start for logits in self._task.logits_of().values()])
        goal = owner % len(first)
        targets = self._task.train().targets.numpy()[self._rows, goal]
        counts = np.zeros((self.num_clients, self._task.num_classes), dtype=np.int64)
        labelled = targets != UNLABELLED
        np.add.at(counts, (owner[labelled], (first[goal] + targets)[labelled]), 1)
        return counts

    def plot(self, path: Path) -> None:
        """Write a picture of the label distributions, a PNG; makes the folder where it is missing.

        Raises:
            OSError: the file cannot be written.
        """
        # matplotlib takes a while to import and only the server draws.
        from clients.tasks.picture import draw_label_counts

        draw_label_counts(self.label_counts(), Path(path), self._title)

    def _part(self, client: int, part: str) -> Examples:
        key = (client, part)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        train_rows, test_rows = self.rows(client)
        examples = self._task.train().take(train_rows if part == "train" else test_rows)
        goal = self._task.goal_of(client)
        if goal is not None:
            examples = examples.only(tuple(self._task.goals).index(goal))
        self._kept[key] = examples
        if len(self._kept) > _KEPT_PARTS:
            self._kept.popitem(last=False)
        return examples


def _set_aside(targets: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows for the server, as evenly from the classes as can be, and the rows that are left, in ascending order."""
    if not 0 <= count < len(targets):
        raise ValueError(
            f"root_examples={count}: must be at least 0 and less than the task's {len(targets)} training examples"
        )
    everything = np.arange(len(targets))
    if not count:
        return everything[:0], everything
    order = np.random.default_rng(np.random.SeedSequence([seed, count])).permutation(len(targets))
    labels = targets[order] if targets.ndim == 1 else np.zeros(len(targets), np.int64)
    turn = np.empty(len(order), np.int64)
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    chosen = np.sort(order[np.argsort(turn, kind="stable")[:count]])
    return chosen, np.setdiff1d(everything, chosen)


def _test_sizes(held: np.ndarray, fraction: float) -> np.ndarray:
    if not fraction:
        return np.zeros_like(held)
    rounded = np.floor(fraction * held + 0.5).astype(np.int64)
    sizes: np.ndarray = np.minimum(np.maximum(rounded, 1), held - 1)
    return sizes


def _check_name(partition: str) -> None:
    known = get_args(PartitionName)
    if partition not in known:
        close = get_close_matches(str(partition), known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"partition={partition}: there is no such partition; {hint}known: {', '.join(known)}"
        )


def _check_at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number}: must be at least 1")
