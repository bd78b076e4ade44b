"""Importance of layers: |gradient · weight| by hand, what round 1 says, and that no scale or coverage bends it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from clients.lora.importance import Importance
from strategies.update import Layout, Section

NAMES = tuple(f"adapters.{layer}.{kind}.weight" for layer in ("low", "high") for kind in "AB")
SHAPES = ((4, 6), (5, 4), (4, 6), (5, 4))
LAYOUT = Layout((*NAMES, "head.weight"), (*SHAPES, (2, 5)))


def drawn(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        name: generator.normal(size=shape).astype(np.float32)
        for name, shape in zip(LAYOUT.names, LAYOUT.shapes, strict=True)
    }


def by_hand(weights, changes) -> dict[str, float]:
    sums = {
        layer: sum(
            np.abs(weights[name] * changes[name]).sum() / 4
            for name in NAMES
            if f".{layer}." in name
        )
        for layer in ("low", "high")
    }
    mean = sum(sums.values()) / 2
    return {layer: value / mean for layer, value in sums.items()}


def test_it_is_the_sum_of_gradient_times_weight_over_both_factors():
    weights, gradients = drawn(1), drawn(2)
    importance = Importance()
    importance.observe(weights, gradients)
    assert importance.means == pytest.approx(by_hand(weights, gradients))


def test_the_mean_runs_without_bias():
    """Of constant observations it is that constant from the first on; of two, they weigh β and 1."""
    first, second = by_hand(drawn(1), drawn(2)), by_hand(drawn(1), drawn(3))
    importance = Importance(decay=0.5)
    importance.observe(drawn(1), drawn(2))
    importance.observe(drawn(1), drawn(2))
    assert importance.means == pytest.approx(first)
    importance = Importance(decay=0.5)
    importance.observe(drawn(1), drawn(2))
    importance.observe(drawn(1), drawn(3))
    expected = {layer: (0.5 * first[layer] + second[layer]) / 1.5 for layer in first}
    assert importance.means == pytest.approx(expected)


@given(scale=st.floats(1e-3, 1e3))
def test_learning_rates_change_nothing(scale):
    weights, gradients = drawn(1), drawn(2)
    importance = Importance()
    importance.observe(weights, {n: np.float32(scale) * g for n, g in gradients.items()})
    assert importance.means == pytest.approx(by_hand(weights, gradients), rel=1e-4)


class TestRoundOne:
    """B is zero at first."""

    def model(self):
        torch.manual_seed(0)
        module = torch.nn.Module()
        module.adapters = torch.nn.ModuleDict(
            {
                layer: torch.nn.ModuleDict(
                    {"A": torch.nn.Linear(6, 4, bias=False), "B": torch.nn.Linear(4, 5, bias=False)}
                )
                for layer in ("low", "high")
            }
        )
        for pair in module.adapters.values():
            torch.nn.init.zeros_(pair["B"].weight)
        return module

    def backward(self, module):
        inputs = torch.randn(7, 6)
        outputs = [pair["B"](pair["A"](inputs)) for pair in module.adapters.values()]
        # `high` matters ten times as much as `low`.
        F.mse_loss(outputs[0] + 10 * outputs[1], torch.randn(7, 5)).backward()

    def test_the_first_gradients_say_nothing_and_the_second_do(self):
        module, importance = self.model(), Importance()
        self.backward(module)
        importance.observe_gradients(module)
        assert importance.means == {}
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= 0.01 * parameter.grad
        self.backward(module)
        importance.observe_gradients(module)
        assert importance.means["high"] > importance.means["low"] > 0

    def test_the_first_change_that_a_server_sees_counts(self):
        sent, after = drawn(1), drawn(1)
        for name in NAMES:
            if ".B." in name:
                sent[name] = np.zeros_like(sent[name])
                after[name] *= 3 if "high" in name else 1
        vectors = LAYOUT.flatten(sent), LAYOUT.flatten(after)
        importance = Importance()
        importance.observe_change(Section(vectors[1] - vectors[0], LAYOUT), vectors[0])
        squares = {
            layer: float((after[f"adapters.{layer}.B.weight"] ** 2).sum())
            for layer in ("low", "high")
        }
        found = importance.means  # A has not changed, so it is B alone
        assert found["high"] / found["low"] == pytest.approx(squares["high"] / squares["low"], rel=1e-5)  # fmt: skip


def test_a_client_s_own_part_is_judged_for_one_unit_of_its_rank():
    """Half the rank of the same numbers is worth as much; a layer that it lacks stays as it was."""
    part = Layout(("adapters.low.A.weight", "adapters.low.B.weight"), ((2, 6), (5, 2)))
    delta = np.zeros(LAYOUT.size, np.float32)
    views = LAYOUT.views(delta)
    views[NAMES[0]][:2], views[NAMES[1]][:, :2] = 1, 1
    importance = Importance()
    importance.observe(drawn(1), drawn(2))
    before = importance.means
    importance.observe_change(Section(delta, LAYOUT, part=part), np.ones(LAYOUT.size, np.float32))
    assert importance.means["high"] == before["high"]
    assert importance.means["low"] == pytest.approx((0.85 * before["low"] + 1) / 1.85)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_what_says_nothing_is_left_out(value):
    importance = Importance()
    importance.observe(drawn(1), drawn(2))
    before = importance.means
    importance.observe(drawn(1), {n: np.full_like(a, value) for n, a in drawn(2).items()})
    importance.observe(drawn(1), {})
    assert importance.means == before


def test_it_lasts_through_a_checkpoint():
    first, second = Importance(), Importance()
    first.observe(drawn(1), drawn(2))
    second.load_state_dict(first.state_dict())
    for importance in (first, second):
        importance.observe(drawn(1), drawn(3))
    assert first.means == second.means


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"sums": {"a": 1.0}, "weights": {}},
        {"sums": {"a": 1.0}, "weights": {"a": 0.0}},
        {"sums": {"a": -1.0}, "weights": {"a": 0.5}},
        {"sums": {"a": float("nan")}, "weights": {"a": 0.5}},
    ],
)
def test_a_state_that_is_none_is_refused(state):
    with pytest.raises(ValueError, match=r"sums|importance"):
        Importance().load_state_dict(state)
