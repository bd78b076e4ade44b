"""One of the jobs of against_pfl.py, on Apple's pfl. Runs in pfl's own environment and imports nothing of ours.

    python benchmarks/pfl_side.py JOB ROUNDS      (under torchrun for several processes)

Prints one JSON line: the seconds of each round.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.internal.ops.pytorch_ops import distributed
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

JOBS: dict[str, dict[str, Any]] = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}


class Net(nn.Module):
    """A network with the two methods that pfl asks for."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def loss(self, inputs: Tensor, targets: Tensor, **_: Any) -> Tensor:
        """Mean cross-entropy of a batch."""
        self.train()
        return F.cross_entropy(self.layers(inputs), targets)

    def metrics(self, inputs: Tensor, targets: Tensor, **_: Any) -> dict[str, Any]:
        """None: nobody looks."""
        return {}


def network(job: str, shape: list[int]) -> nn.Sequential:
    """The job's network."""
    if job == "mlp":
        width = shape[0] * shape[1] * shape[2]
        return nn.Sequential(nn.Flatten(), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 10))
    side = (shape[1] - 4) // 2
    return nn.Sequential(
        nn.Conv2d(shape[0], 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(64 * side * side, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
    )


class Stopwatch(TrainingProcessCallback):
    """The moment at which each round ends."""

    def __init__(self) -> None:
        self.moments = [time.perf_counter()]

    def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Metrics]:
        """Goes on, always."""
        self.moments.append(time.perf_counter())
        return False, Metrics()


def main() -> None:
    """Runs the job and prints its seconds."""
    torch.set_num_threads(1)  # one core a process, as ours have
    job, rounds = sys.argv[1], int(sys.argv[2])
    spec = JOBS[job]
    users, each, shape = spec["clients"], spec["examples"], spec["shape"]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(users, each, *shape, generator=generator)
    targets = torch.randint(0, 10, (users, each), generator=generator)
    data = FederatedDataset(
        lambda user: Dataset(raw_data=[inputs[user], targets[user]], user_id=str(user)),
        get_user_sampler("minimize_reuse", list(range(users))),
    )
    torch.manual_seed(0)
    net = Net(network(job, shape))
    model = PyTorchModel(
        net,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(net.parameters(), 1.0),
    )
    watch = Stopwatch()
    FederatedAveraging().run(
        backend=SimulatedBackend(data, data),
        model=model,
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=10**9,
            train_cohort_size=spec["cohort"],
            val_cohort_size=0,
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=0.01, local_batch_size=spec["batch_size"]
        ),
        callbacks=[watch],
    )
    if distributed is None or distributed.global_rank == 0:
        print(json.dumps([later - sooner for sooner, later in pairwise(watch.moments)]), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # or gloo's threads may abort at the end


if __name__ == "__main__":
    main()
