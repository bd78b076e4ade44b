"""What is said of a partition of a task's examples: its name, and the numbers that shape it."""

from dataclasses import dataclass
from typing import Literal

PartitionName = Literal[
    "iid",
    "dirichlet",
    "inner_dirichlet",
    "pathological",
    "shard",
    "linear",
    "square",
    "natural",
]

# The numbers, beside those of every partition, that shape each one.
_SHAPING: dict[PartitionName, str] = {
    "dirichlet": "alpha",
    "inner_dirichlet": "alpha",
    "pathological": "classes_per_client",
    "shard": "shards_per_client",
}


@dataclass(frozen=True)
class PartitionSettings:
    """How to cut; the fields are those of `clients.tasks.FederatedData`."""

    num_clients: int
    name: PartitionName
    alpha: float
    min_partition_size: int
    classes_per_client: int
    shards_per_client: int
    seed: int

    def describe(self) -> str:
        """The name and the numbers that decide whether it can be had, as a user writes them."""
        numbers = f"num_clients={self.num_clients}, min_partition_size={self.min_partition_size}"
        return f"partition={self.name} with {numbers}{self._shape()}"

    def title(self) -> str:
        """The name and the numbers that shape it, for a picture."""
        return f"{self.num_clients} clients, {self.name}{self._shape()}"

    def _shape(self) -> str:
        number = _SHAPING.get(self.name)
        return f", {number}={getattr(self, number)}" if number else ""
