"""What is learnt and on which data: tasks, and a task's data cut among clients."""

from clients.tasks.digits import Digits
from clients.tasks.federated import FederatedData
from clients.tasks.mnist import Mnist
from clients.tasks.partitions import PartitionError
from clients.tasks.task import Examples, Task, evaluate

__all__ = [
    "Digits",
    "Examples",
    "FederatedData",
    "Mnist",
    "PartitionError",
    "Task",
    "evaluate",
]
