"""What is learnt and on which data: tasks, and a task's data cut among clients."""

from clients.tasks.digits import Digits
from clients.tasks.docstrings import Docstrings
from clients.tasks.federated import FederatedData
from clients.tasks.huggingface import HuggingFace
from clients.tasks.idx import Idx
from clients.tasks.mnist import Mnist
from clients.tasks.partitions import PartitionError
from clients.tasks.pictures import ImageFolder
from clients.tasks.prose import Prose
from clients.tasks.tables import Csv, Jsonl
from clients.tasks.task import Examples, Task, evaluate

__all__ = [
    "Csv",
    "Digits",
    "Docstrings",
    "Examples",
    "FederatedData",
    "HuggingFace",
    "Idx",
    "ImageFolder",
    "Jsonl",
    "Mnist",
    "PartitionError",
    "Prose",
    "Task",
    "evaluate",
]
