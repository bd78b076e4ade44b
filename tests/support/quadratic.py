"""Least squares over clients with their own matrices: a convex federation whose every step can be checked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import nn

from clients.client import NUM_CLIENTS, Client
from clients.resident import arrays_of
from clients.store import ClientStore
from clients.tasks import Examples, Task
from clients.trainers import SGD
from fl_app.engine import DeviceModel, EngineGrid, InProcessPool
from strategies.pipeline import Pipeline
from strategies.strategy import PipelineStrategy
from strategies.wire import pack_model


class LeastSquares(Task):
    """½·mean (a·x − b)² over a client's rows."""

    num_classes = 1

    def __init__(self, dimension: int) -> None:
        self.input_shape = (dimension,)

    def train(self) -> Examples:
        raise AssertionError("each client has data of its own")

    test = train

    def loss(self, output, targets):
        return 0.5 * (output.squeeze(-1) - targets).square().mean()

    def metrics(self, output, targets):
        return {}


@dataclass
class Rows:
    """Each client's rows (a, b), float64."""

    a: list[np.ndarray]
    b: list[np.ndarray]

    def train(self, client: int) -> Examples:
        return Examples(
            torch.tensor(self.a[client], dtype=torch.float32),
            torch.tensor(self.b[client], dtype=torch.float32),
        )

    test = train

    def gradient(self, client: int, x: np.ndarray) -> np.ndarray:
        a, b = self.a[client], self.b[client]
        return a.T @ (a @ x - b) / len(b)

    def optimum(self, weights: Sequence[float]) -> np.ndarray:
        """Minimiser of Σ wᵢ fᵢ."""
        hessian = sum(w * a.T @ a / len(a) for w, a in zip(weights, self.a, strict=True))
        right = sum(w * a.T @ b / len(a) for w, a, b in zip(weights, self.a, self.b, strict=True))
        return np.linalg.solve(hessian, right)


def heterogeneous(clients: int = 5, dimension: int = 4, seed: int = 0) -> Rows:
    """Clients whose optima and curvatures differ."""
    rng = np.random.default_rng(seed)
    a = [
        rng.normal(0, rng.uniform(0.3, 1.5, dimension), (8 + 2 * i, dimension))
        for i in range(clients)
    ]
    b = [matrix @ rng.normal(0, 2, dimension) + rng.normal(0, 0.1, len(matrix)) for matrix in a]
    return Rows(a, b)


class LinearModel(nn.Module):
    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.x = nn.Linear(dimension, 1, bias=False)
        nn.init.zeros_(self.x.weight)

    def forward(self, inputs):
        return self.x(inputs)


@contextmanager
def federation(rows: Rows, trainer: SGD, folder: Path, devices: DeviceModel | None = None):
    """An engine's grid whose clients fit these rows."""
    dimension = rows.a[0].shape[1]

    def factory():
        return Client(
            LeastSquares(dimension),
            LinearModel(dimension),
            lambda count: rows,
            trainer,
            store=ClientStore(folder),
        ).answer

    with InProcessPool(factory) as pool:
        yield EngineGrid(
            pool,
            num_clients=len(rows.a),
            devices=devices or DeviceModel(),
            seed=0,
            work=lambda client: 1.0,
        )


def start_model(rows: Rows) -> ArrayRecord:
    return pack_model(arrays_of(LinearModel(rows.a[0].shape[1])))


def train(
    rows: Rows, trainer: SGD, pipeline: Pipeline, rounds: int, folder: Path, **keywords
) -> list[np.ndarray]:
    """The parameters after each round, from zero."""
    path: list[np.ndarray] = []

    def remember(view) -> None:
        path.append(view.model.parameters.copy())

    pipeline.train_config = {**pipeline.train_config, NUM_CLIENTS: len(rows.a)}
    strategy = PipelineStrategy(pipeline, federated_every=0, hooks=[remember], **keywords)
    with federation(rows, trainer, folder) as grid:
        strategy.start(grid, start_model(rows), num_rounds=rounds)
    return path
