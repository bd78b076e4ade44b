"""Root data: held by no client, drawn from all classes, and trained on as a client would."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from clients.client import NUM_CLIENTS
from clients.models import Mlp
from clients.resident import ResidentModel, arrays_of
from clients.root import RootTrainer
from clients.tasks import Digits, FederatedData
from clients.trainers import SGD, FitJob
from strategies.protocols import Job
from strategies.seeds import integer
from strategies.update import DELTA
from strategies.wire import ARRAYS, pack_model

TASK = Digits()


def data(**settings) -> FederatedData:
    return FederatedData(TASK, 5, **({"partition": "iid", "seed": 3} | settings))


def module() -> torch.nn.Module:
    torch.manual_seed(5)
    return Mlp(TASK.input_shape, TASK.num_classes, hidden=(8,))


def job(round_number: int = 1) -> Job:
    records = {ARRAYS: pack_model(arrays_of(module()))}
    return Job(round_number, round_number - 1, records, {NUM_CLIENTS: 5}, {}, {}, {})


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "pathological", "shard"])
def test_root_examples_are_no_clients_and_none_of_the_test_set(partition):
    cut = data(partition=partition, root_examples=100)
    held = np.concatenate([row for client in range(5) for row in cut.rows(client)])
    assert len(np.unique(held)) == len(held)
    assert not set(cut._root) & set(held)
    assert len(cut.root()) == 100
    assert len(held) + 100 + cut.unassigned == len(TASK.train())
    assert TASK.train().inputs is not TASK.test().inputs


def test_root_examples_come_evenly_from_the_classes_and_repeat_with_the_seed():
    counts = np.bincount(data(root_examples=103).root().targets.numpy(), minlength=10)
    assert counts.min() == 10
    assert counts.max() == 11
    assert np.array_equal(data(root_examples=50)._root, data(root_examples=50)._root)
    assert not np.array_equal(data(root_examples=50)._root, data(root_examples=50, seed=4)._root)


def test_without_root_examples_the_cut_is_what_it_was():
    plain = data()
    assert len(plain.root()) == 0
    assert sum(len(row) for client in range(5) for row in plain.rows(client)) == len(TASK.train())


@pytest.mark.parametrize("count", [-1, 10**6])
def test_more_root_examples_than_there_are_is_refused(count):
    with pytest.raises(
        ValueError, match=f"root_examples={count}: must be at least 0 and less than"
    ):
        data(root_examples=count)


def test_the_servers_update_is_what_a_client_with_its_data_would_send():
    trainer, examples = SGD(lr=0.1, local_epochs=2), data(root_examples=60).root()
    found = RootTrainer(TASK, module, examples, trainer, seed=9)(job(4))
    arrays = arrays_of(module())
    fitted = trainer.fit_one(
        FitJob(0, arrays, {}, examples, integer(9, "root", 4), {}, {}),
        ResidentModel(module(), arrays),
        TASK,
    )
    wanted = fitted.sections[DELTA].vector
    assert found.delta.vector.tobytes() == wanted.tobytes()
    assert (found.weight, found.members, found.version) == (60.0, (), 3)


def test_worker_momentum_of_the_clients_does_not_reach_into_the_servers_update():
    trainer, examples = SGD(lr=0.1), data(root_examples=40).root()
    plain = RootTrainer(TASK, module, examples, trainer)(job())
    slow = RootTrainer(TASK, module, examples, replace(trainer, worker_momentum=0.9))(job())
    assert plain.delta.vector.tobytes() == slow.delta.vector.tobytes()
