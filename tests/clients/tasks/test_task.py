"""The interface of a task, and evaluation."""

import importlib
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from clients.tasks import Examples, FederatedData, Task, evaluate
from clients.tasks.task import check_task, fingerprint


class Points(Task):
    """Two classes of points in the plane."""

    input_shape = (2,)
    num_classes = 2

    def __init__(self, inputs=None, targets=None):
        self._inputs = torch.randn(20, 2) if inputs is None else inputs
        self._targets = torch.arange(len(self._inputs)) % 2 if targets is None else targets

    def train(self):
        return Examples(self._inputs, self._targets)

    def test(self):
        return Examples(self._inputs[:4], self._targets[:4])


class Words(Points):
    """Rows of tokens from 0 to 7."""

    def __init__(self, vocab_size):
        super().__init__(torch.arange(8).reshape(4, 2))
        self.vocab_size = vocab_size


class Untrained(nn.Module):
    """Gives its inputs back as logits, and notes in which mode it was asked."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Dropout()
        self.modes = []

    def forward(self, inputs):
        self.modes.append(self.training)
        return self.frozen(inputs)


def test_examples_refuse_inputs_without_targets():
    with pytest.raises(ValueError, match="3 inputs but 2 targets"):
        Examples(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_take_gives_the_rows_in_the_order_asked_for(kind):
    examples = Examples(torch.arange(10.0).reshape(5, 2), torch.arange(5))
    taken = examples.take(kind([4, 0, 4]))
    assert taken.targets.tolist() == [4, 0, 4]
    assert taken.inputs.tolist() == [[8.0, 9.0], [0.0, 1.0], [8.0, 9.0]]
    assert len(taken) == 3


def test_take_refuses_a_row_that_is_not_there():
    with pytest.raises(IndexError):
        Examples(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)).take([3])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 512])
def test_evaluate_equals_a_hand_computation_for_any_batch_size(batch_size):
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [0.0, math.log(3.0)]])
    targets = torch.tensor([0, 0, 0])
    task = Points(logits, targets)
    found = evaluate(Untrained(), task, Examples(logits, targets), batch_size=batch_size)
    expected_loss = (math.log(2) + math.log(4 / 3) + math.log(4)) / 3
    assert found.keys() == {"loss", "accuracy", "num_examples"}
    assert found["loss"] == pytest.approx(expected_loss, rel=1e-6)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["num_examples"] == 3


def test_evaluate_runs_in_eval_mode_without_gradients_and_leaves_each_mode_as_it_was():
    model, task = Untrained(), Points()
    model.train()
    model.frozen.eval()
    first = evaluate(model, task, task.train())
    assert model.modes == [False]
    assert (model.training, model.frozen.training) == (True, False)
    assert first == evaluate(model, task, task.train())


def test_evaluate_restores_the_mode_when_the_model_fails():
    model, task = nn.Linear(3, 2), Points()
    with pytest.raises(RuntimeError):
        evaluate(model, task, task.train())
    assert model.training


def test_evaluate_refuses_to_average_over_nothing():
    task = Points()
    with pytest.raises(ValueError, match="no examples"):
        evaluate(Untrained(), task, task.train().take([]))


def test_evaluate_refuses_a_metric_that_would_hide_the_loss():
    class Hiding(Points):
        def metrics(self, output, targets):
            return {"loss": 0.0}

    task = Hiding()
    with pytest.raises(ValueError, match=r"Hiding.metrics returns \['loss'\]"):
        evaluate(Untrained(), task, task.train())


def test_a_task_may_bring_its_own_loss_metrics_and_targets():
    class Regression(Points):
        num_classes = 1

        def loss(self, output, targets):
            return (output.sum(dim=1) - targets).square().mean()

        def metrics(self, output, targets):
            return {"absolute_error": (output.sum(dim=1) - targets).abs().mean().item()}

    inputs = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]])
    task = Regression(inputs, torch.tensor([1.0, 1.0, 0.0]))
    check_task(task)
    assert evaluate(Untrained(), task, task.train(), batch_size=2) == pytest.approx(
        {"loss": 10 / 3, "absolute_error": 4 / 3, "num_examples": 3}
    )


def test_a_task_from_outside_the_project_can_be_cut_and_evaluated(tmp_path, monkeypatch):
    (tmp_path / "their_module.py").write_text(
        "import torch\n"
        "from clients.tasks import Examples, Task\n"
        "class Parity(Task):\n"
        "    input_shape, num_classes = (1,), 2\n"
        "    def train(self):\n"
        "        return Examples(torch.arange(40.0).reshape(-1, 1), torch.arange(40) % 2)\n"
        "    def test(self):\n"
        "        return Examples(torch.arange(40.0, 50.0).reshape(-1, 1), torch.arange(10) % 2)\n"
        "    def natural_ids(self):\n"
        "        return [str(i // 10) for i in range(40)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    task = importlib.import_module("their_module").Parity()
    monkeypatch.delitem(sys.modules, "their_module")
    data = FederatedData(task, 4, partition="natural")
    assert set(data.train(0).inputs.flatten().tolist()) < set(range(10))
    assert evaluate(nn.Linear(1, 2), task, task.test())["num_examples"] == 10


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Points(torch.zeros(4, 3)), r"inputs of shape \(3,\), but its input_shape is \(2,\)"),
        (Points(torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])), "labels from 0 to 2"),
        (Points(torch.zeros(4, 2), torch.tensor([0, 1, -1, 0])), "labels from -1 to 1"),
        (Points(torch.zeros(0, 2)), "holds no examples"),
        (Words(5), "holds torch.int64 from 0 to 7, but its vocab_size is 5"),
    ],
)
def test_a_task_that_contradicts_itself_is_refused(task, message):
    with pytest.raises(ValueError, match=message):
        check_task(task)


def test_a_task_that_says_nothing_of_its_shape_is_refused():
    class Shapeless(Task):
        num_classes = 2

        def train(self):
            return Examples(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long))

        test = train

    with pytest.raises(TypeError, match="Shapeless has no attribute input_shape"):
        check_task(Shapeless())


def test_the_fingerprint_tells_data_from_other_data():
    inputs = torch.randn(20, 2)
    same = fingerprint(Points(inputs))
    assert same == fingerprint(Points(inputs.clone()))
    others = [
        Points(inputs.flip(0)),
        Points(inputs, 1 - torch.arange(20) % 2),
        Points(inputs.double()),
        Points(inputs[:19]),
    ]
    assert len({same, *map(fingerprint, others)}) == 5
