"""Clipped sums of per-example gradients, held against a loop over the examples."""

import pytest
import torch
from torch import nn

from clients.models import Cnn, Gru, Linear, Mlp
from clients.resident import ResidentModel, arrays_of
from clients.tasks import Examples, Task, evaluate
from clients.trainers.per_example import clipping, trained
from clients.trainers.per_example_trial import require_per_example

CLASSES, COUNT = 5, 11


class Shaped(Task):
    """A task that has a shape and no data."""

    num_classes = CLASSES

    def __init__(self, *shape: int, vocab_size: int | None = None) -> None:
        self.input_shape, self.vocab_size = shape, vocab_size

    def train(self) -> Examples:
        generator = torch.Generator().manual_seed(3)
        shape = (COUNT, *self.input_shape)
        if self.vocab_size is None:
            inputs = torch.randn(shape, generator=generator)
        else:
            inputs = torch.randint(self.vocab_size, shape, generator=generator)
            inputs[0], inputs[1, 2:] = 0, 0  # a text without a token, and a short one
        return Examples(inputs, torch.randint(CLASSES, (COUNT,), generator=generator))

    def test(self) -> Examples:
        return self.train()


class Grouped(nn.Module):
    """Convolution, group normalisation, and layers that Opacus knows no rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2)
        self.norm = nn.GroupNorm(2, 4)
        self.scale = Scale(4 * 9)
        self.head = nn.Linear(4 * 9, CLASSES)
        self.unused = nn.Linear(3, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.scale(torch.relu(self.norm(self.conv(inputs))).flatten(1)))


class Scale(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 2, size))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * self.factor


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **settings) -> None:
        super().__init__()
        self.layers = kind(3, 4, batch_first=True, **settings)
        self.head = nn.Linear(8 if settings.get("bidirectional") else 4, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(inputs)[0].mean(dim=1))


IMAGES, TEXTS = Shaped(1, 16, 16), Shaped(6, vocab_size=20)
CASES = {
    "linear": (lambda: Linear((1, 16, 16), CLASSES), IMAGES),
    "mlp": (lambda: Mlp((1, 16, 16), CLASSES, hidden=(9, 7)), IMAGES),
    "cnn": (lambda: Cnn((1, 16, 16), CLASSES, width=3), IMAGES),
    "gru": (lambda: Gru((6,), CLASSES, 20, embedding=4, hidden=5), TEXTS),
    "lstm": (lambda: Recurrent(nn.LSTM, bidirectional=True), Shaped(6, 3)),
    "rnn": (lambda: Recurrent(nn.RNN, num_layers=2, nonlinearity="relu"), Shaped(6, 3)),
    "group norm": (Grouped, Shaped(2, 8, 8)),
}
WAYS = pytest.mark.parametrize("ghost", [False, True], ids=["hooks", "ghost"])
MODELS = pytest.mark.parametrize("case", CASES)


def resident(module: nn.Module) -> ResidentModel:
    arrays = arrays_of(module)
    model = ResidentModel(module, arrays)
    model.load(arrays)
    model.module.train()
    return model


def made(case: str) -> tuple[ResidentModel, Task, Examples]:
    torch.manual_seed(1)
    make, task = CASES[case]
    return resident(make()), task, task.train()


def looped(model: ResidentModel, task: Task, examples: Examples) -> torch.Tensor:
    """Each example's gradient by itself, (n, p)."""
    rows = []
    for i in range(len(examples)):
        one = examples.take([i])
        model.module.zero_grad()
        task.loss(model.module(one.inputs), one.targets).backward()
        rows.append(
            torch.cat(
                [
                    torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
                    for p in trained(model)
                ]
            )
        )
    model.module.zero_grad(set_to_none=True)
    return torch.stack(rows)


def close(found: torch.Tensor, expected: torch.Tensor, within: float) -> bool:
    return float((found - expected).norm()) <= within * float(expected.norm())


@WAYS
@MODELS
def test_the_sum_is_that_of_a_loop_over_clipped_examples(case, ghost):
    model, task, examples = made(case)
    gradients = looped(model, task, examples)
    norms = gradients.norm(dim=1)
    norm = float(norms.median())  # half are clipped, half are not
    expected = (norm / norms.clamp(min=norm)) @ gradients
    with clipping(model, task, norm=norm, ghost=ghost, most=4) as clipped_sum:
        found = clipped_sum(examples.inputs, examples.targets)
    assert close(found, expected, 3e-5)


@MODELS
def test_ghost_clipping_gives_what_hooks_give(case):
    model, task, examples = made(case)
    sums = []
    for ghost in (False, True):
        with clipping(model, task, norm=0.05, ghost=ghost, most=64) as clipped_sum:
            sums.append(clipped_sum(examples.inputs, examples.targets))
    assert close(*sums, 1e-5)


@WAYS
@MODELS
def test_no_example_moves_the_sum_by_more_than_the_norm(case, ghost):
    model, task, examples = made(case)
    norm = 0.01
    with clipping(model, task, norm=norm, ghost=ghost, most=64) as clipped_sum:
        for i in range(len(examples)):
            one = examples.take([i])
            assert clipped_sum(one.inputs, one.targets).double().norm() <= norm


@WAYS
@pytest.mark.parametrize("case", ["cnn", "gru"])
def test_how_many_go_through_at_a_time_changes_nothing(case, ghost):
    model, task, examples = made(case)
    sums = []
    for most in (1, 4, 64):
        with clipping(model, task, norm=0.1, ghost=ghost, most=most) as clipped_sum:
            sums.append(clipped_sum(examples.inputs, examples.targets))
    assert close(sums[0], sums[2], 1e-5)
    assert close(sums[1], sums[2], 1e-5)


@WAYS
@MODELS
def test_no_examples_sum_to_zero(case, ghost):
    model, task, examples = made(case)
    none = examples.take([])
    with clipping(model, task, norm=1.0, ghost=ghost, most=4) as clipped_sum:
        clipped_sum(examples.inputs, examples.targets)
        found = clipped_sum(none.inputs, none.targets)
    assert found.shape == (sum(p.numel() for p in trained(model)),)
    assert not found.any()


@WAYS
@MODELS
def test_the_module_is_as_it_was(case, ghost):
    model, task, examples = made(case)
    layers = list(model.module.modules())
    before = [dict(vars(layer)) for layer in layers]
    was = evaluate(model.module, task, examples)
    flat = model.flat.clone()
    with clipping(model, task, norm=1.0, ghost=ghost, most=4) as clipped_sum:
        clipped_sum(examples.inputs, examples.targets)
    assert list(model.module.modules()) == layers
    assert [dict(vars(layer)) for layer in layers] == before
    assert not any(layer._forward_hooks or layer._backward_hooks for layer in layers)
    assert not any(vars(p) for p in model.module.parameters())
    assert all(p.grad is None for p in model.module.parameters())
    assert evaluate(model.module, task, examples) == was
    assert model.flat.equal(flat)
    assert [p.data_ptr() for p in model.module.parameters()] == [
        view.data_ptr() for view in model.travelling
    ]


@WAYS
def test_an_example_without_a_finite_gradient_adds_none(ghost):
    model, task, examples = made("cnn")
    spoilt = examples.inputs.clone()
    spoilt[2], spoilt[7, 0, 0, 0] = torch.nan, torch.inf
    others = examples.take([i for i in range(COUNT) if i not in (2, 7)])
    with clipping(model, task, norm=0.1, ghost=ghost, most=64) as clipped_sum:
        found = clipped_sum(spoilt, examples.targets)
        expected = clipped_sum(others.inputs, others.targets)
        none = clipped_sum(spoilt[2:3], examples.targets[2:3])
    assert close(found, expected, 1e-5)
    assert not none.any()


@WAYS
@MODELS
def test_the_trial_lets_them_pass_and_touches_nothing(case, ghost):
    model, task, examples = made(case)
    before, flat = torch.get_rng_state(), model.flat.clone()
    require_per_example(model, task, examples, ghost=ghost)
    assert torch.get_rng_state().equal(before)
    assert model.flat.equal(flat)
    assert all(layer.training for layer in model.module.modules())


class Normalised(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 5), norm, nn.Linear(4, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(inputs)).mean(dim=(2, 3)))


class Centred(nn.Module):
    """Takes the batch's mean off, without any layer that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(256, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = self.head(inputs.flatten(1))
        return outputs - outputs.mean(dim=0)


class Tied(nn.Module):
    """Its weight is used by a layer, and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(256, 256, bias=False), nn.Linear(256, CLASSES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(inputs.flatten(1))
        return self.head(nn.functional.linear(hidden, self.layer.weight))


class Counting(nn.Module):
    """Keeps a running mean in a layer that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.seen = nn.Linear(256, CLASSES), nn.Identity()
        self.seen.register_buffer("mean", torch.zeros(256))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen.mean.lerp_(inputs.flatten(1).mean(dim=0).detach(), 0.1)
        return self.head(inputs.flatten(1))


@WAYS
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normalised(nn.BatchNorm2d(4)), "layer 'norm', BatchNorm2d.*nn.GroupNorm"),
        (
            lambda: Normalised(nn.BatchNorm2d(4, affine=False, track_running_stats=False)),
            "BatchNorm2d.*nn.GroupNorm",
        ),
        (Centred, "in a batch is not what it is alone"),
        (Tied, "tied weights"),
        (Counting, "buffers change as it trains.*GroupNorm"),
    ],
    ids=["batch norm", "batch norm without statistics", "centred", "tied", "counting"],
)
def test_models_without_per_example_gradients_are_refused(make, message, ghost):
    model = resident(make())
    before = [dict(vars(layer)) for layer in model.module.modules()]
    with pytest.raises(ValueError, match=message):
        require_per_example(model, IMAGES, IMAGES.train(), ghost=ghost)
    assert [dict(vars(layer)) for layer in model.module.modules()] == before
    assert not any(vars(p) for p in model.module.parameters())


def test_a_layer_with_buffers_of_its_own_is_refused_and_left_as_it_was():
    module = nn.Sequential(nn.Flatten(), nn.Linear(256, CLASSES))
    module[1].register_buffer("scale", torch.ones(1))
    model = resident(module)
    with pytest.raises(ValueError, match="can't train this model: NotImplementedError"):
        require_per_example(model, IMAGES, IMAGES.train(), ghost=False)
    assert not any(vars(p) for p in module.parameters())


def test_dropout_is_no_coupling():
    model = resident(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, CLASSES)))
    require_per_example(model, IMAGES, IMAGES.train(), ghost=False)
    assert model.module[1].training


class Pairwise(Shaped):
    def loss(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (output.mean(dim=0) ** 2).sum()


def test_a_task_whose_loss_is_no_mean_over_examples_is_refused():
    task = Pairwise(1, 16, 16)
    model = resident(Linear((1, 16, 16), CLASSES))
    with pytest.raises(ValueError, match="Pairwise has a `loss` of its own"):
        require_per_example(model, task, task.train(), ghost=False)


def test_what_is_frozen_has_no_gradient_and_no_hook():
    torch.manual_seed(1)
    module = Mlp((1, 16, 16), CLASSES, hidden=(9,))
    model = ResidentModel(module, arrays_of(module))
    model.load(arrays_of(module))
    module.layers[0].requires_grad_(False)
    examples = IMAGES.train()
    with clipping(model, IMAGES, norm=1.0, ghost=False, most=8) as clipped_sum:
        assert not module.layers[0]._forward_hooks
        found = clipped_sum(examples.inputs, examples.targets)
    assert found.shape == (9 * CLASSES + CLASSES,)
