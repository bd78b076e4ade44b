"""Clients that are trained at once are trained as they would be alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clients.models import Cnn, Linear, Mlp
from clients.resident import ResidentModel, arrays_of
from clients.stacked import StackedModel
from clients.tasks import Digits, Examples, Task
from clients.trainers import SGD, FitJob, Proximal, Scaffold, TrainingDivergedError
from clients.trainers.suitability import MOST_PARAMETERS, drawback, obstacle
from clients.trainers.together import fit_together
from strategies.presets import PROXIMAL_MU
from strategies.update import CONTROL, DELTA

SHAPE, CLASSES = (1, 8, 8), 10


@pytest.fixture(scope="module")
def task():
    return Digits()


def resident(module):
    return ResidentModel(module, arrays_of(module))


def jobs_of(task, counts, arrays, seed=0, **extra):
    rng = np.random.default_rng(seed)
    examples = task.train()
    return [
        FitJob(
            client=client,
            arrays=arrays,
            broadcast=extra.get("broadcast", {}),
            examples=examples.take(rng.integers(0, len(examples), count)),
            seed=1_000 + client,
            state=extra.get("state", {}),
            settings=extra.get("settings", {}),
        )
        for client, count in enumerate(counts)
    ]


def assert_alike(alone, together):
    assert len(alone) == len(together)
    for one, other in zip(alone, together, strict=True):
        assert one.sections.keys() == other.sections.keys()
        for name, section in one.sections.items():
            np.testing.assert_allclose(
                other.sections[name].vector, section.vector, rtol=0, atol=1e-5
            )
            assert other.sections[name].layout == section.layout
        assert other.num_examples == one.num_examples
        assert other.metrics == pytest.approx(one.metrics, abs=1e-5)
        assert one.state.keys() == other.state.keys()
        for name, vector in one.state.items():
            np.testing.assert_allclose(other.state[name], vector, rtol=0, atol=1e-4)


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    trainer=st.builds(
        SGD,
        local_epochs=st.integers(1, 3),
        batch_size=st.integers(1, 24),
        lr=st.just(0.05),
        momentum=st.sampled_from([0.0, 0.9]),
        weight_decay=st.sampled_from([0.0, 0.01]),
        max_grad_norm=st.sampled_from([None, 0.5]),
    ),
)
@settings(deadline=None, max_examples=25)
def test_any_numbers_of_examples_give_what_one_by_one_gives(task, counts, trainer):
    torch.manual_seed(0)
    model = resident(Mlp(SHAPE, CLASSES, hidden=(16,)))
    jobs = jobs_of(task, counts, arrays_of(model.module))
    assert_alike(trainer.fit(jobs, model, task), fit_together(trainer, jobs, model, task))


@pytest.mark.parametrize("module", [Linear, Mlp, Cnn])
def test_so_does_every_model(task, module):
    torch.manual_seed(1)
    model = resident(module(SHAPE, CLASSES))
    jobs = jobs_of(task, [30, 7, 21], arrays_of(model.module))
    trainer = SGD(lr=0.1, batch_size=10, local_epochs=2)
    assert_alike(trainer.fit(jobs, model, task), fit_together(trainer, jobs, model, task))


def test_the_proximal_term_and_its_setting_of_each_job(task):
    model = resident(Mlp(SHAPE, CLASSES))
    arrays = arrays_of(model.module)
    jobs = [
        *jobs_of(task, [25, 40], arrays, settings={PROXIMAL_MU: 2.0}),
        *jobs_of(task, [25, 11], arrays),
    ]
    trainer = Proximal(mu=0.5, lr=0.1, batch_size=10, local_epochs=3)
    assert_alike(trainer.fit(jobs, model, task), fit_together(trainer, jobs, model, task))


def test_scaffolds_corrections_and_control_variates(task):
    model = resident(Mlp(SHAPE, CLASSES))
    rng = np.random.default_rng(3)
    size = model.layout.size
    broadcast = {CONTROL: rng.normal(0, 0.01, size).astype(np.float32)}
    state = {CONTROL: rng.normal(0, 0.01, size).astype(np.float32)}
    arrays = arrays_of(model.module)
    jobs = jobs_of(task, [25, 40, 3], arrays, broadcast=broadcast, state=state)
    trainer = Scaffold(lr=0.1, batch_size=10, local_epochs=2)
    alone, together = trainer.fit(jobs, model, task), fit_together(trainer, jobs, model, task)
    assert set(together[0].sections) == {DELTA, CONTROL}
    assert_alike(alone, together)


def test_clients_may_have_been_sent_different_models(task):
    model = resident(Mlp(SHAPE, CLASSES))
    first = arrays_of(model.module)
    second = {name: array + np.float32(0.1) for name, array in first.items()}
    jobs = jobs_of(task, [20, 20], first)[:1] + jobs_of(task, [20, 20], second)[1:]
    trainer = SGD(lr=0.1)
    assert_alike(trainer.fit(jobs, model, task), fit_together(trainer, jobs, model, task))


def test_what_does_not_travel_stays_as_it_was(task):
    module = Mlp(SHAPE, CLASSES)
    arrays = {name: a for name, a in arrays_of(module).items() if name.startswith("layers.1")}
    model = ResidentModel(module, arrays)
    frozen = module.layers[0].weight.detach().clone()
    jobs = jobs_of(task, [20, 9], arrays)
    trainer = SGD(lr=0.1)
    assert_alike(trainer.fit(jobs, model, task), fit_together(trainer, jobs, model, task))
    assert torch.equal(module.layers[0].weight, frozen)


def test_the_same_jobs_give_the_same_bits(task):
    model = resident(Mlp(SHAPE, CLASSES))
    jobs = jobs_of(task, [31, 4, 18, 25], arrays_of(model.module))
    trainer = SGD(lr=0.1, batch_size=8, momentum=0.9)
    once, again = (fit_together(trainer, jobs, model, task) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        assert one.sections[DELTA].vector.tobytes() == other.sections[DELTA].vector.tobytes()


def test_a_client_that_diverges_does_so_alone(task):
    model = resident(Mlp(SHAPE, CLASSES))
    jobs = jobs_of(task, [20, 20, 20], arrays_of(model.module))
    bad = Examples(jobs[1].examples.inputs * float("inf"), jobs[1].examples.targets)
    jobs[1] = FitJob(1, jobs[1].arrays, {}, bad, 1, {}, {})
    trainer = SGD(lr=0.1)
    alone, together = trainer.fit(jobs, model, task), fit_together(trainer, jobs, model, task)
    assert isinstance(together[1], TrainingDivergedError)
    assert str(together[1]) == str(alone[1])
    assert_alike([alone[0], alone[2]], [together[0], together[2]])


@given(st.integers(1, 4))
@settings(deadline=None, max_examples=5)
def test_rows_and_vectors_are_inverse(copies):
    stack = StackedModel(resident(Mlp(SHAPE, CLASSES, hidden=(6, 5))), copies)
    vectors = torch.arange(copies * stack.parameters.shape[1], dtype=torch.float32)
    vectors = vectors.view(copies, -1)
    rows = stack.rows(vectors)
    assert not torch.equal(rows, vectors)
    assert np.array_equal(stack.vectors(rows), vectors.numpy())


class Sum(Task):
    """A regression whose loss is a mean of one value for each example."""

    input_shape, num_classes = (3,), 1

    def train(self):
        inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        return Examples(inputs, inputs.sum(1))

    def test(self):
        return self.train()

    def losses(self, output, targets):
        return (output.squeeze(-1) - targets) ** 2

    def metrics(self, output, targets):
        return {}


class Whole(Sum):
    def loss(self, output, targets):
        return self.losses(output, targets).max()


def test_a_task_with_losses_of_its_own():
    model = resident(Linear((3,), 1))
    jobs = jobs_of(Sum(), [12, 40, 5], arrays_of(model.module))
    trainer = SGD(lr=0.1, batch_size=8, local_epochs=3)
    assert_alike(trainer.fit(jobs, model, Sum()), fit_together(trainer, jobs, model, Sum()))


class Words(nn.Module):
    """Token ids to logits; with dropout if asked."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, inputs):
        return self.head(self.dropout(self.embedding(inputs).mean(1)))


class Tokens(Task):
    input_shape, num_classes = (5,), CLASSES

    def train(self):
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randint(0, 30, (40, 5), generator=generator)
        return Examples(inputs, inputs.sum(1) % CLASSES)

    def test(self):
        return self.train()


def test_tokens_through_an_embedding():
    model = resident(Words())
    jobs = jobs_of(Tokens(), [12, 40, 5], arrays_of(model.module))
    trainer = SGD(lr=0.1, batch_size=8)
    assert_alike(trainer.fit(jobs, model, Tokens()), fit_together(trainer, jobs, model, Tokens()))


class Running(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8))

    def forward(self, inputs):
        return self.net(inputs)


class Branching(Linear):
    def forward(self, inputs):
        return super().forward(inputs if inputs.sum() > 0 else -inputs)


class OwnLoop(SGD):
    def fit_one(self, job, model, task):
        return super().fit_one(job, model, task)


class Frozen(Mlp):
    def __init__(self, input_shape, num_classes):
        super().__init__(input_shape, num_classes)
        self.layers[0].requires_grad_(False)


def test_what_the_model_has_frozen_stays_as_it_was(task):
    model = resident(Frozen(SHAPE, CLASSES))
    jobs = jobs_of(task, [20, 9, 33], arrays_of(model.module))
    trainer = SGD(lr=0.1, batch_size=10, momentum=0.5)
    alone, together = trainer.fit(jobs, model, task), fit_together(trainer, jobs, model, task)
    assert_alike(alone, together)
    for fits in (alone, together, SGD(lr=0.1).fit(jobs, model, task)):
        views = model.layout.views(fits[0].sections[DELTA].vector)
        assert not views["layers.0.weight"].any()
        assert views["layers.1.weight"].any()


def test_a_correction_of_ones_own_is_not_passed_over(task):
    class Still(SGD):
        def correct(self, gradient, parameters, start, correction):
            gradient.zero_()

    model = resident(Mlp(SHAPE, CLASSES))
    (fit,) = Still(lr=0.1).fit(jobs_of(task, [20], arrays_of(model.module)), model, task)
    assert not fit.sections[DELTA].vector.any()


class Batched(nn.Module):
    """Normalises over the batch, with no running statistics that would show."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.BatchNorm2d(1, track_running_stats=False), Linear(SHAPE, CLASSES)
        )

    def forward(self, inputs):
        return self.net(inputs)


class Remembering(Linear):
    seen = None

    def forward(self, inputs):
        output = super().forward(inputs)
        self.seen = output.mean()
        return output


class Langevin(SGD):
    def step(self, parameters, gradient, start, correction, velocity):
        parameters.add_(torch.randn_like(gradient))


class Weighted(Digits):
    def __init__(self):
        super().__init__()
        self.loss = nn.CrossEntropyLoss(weight=torch.rand(10))


class Noisy(Digits):
    def losses(self, output, targets):
        return super().losses(output, targets) + torch.randn(len(targets))


class Relative(Digits):
    def losses(self, output, targets):
        each = super().losses(output, targets)
        return each / each.sum()


@pytest.mark.parametrize(
    ("trainer", "module", "task", "why"),
    [
        (SGD(), Batched(), Digits(), "depends on the others of its batch"),
        (SGD(), Remembering(SHAPE, CLASSES), Digits(), "changes itself as it runs"),
        (SGD(), Linear(SHAPE, CLASSES), Weighted(), "Weighted has a `loss` of its own"),
        (SGD(), Linear(SHAPE, CLASSES), Noisy(), "draws random numbers"),
        (SGD(), Linear(SHAPE, CLASSES), Relative(), "depends on the others of its batch"),
        (Langevin(), Linear(SHAPE, CLASSES), Digits(), "does not say that it is stackable"),
        (SGD(), Running(), Digits(), "Running has buffers"),
        (SGD(), Words(0.5), Tokens(), "draws random numbers"),
        (SGD(), Branching(SHAPE, CLASSES), Digits(), "can't stack this model"),
        (SGD(), Linear((3,), 1), Whole(), "Whole has a `loss` of its own"),
        (OwnLoop(), Linear(SHAPE, CLASSES), Digits(), "OwnLoop has a training loop of its own"),
        (object(), Linear(SHAPE, CLASSES), Digits(), "object is not built on"),
    ],
)
def test_what_cannot_be_trained_together_is_told_with_the_reason(trainer, module, task, why):
    assert why in obstacle(trainer, module, task)


@pytest.mark.parametrize("trainer", [SGD(), Proximal(), Scaffold()])
def test_the_trainers_and_models_that_can(trainer):
    for module in (Linear, Mlp, Cnn):
        assert obstacle(trainer, module(SHAPE, CLASSES), Digits()) is None


def test_large_models_and_large_steps_are_not_worth_it():
    small = Mlp(SHAPE, CLASSES)
    assert drawback(SGD(), small, Digits()) is None
    large = Mlp(SHAPE, CLASSES, hidden=(MOST_PARAMETERS // 64,))
    assert "parameters" in drawback(SGD(), large, Digits())
    wide = Cnn(SHAPE, CLASSES, width=24)
    assert "million operations" in drawback(SGD(batch_size=100), wide, Digits())
