"""Membership inference: exact scores on laws that are known, and real shadows on an overfitted real run."""

import json

import numpy as np
import pytest
import torch
from audit_helpers import contents, made, silent

from clients.tasks import Task, evaluate
from fl_app.audit.membership import audit_examples, likelihood_ratios, population
from fl_app.audit.ranking import auc
from fl_app.audit.shadows import Shadow, losses, shadows, with_training_data
from fl_app.audit.target import load
from fl_app.audit.training import AuditError

OVERFITTED = ["task._target_=audit_helpers.Mislabelled", "task.partition=iid", "num_clients=2"]
OVERFITTED += ["model.hidden=[128]", "client.local_epochs=20", "client.lr=0.2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made(tmp_path_factory.mktemp("runs"), *OVERFITTED)


def test_members_are_those_that_clients_train_on(run):
    target = load(run)
    examples, ids, inside, judged = population(target)
    task, data = target.assembly.task, target.assembly.data(2)
    assert ids is None
    assert len(examples) == len(task.train()) + len(task.test())
    assert inside.sum() == data.sizes.sum()
    assert (judged & ~inside).sum() == len(task.test()) + sum(len(data.test(c)) for c in range(2))
    for client in range(2):
        trained, tested = data.rows(client)
        assert inside[trained].all()
        assert not inside[tested].any()


def test_losses_are_those_of_the_evaluation(run):
    target = load(run)
    assembly, model = target.assembly, target.model()
    found = losses(assembly, model, assembly.task.test())
    module = assembly.module()
    module.load_state_dict({name: torch.from_numpy(array) for name, array in model.items()})
    expected = evaluate(module, assembly.task, assembly.task.test())
    assert found.shape == (expected["num_examples"],)
    assert found.mean() == pytest.approx(expected["loss"], rel=1e-5)


def test_a_loss_that_is_no_mean_is_taken_example_by_example(run):
    class Own(type(load(run).assembly.task)):
        def loss(self, output, targets):
            return Task.loss(self, output, targets) + len(targets) - 1

    target = load(run)
    examples = target.assembly.task.test().take(range(7))
    plain = losses(target.assembly, target.model(), examples)
    target.assembly.task.__class__ = Own
    np.testing.assert_allclose(losses(target.assembly, target.model(), examples), plain, atol=1e-6)


def test_the_attacks_find_members_of_an_overfitted_run_and_shadows_are_kept(run):
    """A third of the labels is learnt by heart: both areas were 0.60 and more, the ends of the intervals 0.57."""
    before, told = contents(run), []
    found = audit_examples(
        load(run), 2, confidence=0.95, progress=lambda number: lambda d, t: told.append((number, d))
    )
    assert contents(run) == before
    assert told == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert found.shadows == 2
    for attack in (found.loss, found.lira):
        assert attack.auc_interval[0] > 0.5
        assert attack.members > attack.others > 400
    json.dumps(found.to_dict())
    again = audit_examples(load(run), 2, confidence=0.95, progress=lambda number: told.append)
    assert again == found
    assert len(told) == 4


def test_shadows_are_halves_that_complement_one_another(run):
    target = load(run)
    examples, ids, _, _ = population(target)
    first, second = shadows(target, examples, ids, 2, lambda number: silent)
    assert not (first.inside & second.inside).any()
    held = (first.inside | second.inside).mean()
    assert held == pytest.approx(0.9, abs=0.01)  # a tenth are the clients' test parts
    for shadow in (first, second):
        area, _ = auc(-shadow.losses[shadow.inside], -shadow.losses[~shadow.inside])
        assert area > 0.5


def test_a_torn_shadow_is_trained_again(run):
    target = load(run)
    examples, ids, _, _ = population(target)
    kept = shadows(target, examples, ids, 1, lambda number: silent)
    path = run / "audit" / "shadows" / "0.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    (again,) = shadows(target, examples, ids, 1, lambda number: silent)
    np.testing.assert_array_equal(again.losses, kept[0].losses)


def test_a_half_is_still_a_task_of_its_class(run):
    task = load(run).assembly.task
    half = with_training_data(task, task.train().take(range(50)), None)
    assert type(half) is type(task)
    assert len(half.train()) == 50
    assert len(task.train()) > 50
    assert half.natural_ids() is None


def test_ratios_are_those_of_two_normal_laws():
    """8 shadows of 2,000 examples whose φ is N(3, 1) in and N(0, 1) out: the best score of x is 3x − 4.5, of
    area Φ(3/√2) = 0.983. Means of 4 shadows are off by 1/2, which costs little of it."""
    rng = np.random.default_rng(0)

    def law(inside):
        phi = rng.normal(size=inside.shape) + 3 * inside
        return np.log1p(np.exp(-phi))  # the loss whose φ it is

    order = np.argsort(rng.random((8, 2000)), axis=0)
    trained = [Shadow(row < 4, law(row < 4)) for row in order]
    member = rng.random(2000) < 0.5
    own = law(member)
    phi = -own - np.log(-np.expm1(-own))
    scores = likelihood_ratios(own, trained, logits=True)
    assert np.corrcoef(scores, 3 * phi - 4.5)[0, 1] > 0.8
    area, _ = auc(scores[member], scores[~member])
    assert area > 0.9


def test_an_example_that_no_shadow_had_takes_the_others_distance():
    inside = np.array([[True, False, True], [False, True, True]])
    seen = np.array([[2.0, 1.0, 5.0], [1.0, 3.0, 5.0]])
    trained = [Shadow(mask, -row) for mask, row in zip(inside, seen, strict=True)]
    low, high = (likelihood_ratios(-np.full(3, x), trained, logits=False) for x in (3.5, 5.0))
    assert high[2] > 0 > low[2]  # out would be at 5 − 1.5


def test_too_little_is_told_so(tmp_path):
    target = load(made(tmp_path, "task.test_fraction=0"))
    with pytest.raises(ValueError, match="1 shadows"):
        audit_examples(target, 1, confidence=0.95, progress=lambda number: silent)
    test = target.assembly.task.test().take(range(3))
    vars(target.assembly.task).update(test=lambda: test)
    with pytest.raises(AuditError, match="there are 3 others"):
        audit_examples(target, 0, confidence=0.95, progress=lambda number: silent)


def test_perfect_losses_have_finite_scores():
    trained = [Shadow(np.array([True, False]), np.array([0.0, 1.0]))]
    trained.append(Shadow(np.array([False, True]), np.array([1.0, 0.0])))
    assert np.isfinite(likelihood_ratios(np.zeros(2), trained, logits=True)).all()
