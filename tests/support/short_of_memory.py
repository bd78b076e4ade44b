"""A client whose process may map no more than so many bytes beyond what it has mapped before it trains."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from clients.client import NUM_CLIENTS, Client
from clients.resident import ResidentModel, arrays_of
from clients.retrying import RETRIES, Retry
from clients.store import ClientStore
from clients.tasks import Digits, FederatedData
from clients.trainers import SGD
from fl_app.engine.flwr_internals import claim_identity
from strategies.replies import Expected, read_update
from strategies.wire import METRICS
from tests.clients.test_client import request

WIDTH, BATCH = 40_000, 512


def main(room: int) -> None:
    """Trains with little room and with plenty, and prints how far apart the two updates are."""
    torch.manual_seed(5)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    arrays, task = arrays_of(network), Digits()
    layout = ResidentModel(network, arrays).layout
    data = FederatedData(task, 2, partition="iid", seed=3)
    found = []
    with TemporaryDirectory() as folder:
        for limit in (room, None):
            ours = Client(
                task, network, lambda count: data, SGD(lr=0.01, batch_size=BATCH, local_epochs=1),
                store=ClientStore(Path(folder)), retry=Retry(backoff_seconds=0.0),
            )  # fmt: skip
            asked = request(arrays=arrays, who=0, **{NUM_CLIENTS: 2})
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            if limit is not None:
                mapped = int(Path("/proc/self/statm").read_text().split()[0])
                most = mapped * resource.getpagesize() + limit
                resource.setrlimit(resource.RLIMIT_AS, (most, hard))
            (reply,) = ours.answer([asked])
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            if reply.has_error():
                print(json.dumps({"error": reply.error.reason}))
                return
            update = read_update(reply.content, Expected({"delta": layout}, 0, 3, 2))
            found.append((update.delta.vector, reply.content[METRICS].get(RETRIES, 0.0)))
    (short, retries), (plenty, none) = found
    apart = float(np.abs(short - plenty).max())
    print(json.dumps({"apart": apart, "retries": retries, "with plenty": none}))


if __name__ == "__main__":
    claim_identity(1)
    main(int(float(sys.argv[1])))
