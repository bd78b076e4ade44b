"""Clients that are in the middle of something: what a test and the process that it kills both make."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from clients.client import Client
from clients.half_done import HalfDoneFits
from clients.resident import arrays_of
from clients.store import ClientStore
from clients.tasks import Digits, FederatedData
from clients.trainers import SGD
from fl_app.engine.flwr_internals import claim_identity
from strategies.wire import pack_model

CLIENTS = 4
TRAINER = SGD(lr=0.05, batch_size=16, local_epochs=4, momentum=0.9)


class Watched(Digits):
    """Digits that say how many batches they have seen, and take their time over each."""

    def __init__(self, seconds: float = 0.0, progress: Path | None = None) -> None:
        super().__init__()
        self.seconds, self.progress, self.calls = seconds, progress, 0

    def losses(self, output, targets):
        self.calls += 1
        if self.progress is not None:
            with self.progress.open("ab") as file:
                file.write(b".")
            time.sleep(self.seconds)
        return super().losses(output, targets)


def network() -> nn.Module:
    """With random numbers of its own as it trains, and running statistics."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10)
    )  # fmt: skip


def client(
    folder: Path,
    task: Digits | None = None,
    trainer: SGD = TRAINER,
    *,
    every: float = 1e9,
    **options,
) -> Client:
    """One whose half-done work lies in a folder, and is written so often: when it is paused, at least."""
    task = task or Watched()
    data = FederatedData(task, CLIENTS, partition="iid", seed=3)
    options = {"half_done": HalfDoneFits(folder / "half-done", "run", every=every), **options}
    store = ClientStore(folder)
    return Client(task, network(), lambda count: data, trainer, store=store, seed=11, **options)


def model():
    """What is sent."""
    return pack_model(arrays_of(network()))


def main(folder: str, progress: str) -> None:
    """Answers one request, slowly."""
    from tests.clients.test_client import request

    claim_identity(1)
    ours = client(Path(folder), Watched(0.02, Path(progress)), every=0.0)
    ours.answer([request(arrays=arrays_of(network()))])


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])
