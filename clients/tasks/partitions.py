"""Cutting a task's training examples among clients, and what is refused of what is asked for."""

from collections.abc import Sequence

import numpy as np

from clients.tasks.drawing import DIRECT, draw
from clients.tasks.partition_settings import PartitionName, PartitionSettings

_BY_LABEL = ("dirichlet", "inner_dirichlet", "pathological", "shard")

# What to change when a partition cannot be made, or leaves a client with too little.
_MENDS: dict[PartitionName, str] = {
    "iid": "lower num_clients",
    "dirichlet": "raise alpha, lower num_clients, or take partition=inner_dirichlet",
    "inner_dirichlet": "raise alpha or lower num_clients",
    "pathological": "lower num_clients or classes_per_client",
    "shard": "lower num_clients or shards_per_client",
    "linear": "lower num_clients",
    "square": "lower num_clients",
    "natural": "lower num_clients or min_partition_size",
}


class PartitionError(ValueError):
    """The examples cannot be cut among the clients as asked; names the numbers to change."""


def cut(
    settings: PartitionSettings, targets: np.ndarray, natural_ids: Sequence[str] | None
) -> list[np.ndarray]:
    """Cut examples among clients.

    Args:
        settings: which partition, and its numbers. `seed` alone decides the draw.
        targets: (n,) class labels; partitions that do not look at labels take anything.
        natural_ids: (n,) whose each example is, or None; looked at by the partition "natural".

    Returns:
        For each client the (k,) int64 rows it holds, in a random order. No row is in two places;
        `pathological` and `shard` may leave rows to nobody.

    Raises:
        PartitionError: a client would hold fewer than `min_partition_size` examples, or the
            partition is impossible; says which numbers to change.
    """
    examples = len(targets)
    shuffling, drawing = np.random.SeedSequence(settings.seed).spawn(2)
    order = np.random.default_rng(shuffling).permutation(examples)
    column = _column(settings, targets, natural_ids)[order]
    _check_possible(settings, column)
    if settings.name == "shard":
        by_label = np.argsort(column, kind="stable")
        order, column = order[by_label], column[by_label]

    drawn = _draw(settings, column, drawing)
    return [order[rows] for rows in drawn]


def _draw(
    settings: PartitionSettings, column: np.ndarray, seeds: np.random.SeedSequence
) -> list[np.ndarray]:
    """The rows of `column` for each client, drawn anew where chance left a client too little."""
    drawn_by = draw
    if settings.name not in DIRECT:
        from clients.tasks import partitioners  # imports for seconds

        drawn_by = partitioners.draw
    failure = ""
    reason: ValueError | None = None
    for seed in seeds.generate_state(_attempts(settings)):
        try:
            drawn = drawn_by(settings, column, int(seed))
        except ValueError as refusal:
            failure, reason = str(refusal), refusal
            continue
        smallest = min(len(rows) for rows in drawn)
        if smallest >= settings.min_partition_size:
            return drawn
        failure, reason = f"a client would hold {smallest}", None
    raise PartitionError(
        f"{settings.describe()} cannot be drawn from {len(column):,} training examples: "
        f"{_MENDS[settings.name]} ({failure})"
    ) from reason


def _attempts(settings: PartitionSettings) -> int:
    """How often to draw; a draw's time grows with the number of clients, or with the examples."""
    match settings.name:
        case "dirichlet":  # a hundred make alpha=0.1 with 100 clients of 40 examples work
            return max(3, min(100, 100_000 // settings.num_clients))
        case "inner_dirichlet":
            return 10
        case _:
            return 1


def _column(
    settings: PartitionSettings, targets: np.ndarray, natural_ids: Sequence[str] | None
) -> np.ndarray:
    """The (n,) int64 column that the partitioner looks at: labels or owners, numbered from 0."""
    if settings.name == "natural":
        return _owners(settings, len(targets), natural_ids)
    if settings.name not in _BY_LABEL:
        return np.zeros(len(targets), dtype=np.int64)
    if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
        raise PartitionError(
            f"partition={settings.name} cuts by class label, but the task's targets are "
            f"{targets.dtype} of shape {targets.shape}: take partition=iid or natural"
        )
    return np.unique(targets, return_inverse=True)[1].astype(np.int64)


def _owners(
    settings: PartitionSettings, examples: int, natural_ids: Sequence[str] | None
) -> np.ndarray:
    """The client of each example, (n,) int64; owners next to each other by name share a client."""
    if natural_ids is None:
        raise PartitionError(
            "partition=natural needs a task whose natural_ids() says whose each example is; "
            "this one has none: choose another partition"
        )
    if len(natural_ids) != examples:
        raise PartitionError(
            f"the task's natural_ids() names {len(natural_ids):,} owners for {examples:,} "
            "training examples: one for each is needed"
        )
    owners, owner_of = np.unique(np.asarray(natural_ids), return_inverse=True)
    if len(owners) < settings.num_clients:
        raise PartitionError(
            f"partition=natural: {settings.num_clients:,} clients, but only {len(owners):,} "
            f"natural ids: set num_clients to at most {len(owners)}"
        )
    return owner_of.astype(np.int64) * settings.num_clients // len(owners)


def _check_possible(settings: PartitionSettings, column: np.ndarray) -> None:
    """Refuse in our users' words what the partitioners would refuse in their own, or not at all."""
    clients, examples, classes = settings.num_clients, len(column), int(column.max()) + 1
    if clients * settings.min_partition_size > examples:
        raise PartitionError(
            f"{settings.describe()} needs at least {clients * settings.min_partition_size:,} "
            f"training examples, the task has {examples:,}: "
            "lower num_clients or min_partition_size"
        )
    if settings.name == "pathological" and settings.classes_per_client > classes:
        raise PartitionError(
            f"classes_per_client={settings.classes_per_client}, but the task has {classes} "
            f"classes: set classes_per_client to at most {classes}"
        )
    if settings.name == "shard" and clients * settings.shards_per_client > examples:
        raise PartitionError(
            f"{settings.describe()} makes {clients * settings.shards_per_client:,} shards of "
            f"{examples:,} training examples: lower num_clients or shards_per_client"
        )
