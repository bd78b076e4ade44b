"""How many examples fit: what is measured on small batches holds for large ones, and pieces learn what batches do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from clients.lora.profile import _Live
from clients.micro_batch import SHARE, FreeMemory, Need, measure
from clients.models import Cnn, Gru
from clients.resident import ResidentModel, arrays_of
from clients.tasks import Digits, Examples, Task
from clients.trainers import SGD, DpSgd, FitJob

TASK = Digits()


class Texts(Task):
    """Rows of tokens, of which the later ones are longer."""

    input_shape, num_classes, vocab_size, padding_id = (40,), 3, 500, 0

    def train(self) -> Examples:
        tokens = torch.randint(1, 500, (64, 40), generator=torch.Generator().manual_seed(1))
        lengths = torch.arange(64).unsqueeze(1) // 2 + 4
        return Examples(tokens * (torch.arange(40) < lengths), torch.arange(64) % 3)

    def test(self) -> Examples:
        return self.train()


class Normal(nn.Module):
    """A network with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.body(inputs)


def resident(module: nn.Module, task: Task = TASK) -> tuple[ResidentModel, FitJob]:
    arrays = arrays_of(module)
    return ResidentModel(module, arrays), FitJob(0, arrays, {}, task.train(), 7, {}, {})


def alive(model: ResidentModel, task: Task, examples: Examples) -> int:
    """Bytes that a whole step keeps alive at most, batch included."""
    inputs, targets = examples.inputs, examples.targets
    with _Live([*model.module.parameters(), *model.module.buffers()]) as live:
        model.gradients(task.loss(model.module(inputs), targets))
    return live.peak + inputs.nbytes + targets.nbytes


@pytest.mark.parametrize("kind", ["cnn", "gru", "normal"])
@pytest.mark.parametrize("count", [8, 64])
def test_what_is_measured_on_a_few_examples_holds_for_many(kind, count):
    torch.manual_seed(0)
    task = Texts() if kind == "gru" else TASK
    made = {
        "cnn": lambda: Cnn((1, 8, 8), 10, width=8),
        "gru": lambda: Gru((40,), 3, vocab_size=500, padding_id=0),
        "normal": Normal,
    }
    model, job = resident(made[kind](), task)
    need = measure(model, task, job)
    rows = np.arange(len(job.examples))[-count:]
    found = alive(model, task, job.examples.take(rows))
    # What a step takes beyond what was said is within what is left free for it.
    assert SHARE * found <= need.fixed + count * need.each <= 2 * found


def test_measuring_changes_neither_the_model_nor_any_draw():
    model, job = resident(Normal())
    before = {name: array.copy() for name, array in arrays_of(model.module).items()}
    state = torch.get_rng_state()
    measure(model, TASK, job)
    assert all(np.array_equal(a, before[n]) for n, a in arrays_of(model.module).items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_device_with_room_takes_the_whole_batch():
    model, job = resident(Cnn((1, 8, 8), 10))
    assert FreeMemory(SGD(batch_size=64), free=lambda: 10**9)(job, model, TASK) is None


@pytest.mark.parametrize("batch_size", [16, 64])
def test_the_largest_piece_that_fits_in_four_fifths_of_what_is_free_is_taken(batch_size):
    model, job = resident(Cnn((1, 8, 8), 10))
    need = measure(model, TASK, job)
    free = round((need.fixed + 9.5 * need.each) / SHARE)
    trainer = SGD(batch_size=batch_size)
    assert FreeMemory(trainer, free=lambda: free)(job, model, TASK) == 9
    assert FreeMemory(trainer, cap=free, free=lambda: 10**9)(job, model, TASK) == 9
    assert FreeMemory(trainer, cap=10**9, free=lambda: free)(job, model, TASK) == 9
    assert FreeMemory(trainer, free=lambda: 0)(job, model, TASK) == 1


def test_private_training_needs_room_for_each_examples_gradient():
    model, job = resident(Cnn((1, 8, 8), 10))
    free = 40 * 4 * model.flat.numel()
    plain = FreeMemory(SGD(batch_size=64), free=lambda: free)(job, model, TASK) or 64
    private = DpSgd(noise_multiplier=1.0, batch_size=64, max_physical_batch=64)
    assert (FreeMemory(private, free=lambda: free)(job, model, TASK) or 64) < plain


def test_a_model_is_measured_once(monkeypatch):
    model, job = resident(Cnn((1, 8, 8), 10))
    calls = []
    monkeypatch.setattr(
        "clients.micro_batch.measure", lambda *given: calls.append(given) or Need(0.0, 1.0)
    )
    ask = FreeMemory(SGD(batch_size=64), free=lambda: 100)
    for _ in range(3):
        assert ask(job, model, TASK) is None
    assert len(calls) == 1


@pytest.mark.parametrize("micro_batch", [1, 7, 16])
def test_a_piece_at_a_time_learns_what_whole_batches_do(micro_batch):
    torch.manual_seed(0)
    model, job = resident(Cnn((1, 8, 8), 10))
    trainer = SGD(batch_size=16, lr=0.05)
    whole = trainer.fit_one(job, model, TASK).sections["delta"].vector
    small = replace(job, course=replace(job.course, micro_batch=micro_batch))
    pieces = trainer.fit_one(small, model, TASK).sections["delta"].vector
    assert np.linalg.norm(pieces - whole) <= 1e-4 * np.linalg.norm(whole)
