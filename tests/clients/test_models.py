"""The models that come with the project."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, stack_module_state, vmap

from clients.models import Cnn, Linear, Mlp
from clients.tasks import Digits, Mnist, evaluate


@pytest.fixture(autouse=True)
def one_thread():
    """Small models are slower on several threads, and the sum of a run should not vary."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SHAPES = [(1, 28, 28), (1, 8, 8), (3, 32, 32), (2, 4, 17)]


@pytest.mark.parametrize("model", [Cnn, Mlp, Linear])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_gives_one_logit_for_each_class_of_any_image(model, shape):
    assert model(shape, 7)(torch.randn(3, *shape)).shape == (3, 7)


@pytest.mark.parametrize("model", [Cnn, Mlp, Linear])
def test_every_number_of_the_state_is_a_trained_parameter(model):
    made = model((1, 28, 28), 10)
    assert list(made.buffers()) == []
    F.cross_entropy(made(torch.randn(8, 1, 28, 28)), torch.arange(8)).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in made.parameters())


@pytest.mark.parametrize("model", [Cnn, Mlp, Linear])
def test_the_caller_s_seed_decides_the_initial_weights(model):
    def weights(seed):
        torch.manual_seed(seed)
        made = model((1, 8, 8), 10)
        return torch.cat([parameter.flatten() for parameter in made.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("model", [Cnn, Mlp, Linear])
def test_many_clients_models_can_be_trained_as_one_batch(model):
    models = [model((1, 8, 8), 10) for _ in range(3)]
    stacked, _ = stack_module_state(models)
    inputs, targets = torch.randn(3, 5, 1, 8, 8), torch.randint(10, (3, 5))

    def loss(parameters, inputs, targets):
        return F.cross_entropy(functional_call(models[0], parameters, (inputs,)), targets)

    together = vmap(grad(loss))(stacked, inputs, targets)
    for client, made in enumerate(models):
        F.cross_entropy(made(inputs[client]), targets[client]).backward()
        for name, parameter in made.named_parameters():
            torch.testing.assert_close(together[name][client], parameter.grad)


def test_the_sizes_are_as_documented():
    def count(model):
        return sum(parameter.numel() for parameter in model.parameters())

    assert count(Cnn((1, 28, 28), 10)) == 10_554
    assert count(Cnn((1, 28, 28), 10, width=16)) == 416 + 9_280 + 16_010
    assert count(Mlp((1, 8, 8), 10, hidden=(32, 16))) == 64 * 32 + 32 + 32 * 16 + 16 + 16 * 10 + 10
    assert count(Mlp((1, 8, 8), 10, hidden=())) == count(Linear((1, 8, 8), 10)) == 650


@pytest.mark.parametrize("shape", [(64,), (28, 28), (1, 3, 28)])
def test_the_cnn_refuses_what_is_not_an_image(shape):
    with pytest.raises(ValueError, match=r"\(channels, height, width\) .* use Mlp or Linear"):
        Cnn(shape, 10)


def fit(model, task, *, lr, epochs, batch_size=20):
    optimizer = torch.optim.SGD(model.parameters(), lr)
    examples = task.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(examples)).split(batch_size):
            batch = examples.take(rows)
            optimizer.zero_grad()
            task.loss(model(batch.inputs), batch.targets).backward()
            optimizer.step()
    return evaluate(model, task, task.test())["accuracy"]


@pytest.mark.parametrize(("model", "least"), [(Mlp, 0.95), (Linear, 0.93)])
def test_the_small_digits_are_learnt_in_a_few_epochs(model, least):
    torch.manual_seed(0)
    task = Digits()
    assert fit(model(task.input_shape, task.num_classes), task, lr=0.1, epochs=5) >= least


def test_the_cnn_reaches_97_percent_on_mnist():
    torch.manual_seed(0)
    task = Mnist()
    model = Cnn(task.input_shape, task.num_classes, width=16)
    for lr, epochs in ((0.1, 5), (0.01, 1)):
        accuracy = fit(model, task, lr=lr, epochs=epochs)
    assert accuracy >= 0.97
