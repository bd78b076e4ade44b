"""Tasks with several goals: their loss and metrics, who trains what, and the goals of docstrings."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clients.tasks import Docstrings, Examples, FederatedData, Task, evaluate
from clients.tasks.docstrings import KINDS, read_docstrings
from clients.tasks.task import UNLABELLED, check_task, class_labels, fingerprint

FEW = {"packages": ("flwr", "sklearn", "matplotlib"), "max_per_package": 60}
ALL = ("package", "kind", "arguments")


class Several(Task):
    """Inputs that are their own row numbers, with two goals of 2 and 3 classes."""

    input_shape = (1,)
    num_classes = 5

    def __init__(self, targets, goals=None):
        self._targets = torch.as_tensor(targets)
        self.goals = {"odd": 2, "rest": 3} if goals is None else goals

    def train(self):
        return Examples(torch.arange(float(len(self._targets))).reshape(-1, 1), self._targets)

    def test(self):
        return self.train()


def counting(n: int = 60) -> Several:
    """Both goals' labels follow from the row number."""
    rows = torch.arange(n)
    return Several(torch.stack([rows % 2, rows % 3], dim=1))


class Knows(nn.Module):
    """The right logits for `counting`, but that rows from `wrong` on have the first goal's turned round."""

    def __init__(self, wrong: int) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, inputs):
        rows = inputs.flatten().long()
        odd = (rows + (rows >= self.wrong)) % 2
        return torch.cat([F.one_hot(odd, 2), F.one_hot(rows % 3, 3)], dim=1).float()


@pytest.fixture(scope="module")
def docstrings():
    return Docstrings(**FEW, goals=ALL)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**20),
    sizes=st.lists(st.integers(2, 5), min_size=1, max_size=4),
    rows=st.integers(1, 8),
)
def test_a_loss_is_the_mean_over_the_goals_that_an_example_is_labelled_for(seed, sizes, rows):
    rng = np.random.default_rng(seed)
    goals = {f"g{number}": size for number, size in enumerate(sizes)}
    targets = np.stack([rng.integers(0, size, rows) for size in sizes], axis=1)
    targets[rng.random(targets.shape) < 0.4] = UNLABELLED
    output = rng.standard_normal((rows, sum(sizes)))
    given_output = torch.tensor(output, requires_grad=True)
    task = Several(targets, goals)
    losses = task.losses(given_output, torch.as_tensor(targets))
    for row in range(rows):
        each = []
        for goal, (begin, size) in enumerate(zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True)):
            if targets[row, goal] != UNLABELLED:
                logits = output[row, begin : begin + size]
                each.append(np.log(np.exp(logits).sum()) - logits[targets[row, goal]])
        assert losses[row].item() == pytest.approx(np.mean(each) if each else 0.0)
    assert task.loss(given_output, torch.as_tensor(targets)).item() == pytest.approx(
        losses.mean().item()
    )


def test_a_goal_that_is_not_trained_has_no_gradient():
    task = counting(12)
    output = torch.randn(12, 5, requires_grad=True)
    task.loss(output, task.train().only(1).targets).backward()
    assert (output.grad[:, :2] == 0).all()
    assert (output.grad[:, 2:] != 0).all()
    alone = output.detach()[:, 2:].clone().requires_grad_()
    F.cross_entropy(alone, task.train().targets[:, 1]).backward()
    assert torch.equal(alone.grad, output.grad[:, 2:])


def test_accuracies_are_told_goal_by_goal_and_in_the_mean():
    task = counting()
    found = evaluate(Knows(45), task, task.test())
    assert found["accuracy_odd"] == 0.75
    assert found["accuracy_rest"] == 1.0
    assert found["accuracy"] == 0.875
    assert found["num_examples"] == 60


@pytest.mark.parametrize("batch_size", [1, 7, 60, 512])
def test_an_accuracy_is_over_the_examples_with_a_label_whatever_the_batches(batch_size):
    task = counting()
    targets = task.test().targets.clone()
    targets[:20, 0] = UNLABELLED
    targets[50:, 1] = UNLABELLED
    found = evaluate(Knows(45), task, Examples(task.test().inputs, targets), batch_size=batch_size)
    assert found["accuracy_odd"] == pytest.approx(25 / 40)
    assert found["accuracy_rest"] == 1.0
    assert found["accuracy"] == pytest.approx((25 / 40 + 1) / 2)
    assert math.isfinite(found["loss"])


def test_a_goal_without_labels_has_no_accuracy():
    task = counting()
    found = evaluate(Knows(45), task, task.test().only(0))
    assert found.keys() == {"accuracy", "accuracy_odd", "loss", "num_examples"}
    nothing = Examples(task.test().inputs, torch.full((60, 2), UNLABELLED))
    assert evaluate(Knows(45), task, nothing) == {"loss": 0.0, "num_examples": 60}


def test_a_client_trains_and_tests_on_one_goal_in_turn():
    task = counting()
    data = FederatedData(task, 5, root_examples=6)
    for client in range(5):
        goal = client % 2
        assert task.goal_of(client) == ["odd", "rest"][goal]
        for part in (data.train(client), data.test(client)):
            own = part.inputs.flatten().long()
            assert torch.equal(part.targets[:, goal], own % (2, 3)[goal])
            assert (part.targets[:, 1 - goal] == UNLABELLED).all()
    assert (data.root().targets != UNLABELLED).all()
    assert (task.test().targets != UNLABELLED).all()
    assert (task.train().targets != UNLABELLED).all()  # a client's mask is on a copy


def test_a_task_without_goals_has_no_clients_of_one():
    task = Docstrings(**FEW)
    assert not task.goals
    assert task.goal_of(3) is None
    assert task.logits_of() == {}


@pytest.mark.parametrize("partition", ["dirichlet", "pathological", "shard", "inner_dirichlet"])
def test_partitions_by_class_look_at_the_first_goal(partition):
    several = FederatedData(counting(), 4, partition=partition, alpha=0.5, classes_per_client=1)
    task = Several(torch.arange(60) % 2, goals={})
    task.num_classes = 2
    one = FederatedData(task, 4, partition=partition, alpha=0.5, classes_per_client=1)
    for client in range(4):
        assert all(map(np.array_equal, several.rows(client), one.rows(client)))
    assert class_labels(counting()).tolist() == [row % 2 for row in range(60)]


def test_root_examples_are_even_in_the_first_goal():
    data = FederatedData(counting(), 2, root_examples=10)
    assert data.root().targets[:, 0].bincount().tolist() == [5, 5]


def test_label_counts_are_of_each_clients_own_goal():
    data = FederatedData(counting(), 3)
    counts = data.label_counts()
    assert counts.shape == (3, 5)
    for client in range(3):
        rows = np.concatenate(data.rows(client))
        expected = np.zeros(5, int)
        if client % 2:
            expected[2:] = np.bincount(rows % 3, minlength=3)
        else:
            expected[:2] = np.bincount(rows % 2, minlength=2)
        assert counts[client].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("targets", "goals", "message"),
    [
        ([[0, 3], [1, 0]], None, "labels from 0 to 3 for the goal rest, which has 3 classes"),
        ([[0, -1], [1, 0]], None, "labels from -1 to 0 for the goal rest"),
        ([[-100, 2], [-100, 0]], None, "no labels for the goal odd"),
        ([0, 1], None, r"shape \(2,\): with 2 goals they are long, of shape \(n, 2\)"),
        ([[0.0, 1.0]], None, "targets of torch.float32"),
        ([[0, 1]], {"odd": 2, "rest": 2}, "num_classes is 5, but its goals have 4"),
        ([[0, 1]], {"odd.one": 2, "rest": 3}, "'odd.one': a goal's name"),
        ([[0, 1]], {"parameters": 2, "rest": 3}, "'parameters', which a torch module has already"),
    ],
)
def test_untrue_goals_are_refused(targets, goals, message):
    with pytest.raises(ValueError, match=message):
        check_task(Several(targets, goals))


def test_labels_may_be_missing():
    check_task(Several([[0, UNLABELLED], [UNLABELLED, 2]]))


def test_one_goal_of_docstrings_is_a_task_without_goals():
    plain, kind = Docstrings(**FEW), Docstrings(**FEW, goals=("kind",))
    assert fingerprint(plain) == fingerprint(Docstrings(**FEW, goals=("package",)))
    assert kind.train().targets.ndim == 1
    assert (kind.num_classes, kind.classes) == (3, list(KINDS))
    assert not kind.goals
    check_task(kind)


def test_goals_of_docstrings_stand_side_by_side(docstrings):
    check_task(docstrings)
    assert docstrings.goals == {"package": 3, "kind": 3, "arguments": 2}
    assert docstrings.num_classes == len(docstrings.classes) == 8
    assert docstrings.logits_of()["arguments"] == slice(6, 8)
    plain = Docstrings(**FEW)
    assert torch.equal(docstrings.train().inputs, plain.train().inputs)
    assert torch.equal(docstrings.train().targets[:, 0], plain.train().targets)
    assert torch.equal(docstrings.test().targets[:, 0], plain.test().targets)
    kinds = {
        item.text: item.kind for item in read_docstrings(tuple(sorted(FEW["packages"])), 60, 12)
    }
    labels = [KINDS.index(kinds[text]) for text in docstrings.texts[0]]
    assert docstrings.train().targets[:, 1].tolist() == labels


def test_no_class_of_a_goal_is_rare(docstrings):
    for examples in (docstrings.train(), docstrings.test()):
        for column, classes in zip(
            examples.targets.unbind(1), docstrings.goals.values(), strict=True
        ):
            share = column.bincount(minlength=classes) / len(column)
            assert share.min() > 0.1
            assert share.max() < 0.65


@pytest.mark.slow
def test_each_goal_can_be_learnt_from_the_words_and_none_is_given_away():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    task = Docstrings(max_per_package=150, goals=ALL)
    train, test = ([" ".join(text.split()[:48]) for text in texts] for texts in task.texts)
    vectorizer = TfidfVectorizer(max_features=2_000)
    seen, unseen = vectorizer.fit_transform(train), vectorizer.transform(test)
    for goal in range(3):
        wanted = task.test().targets[:, goal].numpy()
        model = LogisticRegression(C=10, max_iter=1_000, class_weight="balanced")
        model.fit(seen, task.train().targets[:, goal].numpy())
        right = model.predict(unseen) == wanted
        balanced = np.mean([right[wanted == label].mean() for label in set(wanted)])
        chance = 1 / len(set(wanted))
        assert chance + 0.15 < balanced < 0.95, ALL[goal]


def test_what_a_docstring_stands_in_and_whether_it_lists_parameters(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("oneness", "twoness"):
        (tmp_path / name).mkdir()
    read_docstrings.cache_clear()
    (tmp_path / "oneness" / "a.py").write_text(
        '"""of the module, with parameters: many"""\n'
        'class A:\n    """of the class\n\n    Args:\n        x: a number\n    """\n'
        '    if True:\n        async def f(self):\n            """of the method\n\n'
        "            Parameters\n            ----------\n            x : int\n"
        '            """\n'
        '            def g():\n                """of the inner function\n\n'
        '                :param x: a number"""\n'
        'def h():\n    """of the function, see Parameters below"""\n'
    )
    (tmp_path / "twoness" / "__init__.py").write_text('"""of another package"""\n')
    found = read_docstrings(("oneness", "twoness"), 100, 3)
    assert [(item.text.split()[2], item.kind, item.arguments) for item in found] == [
        ("module", "other", False),
        ("class", "other", True),
        ("method", "method", True),
        ("inner", "function", True),
        ("function", "function", False),
        ("package", "other", False),
    ]


@pytest.mark.parametrize(
    ("goals", "message"),
    [
        (("package", "author"), "there is no 'author', choose among package, kind, arguments"),
        ((), "name at least one"),
        (("kind", "kind"), "none twice"),
    ],
)
def test_goals_that_cannot_be_are_refused(goals, message):
    with pytest.raises(ValueError, match=message):
        Docstrings(**FEW, goals=goals)
