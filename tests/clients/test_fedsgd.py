"""FedSGD: the update is minus one mini-batch's mean gradient; mini-batches are a pure function of seed and round."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clients.encrypted.network import PolynomialNet
from clients.encrypted.schedule import batch_of_round, batches
from clients.resident import ResidentModel, arrays_of
from clients.tasks import Digits, Mnist, evaluate
from clients.trainers import FedSgd, FitJob, TrainingDivergedError
from clients.trainers.fedsgd import squared_loss
from strategies import server_models
from strategies.pipeline import Pipeline
from strategies.server_models import ServerModel
from strategies.update import BUFFERS, DELTA, Update
from strategies.wire import Refused
from tests.support.examples import many
from tests.support.quadratic import heterogeneous, train

TASK = Digits()


def net(seed: int = 0, hidden: tuple[int, ...] = (8,)) -> PolynomialNet:
    torch.manual_seed(seed)
    return PolynomialNet(TASK.input_shape, TASK.num_classes, hidden=hidden)


def job(module: nn.Module, round_number: object = 1, client: int = 3, task=TASK) -> FitJob:
    asked = {} if round_number is None else {"server-round": round_number}
    return FitJob(client, arrays_of(module), {}, task.train(), 99, {}, asked)


def fitted(trainer: FedSgd, module: nn.Module, one: FitJob, task=TASK):
    return trainer.fit_one(one, ResidentModel(module, one.arrays), task)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
@pytest.mark.parametrize("hidden", [(), (8,), (8, 4)])
def test_the_update_is_minus_the_mean_gradient_of_the_rounds_mini_batch(loss, hidden):
    module, trainer = net(hidden=hidden), FedSgd(batch_size=100, loss=loss, seed=5)
    found = fitted(trainer, net(hidden=hidden), job(module, 4))
    cut = batches(TASK.train().targets.numpy(), 100, 5, 3)
    examples = TASK.train().take(cut[batch_of_round(4, len(cut), 5, 3)])
    outputs = module(examples.inputs)
    if loss == "squared":
        value = 0.5 * (outputs - F.one_hot(examples.targets, 10)).square().sum() / len(examples)
    else:
        value = F.cross_entropy(outputs, examples.targets)
    value.backward()
    views = found.sections[DELTA].layout.views(found.sections[DELTA].vector)
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(
            views[name], -parameter.grad.numpy(), rtol=1e-4, atol=1e-6 * value.item()
        )
    assert found.num_examples == len(TASK.train())
    assert found.metrics["train_loss"] == pytest.approx(value.item(), rel=1e-5)


def test_one_round_of_all_clients_is_a_step_of_gradient_descent_on_the_pooled_loss(tmp_path):
    """Through the real client, engine and strategy: FedSGD as its paper has it, w ← w − η Σ nₖ/n ∇Fₖ(w)."""
    rows = heterogeneous()
    sizes = np.array([len(b) for b in rows.b])
    pipeline = Pipeline(optimizer=server_models.SGD(lr=0.1))
    path = train(rows, FedSgd(batch_size=1_000), pipeline, 20, tmp_path)
    x = np.zeros(4)
    for found in path:
        x = x - 0.1 * sum(n * rows.gradient(i, x) for i, n in enumerate(sizes)) / sizes.sum()
        np.testing.assert_allclose(found, x, rtol=2e-5, atol=2e-6)


def test_the_twin_learns_mnist_in_a_few_rounds():
    """What exactly is reached, on which examples, is for benchmarks/encrypted_search.py to say."""
    task = Mnist()
    torch.manual_seed(0)
    module = PolynomialNet(task.input_shape, task.num_classes)
    trainer, resident = FedSgd(), ResidentModel(module, arrays_of(module))
    adam = server_models.Adam(
        lr=0.05, beta1=0.7, beta2=0.9, bias_correction=True, total_steps=40, decay_from=0.5
    )
    server = ServerModel(arrays_of(module), adam)
    for number in range(1, 41):
        one = replace(job(module, number, 0, task), arrays=server.view())
        found = trainer.fit_one(one, resident, task)
        server.apply(Update(found.sections, 1.0, (0,), number - 1, {}))
    resident.load(server.view())
    assert evaluate(module, task, task.test())["accuracy"] >= 0.92


def test_running_statistics_go_with_the_gradient():
    module = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    found = fitted(FedSgd(batch_size=100), module, job(module))
    assert found.sections[BUFFERS].vector.any()


def test_repeating_a_round_repeats_its_update_and_the_next_one_is_another():
    trainer, module = FedSgd(batch_size=100), net()
    vectors = [fitted(trainer, net(), job(module, r)).sections[DELTA].vector for r in (1, 1, 2)]
    assert np.array_equal(vectors[0], vectors[1])
    assert not np.array_equal(vectors[0], vectors[2])


def test_what_is_not_finite_is_no_update():
    module = net()
    with torch.no_grad():
        module.layers[1].weight.fill_(float("inf"))
    with pytest.raises(TrainingDivergedError, match=r"client 3's loss .* lower server\.lr"):
        fitted(FedSgd(), module, job(module))


@pytest.mark.parametrize("number", [None, 0, -1, True, "1", 1.5])
def test_a_request_without_a_round_is_refused_where_there_are_several_mini_batches(number):
    module = net()
    with pytest.raises(Refused, match="server-round"):
        fitted(FedSgd(batch_size=100), module, job(module, number))
    assert fitted(FedSgd(batch_size=5_000), net(), job(module, number)).sections[DELTA].vector.any()


@pytest.mark.parametrize("setting", ["lr", "local_epochs", "momentum", "weight_decay"])
def test_settings_of_local_steps_are_not_there_to_be_set(setting):
    with pytest.raises(TypeError, match=setting):
        FedSgd(**{setting: 1})


def test_the_squared_loss_is_halved_so_that_its_gradient_is_the_difference():
    outputs = torch.randn(6, 4, requires_grad=True)
    targets = torch.tensor([0, 3, 1, 1, 2, 0])
    (gradient,) = torch.autograd.grad(squared_loss(outputs, targets), outputs)
    torch.testing.assert_close(gradient * 6, outputs.detach() - F.one_hot(targets, 4))


@pytest.mark.parametrize("targets", [torch.zeros(3), torch.zeros(3, 2, dtype=torch.long)])
def test_the_squared_loss_needs_class_labels(targets):
    with pytest.raises(ValueError, match="one class label an example: use loss=cross_entropy"):
        squared_loss(torch.zeros(3, 2), targets)


@settings(max_examples=many(100))
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=300),
    st.integers(1, 100),
    st.integers(0, 2**40),
    st.integers(-1, 1_000),
)
def test_mini_batches_share_all_examples_and_classes_evenly(labels, size, seed, client):
    targets = np.array(labels)
    cut = batches(targets, size, seed, client)
    assert sorted(np.concatenate(cut).tolist()) == list(range(len(targets)))
    assert len(cut) == -(-len(targets) // size)
    lengths = [len(rows) for rows in cut]
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1
    counts = np.array([np.bincount(targets[rows], minlength=10) for rows in cut])
    assert np.ptp(counts, axis=0).max() <= 1
    again = batches(targets, size, seed, client)
    assert all(np.array_equal(one, other) for one, other in zip(cut, again, strict=True))


def test_mini_batches_are_of_seed_and_client():
    targets = TASK.train().targets.numpy()
    cuts = {tuple(batches(targets, 100, seed, client)[0]) for seed in (0, 1) for client in (0, 1)}
    assert len(cuts) == 4


def test_targets_that_are_no_classes_are_dealt_all_the_same():
    cut = batches(np.linspace(0, 1, 50).reshape(25, 2), 8, 0, 0)
    assert sorted(np.concatenate(cut).tolist()) == list(range(25))
    assert [len(rows) for rows in cut] == [7, 6, 6, 6]


@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(-1, 1_000), st.integers(0, 100))
def test_each_epoch_has_every_mini_batch_once(count, seed, client, epoch):
    rounds = range(epoch * count + 1, (epoch + 1) * count + 1)
    assert sorted(batch_of_round(r, count, seed, client) for r in rounds) == list(range(count))


def test_epochs_and_clients_have_orders_of_their_own():
    orders = {
        tuple(batch_of_round(epoch * 20 + place + 1, 20, 0, client) for place in range(20))
        for epoch in range(3)
        for client in range(3)
    }
    assert len(orders) == 9


def test_what_can_be_no_schedule_is_refused():
    with pytest.raises(ValueError, match="must be at least 1"):
        batches(np.zeros(3, np.int64), 0, 0, 0)
    with pytest.raises(ValueError, match="there are no examples"):
        batches(np.zeros(0, np.int64), 5, 0, 0)
    for number, count in ((0, 3), (1, 0)):
        with pytest.raises(ValueError, match="both count from 1"):
            batch_of_round(number, count, 0, 0)
