"""The server's model and its optimisers."""

from strategies.server_models.model import ServerModel
from strategies.server_models.optimizers import SGD, Adagrad, Adam, ServerOptimizer, Yogi
from strategies.server_models.scaffold import Scaffold

__all__ = ["SGD", "Adagrad", "Adam", "Scaffold", "ServerModel", "ServerOptimizer", "Yogi"]
