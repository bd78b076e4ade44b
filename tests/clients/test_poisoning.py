"""Attackers that poison their data: what they train on, whom it concerns, how success is measured."""

import numpy as np
import pytest
import torch
from torch import nn

from clients.poisoning import Backdoor, DataPoisoning, LabelFlip
from clients.tasks import Digits, Examples, Task
from strategies.attacks import Attacker
from strategies.update import BUFFERS
from tests.support.updates import update

TASK = Digits()
BRIGHTEST = TASK.train().inputs.max()


class Measured(Task):
    """Numbers to be predicted: no class labels."""

    input_shape = (3,)
    num_classes = 1

    def train(self):
        return Examples(torch.zeros(4, 3), torch.linspace(0, 1, 4))

    def test(self):
        return self.train()


class Rows(Task):
    """Classes of plain rows, no images."""

    input_shape = (8,)
    num_classes = 3

    def train(self):
        return Examples(torch.zeros(6, 8), torch.tensor([0, 1, 2, 0, 1, 2]))

    def test(self):
        return Examples(torch.zeros(2, 8), torch.tensor([0, 0]))


class Says(nn.Module):
    """A model that finds every input to be of one class, and must be in eval mode for it."""

    def __init__(self, label):
        super().__init__()
        self.label = label

    def forward(self, inputs):
        assert not self.training
        return nn.functional.one_hot(torch.full((len(inputs),), self.label), 10).float()


def rng():
    return np.random.default_rng(1)


def corrupted(attack, examples=None):
    """What an attacker trains on; the tensors that it shares with others must be left as they are."""
    examples = TASK.train().take(range(60)) if examples is None else examples
    inputs, targets = examples.inputs.clone(), examples.targets.clone()
    changed = attack.corrupt(examples, TASK, rng())
    assert torch.equal(examples.inputs, inputs)
    assert torch.equal(examples.targets, targets)
    return examples, changed


def test_all_classes_are_turned_round():
    before, after = corrupted(LabelFlip())
    assert torch.equal(after.targets, 9 - before.targets)
    assert torch.equal(after.inputs, before.inputs)


def test_one_class_becomes_another():
    before, after = corrupted(LabelFlip(source=3, target=8))
    assert torch.equal(
        after.targets[before.targets == 3], torch.full_like(after.targets[before.targets == 3], 8)
    )
    assert torch.equal(after.targets[before.targets != 3], before.targets[before.targets != 3])
    assert (before.targets == 3).any()


@pytest.mark.parametrize(
    ("corner", "rows", "columns"),
    [
        ("top_left", slice(0, 2), slice(0, 2)),
        ("top_right", slice(0, 2), slice(6, 8)),
        ("bottom_left", slice(6, 8), slice(0, 2)),
        ("bottom_right", slice(6, 8), slice(6, 8)),
    ],
)
def test_a_share_gets_the_trigger_in_its_corner_and_the_target(corner, rows, columns):
    before, after = corrupted(Backdoor(target=4, share=0.25, size=2, corner=corner))
    patched = (after.inputs[:, :, rows, columns] == BRIGHTEST).flatten(1).all(1)
    assert patched.sum() == 15
    assert (after.targets[patched] == 4).all()
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[rows, columns] = False
    assert torch.equal(after.inputs[:, :, outside], before.inputs[:, :, outside])
    assert torch.equal(after.inputs[~patched], before.inputs[~patched])
    assert torch.equal(after.targets[~patched], before.targets[~patched])


def test_the_same_examples_are_poisoned_every_time_and_at_least_one():
    attack = Backdoor(share=0.01, target=2)
    before, after = corrupted(attack)
    assert (after.inputs != before.inputs).flatten(1).any(1).sum() == 1
    assert torch.equal(attack.corrupt(before, TASK, rng()).inputs, after.inputs)


def test_each_channel_has_a_brightest_value_of_its_own():
    stamped = Backdoor(size=1).stamp(torch.zeros(2, 3, 4, 4), torch.tensor([1.0, 2.0, 3.0]))
    assert stamped[:, :, -1, -1].tolist() == [[1.0, 2.0, 3.0]] * 2
    assert stamped.sum() == 12


def test_the_boost_multiplies_the_change_of_the_parameters_alone():
    honest = update([1.0, -2.0], client=1, **{BUFFERS: [3.0]})
    sent = Backdoor(boost=5).tell(honest, Attacker(1, 1, 4, 0))
    assert sent.delta.vector.tolist() == [5.0, -10.0]
    assert sent.sections[BUFFERS].vector.tolist() == [3.0]
    assert honest.delta.vector.tolist() == [1.0, -2.0]
    flipped = LabelFlip().tell(honest, Attacker(1, 1, 4, 0))
    assert flipped.delta.vector.tolist() == [1.0, -2.0]


def test_success_is_the_share_of_other_classes_that_the_trigger_turns_into_the_target():
    goal = Backdoor(target=4).goal(TASK)
    others = TASK.test().targets != 4
    assert goal.name == "backdoor_success"
    assert len(goal.examples) == others.sum()
    assert (goal.examples.inputs[:, :, -3:, -3:] == BRIGHTEST).all()
    assert (goal.examples.targets == 4).all()
    model = Says(4)
    assert goal.reached(model, "cpu", 64) == 1.0
    assert model.training
    assert goal.reached(Says(5), "cpu", 64) == 0.0


def test_label_flips_are_measured_where_there_is_a_pair():
    assert LabelFlip().goal(TASK) is None
    goal = LabelFlip(source=3, target=8).goal(TASK)
    chosen = TASK.test().targets == 3
    assert goal.name == "label_flip_success"
    assert torch.equal(goal.examples.inputs, TASK.test().inputs[chosen])
    assert goal.reached(Says(8), "cpu", 7) == 1.0


@pytest.mark.parametrize(
    ("attack", "task", "reason"),
    [
        (LabelFlip(), Measured(), "no class labels"),
        (Backdoor(), Measured(), "no class labels"),
        (LabelFlip(source=1, target=10), TASK, "target=10: the classes of Digits are 0 to 9"),
        (LabelFlip(source=12, target=1), TASK, "source=12"),
        (LabelFlip(source=1, target=2), Rows(), "no test example is of class source=1"),
        (Backdoor(target=10), TASK, "target=10"),
        (Backdoor(size=9), TASK, "the images of Digits are 8 × 8, choose less"),
        (Backdoor(), Rows(), "choose task=mnist, or attack=label_flip"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_mend(attack, task, reason):
    with pytest.raises(ValueError, match=reason):
        attack.check(task)


def test_a_backdoor_to_the_only_class_is_refused():
    class Same(Digits):
        def test(self):
            return super().test().take(torch.nonzero(super().test().targets == 4).flatten())

    with pytest.raises(ValueError, match="every test example is of class target=4"):
        Backdoor(target=4).check(Same())


def test_half_a_pair_and_a_pair_of_one_class_are_refused():
    for settings in ({"source": 1}, {"target": 1}):
        with pytest.raises(ValueError, match="go together"):
            LabelFlip(**settings)
    with pytest.raises(ValueError, match="both 2"):
        LabelFlip(source=2, target=2)


def test_an_attack_that_does_not_say_what_it_trains_on_is_told_so():
    attack = DataPoisoning()
    assert attack.goal(TASK) is None
    with pytest.raises(TypeError, match="DataPoisoning"):
        attack.corrupt(TASK.train(), TASK, rng())
