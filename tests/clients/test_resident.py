"""The resident model: one flat tensor stands for a whole module, and nothing leaks from client to client."""

import numpy as np
import pytest
import torch
from torch import nn

from clients.resident import ResidentModel, arrays_of, buffers_of
from strategies.update import BUFFERS, COUNTERS, DELTA


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_a_step_on_the_flat_tensor_is_a_step_of_the_module():
    torch.manual_seed(0)
    plain, module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), None
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    module.load_state_dict(plain.state_dict())
    resident = ResidentModel(module, arrays_of(module))
    resident.load(arrays_of(plain))
    inputs = torch.randn(8, 3)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(5):
        gradients = resident.gradients(resident.module(inputs).square().mean())
        resident.flat.add_(resident.flattened(gradients), alpha=-0.1)
        reference.zero_grad()
        plain(inputs).square().mean().backward()
        reference.step()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], tensor, rtol=0, atol=0)


def test_the_sections_are_what_changed_since_the_load():
    module = normed()
    arrays = arrays_of(module)
    resident = ResidentModel(module, arrays)
    resident.load(arrays)
    module.train()
    for _ in range(3):
        module(torch.randn(6, 3))
    with torch.no_grad():
        resident.flat += 0.5
    sections = resident.sections()
    np.testing.assert_allclose(sections[DELTA].vector, 0.5, rtol=1e-5)
    moved = sections[BUFFERS].layout.views(sections[BUFFERS].vector)
    np.testing.assert_array_equal(
        moved["1.running_mean"], module[1].running_mean.numpy() - arrays["1.running_mean"]
    )
    assert sections[COUNTERS].vector.tolist() == [3.0]


def test_a_load_leaves_nothing_of_the_client_before():
    module = normed()
    arrays = arrays_of(module)
    resident = ResidentModel(module, arrays)
    resident.load(arrays)
    module(torch.randn(6, 3)).sum().backward()
    with torch.no_grad():
        resident.flat += 1
    resident.load(arrays)
    for name, tensor in module.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), arrays[name])


def test_what_does_not_travel_is_frozen():
    module = normed()
    arrays = {name: array for name, array in arrays_of(module).items() if name.startswith("2.")}
    resident = ResidentModel(module, arrays)
    assert resident.layout.names == ("2.weight", "2.bias")
    assert not module[0].weight.requires_grad
    assert module[2].weight.requires_grad


def test_tied_weights_travel_once_and_stay_tied():
    module = Tied()
    arrays = arrays_of(module)
    assert list(arrays) == ["embed.weight"]
    resident = ResidentModel(module, arrays)
    resident.load({"embed.weight": np.full((5, 3), 2.0, np.float32)})
    assert module.head.weight.detach().eq(2).all()
    (gradient,) = resident.gradients(module(torch.tensor([1, 2])).sum())
    assert gradient.abs().sum() > 0


def test_float_buffers_are_named_and_counters_are_not():
    assert buffers_of(normed()) == ["1.running_mean", "1.running_var"]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"nothing": np.zeros(3, np.float32)}, "no such array"),
        ({"0.weight": np.zeros((9, 9), np.float32)}, r"shape \(4, 3\)"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_both_shapes(arrays, words):
    with pytest.raises(ValueError, match=words):
        ResidentModel(normed(), arrays)


def test_a_travelling_parameter_of_half_precision_is_refused():
    module = nn.Linear(2, 2).half()
    with pytest.raises(ValueError, match="only float32"):
        ResidentModel(module, arrays_of(module))


def test_a_later_load_of_another_shape_is_refused():
    module = normed()
    resident = ResidentModel(module, arrays_of(module))
    with pytest.raises(ValueError, match="missing or has changed"):
        resident.load({"0.weight": np.zeros((4, 3), np.float32)})


def test_buffers_that_do_not_travel_do_not_go_from_client_to_client():
    module = normed()
    arrays = {n: a for n, a in arrays_of(module).items() if n.endswith(("weight", "bias"))}
    resident = ResidentModel(module, arrays)
    resident.load(arrays)
    module.train()
    module(torch.randn(6, 3))
    assert module[1].running_mean.abs().sum() > 0
    resident.load(arrays)
    assert module[1].running_mean.eq(0).all()
