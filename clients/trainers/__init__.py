"""How a client fits its own data."""

from clients.trainers.adamw import AdamW
from clients.trainers.dp_sgd import DpSgd
from clients.trainers.fedsgd import FedSgd
from clients.trainers.proximal import Proximal
from clients.trainers.scaffold import Scaffold
from clients.trainers.sgd import SGD, Fit, FitJob, TrainingDivergedError

__all__ = [
    "SGD",
    "AdamW",
    "DpSgd",
    "FedSgd",
    "Fit",
    "FitJob",
    "Proximal",
    "Scaffold",
    "TrainingDivergedError",
]
