"""Labels from gradients at the cut, senders from updates, and what a defence does to a gradient."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom
from split_helpers import encoder, needs_minilm, words

from clients.split import cut
from fl_app.audit.split.labels import by_clusters, by_direction, by_norm, rarest
from fl_app.audit.split.norms import compared
from fl_app.audit.split.senders import told_apart

ATTACKS = (by_norm, by_direction, by_clusters)


def logistic(n=400, rare=0.1, seed=0):
    """Gradients at the input of a logistic regression that has learnt its base rate: (p - y)·w, exactly."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < rare).astype(np.int64)
    p = np.clip(rare + 0.05 * rng.standard_normal(n), 0.01, 0.3)
    return (p - labels)[:, None] * rng.standard_normal(16), labels


@pytest.mark.parametrize("attack", ATTACKS)
def test_labels_of_a_logistic_regression_are_in_its_gradients(attack):
    found = attack(*logistic(), 0.95)
    assert found.value == 1
    assert found.interval[1] == 1
    assert 0.8 < found.interval[0] < 1
    assert found.baseline < 0.9


def test_no_label_is_in_gradients_that_know_none():
    """Of 40 draws an interval of 95% misses 0.5 more than 10 times once in 100,000."""
    most = int(binom.isf(1e-5, 40, 0.05))
    for attack in (by_norm, by_direction):
        missed = 0
        for seed in range(40):
            rng = np.random.default_rng(seed)
            labels = (rng.random(120) < 0.3).astype(np.int64)
            low, high = attack(rng.standard_normal((120, 8)), labels, 0.95).interval
            missed += not low <= 0.5 <= high
        assert missed <= most


def test_clusters_of_noise_are_right_as_often_as_the_same_naming_of_shuffled_labels():
    rng = np.random.default_rng(0)
    found = by_clusters(rng.standard_normal((300, 8)), rng.integers(0, 3, 300), 0.95)
    assert abs(found.value - found.baseline) < 0.08
    assert found.baseline > 1 / 3


def test_three_directions_are_three_classes_whatever_their_names():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    rows = np.eye(3)[(labels + 1) % 3] * rng.uniform(0.1, 9, (90, 1))
    assert by_clusters(rows, labels * 5, 0.95).value == 1


def test_gradients_that_are_all_alike_tell_nothing():
    labels = np.arange(40) % 2
    for attack in (by_norm, by_direction):
        assert attack(np.ones((40, 3)), labels, 0.95).value == 0.5
    found = by_clusters(np.ones((40, 3)), labels, 0.95)
    assert found.value == found.baseline == 0.5


def test_the_rarest_class():
    assert rarest(np.array([2, 2, 0, 1, 1, 0, 0])) == 1
    for attack in ATTACKS:
        with pytest.raises(ValueError, match="two or more can be told apart"):
            attack(np.ones((4, 2)), np.zeros(4, np.int64), 0.95)
        with pytest.raises(ValueError, match="finite"):
            attack(np.full((9, 2), np.nan), np.arange(9) % 2, 0.95)
    with pytest.raises(ValueError, match="none is left"):
        by_direction(np.ones((4, 2)), np.array([0, 0, 0, 1]), 0.95)


@needs_minilm
def test_a_real_model_s_gradients_at_the_cut_tell_labels():
    """MiniLM cut in the middle under a linear head, as a server's half would return them."""
    text = words(("matplotlib", "sklearn"), 20, 16)
    lower, upper = cut(encoder(), 3)
    torch.manual_seed(0)
    head = torch.nn.Linear(384, 2)
    labels = torch.arange(len(text.ids)) // 20
    activation = lower(input_ids=text.ids, attention_mask=text.mask).requires_grad_()
    states = upper(activation, attention_mask=text.mask).last_hidden_state
    loss = F.cross_entropy(head(states.mean(dim=1)), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, activation)
    rows = gradient.sum(dim=1).double().numpy()
    assert by_direction(rows, labels.numpy(), 0.95).value > 0.9
    found = by_clusters(rows, labels.numpy(), 0.95)
    assert found.value > 0.9 > found.baseline


class TestSenders:
    def test_senders_with_a_direction_of_their_own_are_told_apart(self):
        rng = np.random.default_rng(0)
        senders, rounds = np.tile(np.arange(6), 5), np.repeat(np.arange(5), 6)
        own = 5 * rng.standard_normal((6, 40))
        # What all have in common is far larger than what is their own.
        rows = own[senders] + rng.standard_normal((30, 40)) + 500 * rng.standard_normal(40)
        hits, trials = told_apart(rows, senders, rounds)
        assert hits.tolist() == trials.tolist() == [6] * 5

    def test_senders_without_one_are_guessed(self):
        """More than 25% of 600 guesses at 1 of 6 are right once in 10 million."""
        rng = np.random.default_rng(0)
        senders, rounds = np.tile(np.arange(6), 100), np.repeat(np.arange(100), 6)
        hits, trials = told_apart(rng.standard_normal((600, 40)), senders, rounds)
        assert trials.sum() == 600
        assert hits.sum() < binom.isf(1e-7, 600, 1 / 6)

    def test_no_update_is_held_against_its_own_round(self):
        """Updates that are the same within a sender's round and unlike in others: only a leak would find them."""
        rng = np.random.default_rng(1)
        senders, rounds = np.tile(np.arange(4).repeat(3), 40), np.repeat(np.arange(40), 12)
        rows = rng.standard_normal((160, 30)).repeat(3, axis=0)
        hits, _ = told_apart(rows, senders, rounds)
        assert hits.sum() < 0.4 * 480

    def test_a_sender_of_one_round_is_not_tried(self):
        rows = np.eye(5)
        hits, trials = told_apart(rows, [0, 1, 0, 1, 2], [0, 0, 1, 1, 1])
        assert trials.tolist() == [2, 2]
        assert hits.shape == (2,)

    def test_one_sender_or_round_can_t_be_told_apart(self):
        for senders, rounds in (([0, 0], [0, 1]), ([0, 1], [0, 0])):
            with pytest.raises(ValueError, match="two of each are needed"):
                told_apart(np.eye(2), senders, rounds)


def test_norms_and_cosines_of_batches():
    before = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    found = compared(before, np.array([[6.0, 8.0], [0.0, 2.0], [1.0, 0.0]]))
    assert found.to_dict() == {
        "before": [5.0, 1.0, 0.0], "after": [10.0, 2.0, 1.0], "cosine": [1.0, 0.0, 0.0],
    }  # fmt: skip
    with pytest.raises(ValueError, match="of the same batches"):
        compared(before, before[:2])
