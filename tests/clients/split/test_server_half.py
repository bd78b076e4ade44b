"""The server's half trains on what honest clients send, and a turn that is refused leaves nothing in it."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.split import SplitTrainer
from clients.split.server import UpperServer
from clients.split.turns import Batch, read_rows, write_batches, write_rows
from strategies.wire import Refused
from tests.support.examples import many
from tests.support.split import LONGEST, Sentences, SplitRun, save_tiny

TRAINER = SplitTrainer(batch_size=7, lr=0.01)
HIDDEN, CLASSES = 16, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


class Half:
    """The server's half of a run, and turns for it."""

    def __init__(self, path, folder, *, task=None, precision="fp32", trainer=TRAINER, **model):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)  # heads are drawn
            self.run = SplitRun(path, folder, task or Sentences(), trainer, model=model)
        self.server = UpperServer(
            self.run.build(half="upper"),
            self.run.whole.clients_names(),
            self.run.task,
            trainer,
            precision,
            most_batches=4,
        )
        self.precision = precision
        self.learner = self.server.begin(self.run.arrays)

    def batches(self, *seeds: int) -> list[Batch]:
        made = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            lengths = torch.randint(1, LONGEST + 1, (5,), generator=generator)
            activation = torch.randn(5, int(lengths.max()), HIDDEN, generator=generator)
            kept = torch.arange(activation.shape[1]) < lengths.unsqueeze(1)
            targets = torch.randint(0, CLASSES, (5,), generator=generator)
            made.append(Batch(activation * kept.unsqueeze(2), lengths, targets))
        return made

    def turn(self, *seeds: int) -> dict[str, np.ndarray]:
        return dict(write_batches(self.batches(*seeds), self.precision))

    def change(self, client: int = 0) -> np.ndarray:
        return self.learner.change(client)[0]


@pytest.fixture
def half(tmp_path, folder):
    return Half(tmp_path, folder)


def rebuilt(half: Half, batches: list[Batch]) -> tuple[list[torch.Tensor], dict, list[float]]:
    """By torch's own optimiser: gradients of activations, changes of arrays, losses."""
    model = half.run.build()
    before = {name: torch.from_numpy(array.copy()) for name, array in half.run.arrays.items()}
    model.load_state_dict(before)
    own = {n: p for n, p in model.named_parameters() if n not in model.clients_names()}
    optimizer = torch.optim.AdamW(own.values(), lr=half.server.trainer.lr, weight_decay=0.0)
    gradients, losses = [], []
    for batch in batches:
        activation = batch.activation.clone().requires_grad_()
        loss = half.run.task.loss(model.upper(activation, batch.lengths), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gradients.append(activation.grad)
        losses.append(loss.item())
    return gradients, {n: (p.detach() - before[n]).numpy() for n, p in own.items()}, losses


class TestTraining:
    def test_steps_are_those_of_torchs_optimiser_one_batch_after_the_other(self, half):
        batches = half.batches(1, 2, 3)
        expected, changes, losses = rebuilt(half, batches)
        answer = half.learner.answer(0, half.turn(1, 2, 3))
        came = read_rows("gradient", answer, [b.lengths for b in batches], "fp32", HIDDEN)
        for found, wanted in zip(came, expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)
        vector, layout, figures = half.learner.change(0)
        for name, change in layout.views(vector).items():
            np.testing.assert_allclose(change, changes[name], atol=1e-6)
        assert set(layout.names) == set(changes)
        assert figures["train_loss"] == pytest.approx(np.mean(losses), abs=1e-6)
        assert figures["gradient_error"] == 0

    @pytest.mark.parametrize(
        ("precision", "most"), [("fp16", 2**-11), ("bf16", 2**-8), ("int8", 0.02)]
    )
    def test_the_error_that_is_told_is_that_of_the_gradients_that_went_down(
        self, tmp_path, folder, precision, most
    ):
        half = Half(tmp_path, folder, precision=precision)
        exact = Half(tmp_path, folder)
        batches = half.batches(1)
        turn = half.turn(1)
        # What came is what was rounded; the exact server gets the same numbers.
        rows = read_rows(
            "activation", {k: v for k, v in turn.items() if "activation" in k},
            [batches[0].lengths], precision, HIDDEN,
        )  # fmt: skip
        same = write_batches([replace(batches[0], activation=rows[0])], "fp32")
        true = read_rows(
            "gradient", exact.learner.answer(0, same), [batches[0].lengths], "fp32", HIDDEN
        )[0]
        sent = read_rows(
            "gradient", half.learner.answer(0, turn), [batches[0].lengths], precision, HIDDEN
        )[0]
        error = ((sent - true).norm() / true.norm()).item()
        assert half.learner.change(0)[2]["gradient_error"] == pytest.approx(error, rel=1e-4)
        assert 0 < error < most

    def test_u_shaped_states_go_down_and_their_gradients_make_the_step(self, tmp_path, folder):
        half = Half(tmp_path, folder, u_shaped=True)
        (batch,) = half.batches(1)
        up = write_batches([replace(batch, targets=None)], "fp32")
        (states,) = read_rows("states", half.learner.answer(0, up), [batch.lengths], "fp32", HIDDEN)
        model = half.run.build()
        model.load_state_dict({n: torch.from_numpy(a.copy()) for n, a in half.run.arrays.items()})
        activation = batch.activation.clone().requires_grad_()
        expected = model.upper(activation, batch.lengths)
        kept = torch.arange(states.shape[1]) < batch.lengths.unsqueeze(1)
        torch.testing.assert_close(states[kept], expected[kept].detach(), atol=1e-6, rtol=1e-5)
        assert not half.change().any()
        given_ = torch.randn(states.shape) * kept.unsqueeze(2)
        down = half.learner.answer(0, write_rows("gradient", [given_], [batch.lengths], "fp32"))
        expected.backward(given_)
        (back,) = read_rows("gradient", down, [batch.lengths], "fp32", HIDDEN)
        torch.testing.assert_close(back[kept], activation.grad[kept], atol=1e-5, rtol=1e-4)
        assert half.change().any()

    def test_of_goals_a_client_holds_its_own_heads_only(self, tmp_path, folder):
        task = Sentences(goals={"a": 3, "b": 2})
        half = Half(tmp_path, folder, task=task, u_shaped=True)
        names = {client: half.server.clients_names(client) for client in (0, 1)}
        assert names[0] ^ names[1] == {
            f"heads.{goal}.{part}" for goal in "ab" for part in ("weight", "bias")
        }
        assert {n for n in names[1] if n.startswith("heads.")} == {"heads.b.weight", "heads.b.bias"}


def refused(half: Half, turn: dict) -> str:
    before = half.change()
    with pytest.raises(Refused) as caught:
        half.learner.answer(0, turn)
    np.testing.assert_array_equal(half.change(), before)
    return caught.value.reason


def changed(turn: dict, **arrays) -> dict:
    return {**turn, **{name.replace("__", "."): array for name, array in arrays.items()}}


LENGTHS = np.array([2, 3], np.int32)
ROWS = np.ones((5, HIDDEN), np.float32)
GOOD = {
    "0.activation.values": ROWS,
    "0.lengths": LENGTHS,
    "0.targets": np.array([0, 1]),
}


def poisoned(value: float) -> np.ndarray:
    rows = ROWS.copy()
    rows[1, 3] = value
    return rows


HOSTILE = {
    "nothing": ({}, "missing"),
    "no lengths": ({k: v for k, v in GOOD.items() if k != "0.lengths"}, "malformed"),
    "no targets": ({k: v for k, v in GOOD.items() if k != "0.targets"}, "missing"),
    "no activation": ({k: v for k, v in GOOD.items() if "values" not in k}, "missing"),
    "unknown array": (changed(GOOD, **{"0__weights": ROWS}), "malformed"),
    "no number": (changed(GOOD, weights=ROWS), "malformed"),
    "a number in another script": ({**GOOD, "²٣.lengths": LENGTHS}, "malformed"),
    "a number too long": ({**GOOD, "9" * 5000 + ".lengths": LENGTHS}, "malformed"),
    "a gap": ({name.replace("0.", "1.", 1): a for name, a in GOOD.items()}, "missing"),
    "too many batches": (
        {f"{n}{name[1:]}": a for n in range(5) for name, a in GOOD.items()},
        "too_large",
    ),
    "length 0": (changed(GOOD, **{"0__lengths": np.array([0, 5], np.int32)}), "shape"),
    "negative length": (changed(GOOD, **{"0__lengths": np.array([-2, 7], np.int32)}), "shape"),
    "too long": (changed(GOOD, **{"0__lengths": np.array([2, 13], np.int32)}), "shape"),
    "other lengths": (changed(GOOD, **{"0__lengths": np.array([2, 4], np.int32)}), "shape"),
    "lengths of int64": (changed(GOOD, **{"0__lengths": LENGTHS.astype(np.int64)}), "malformed"),
    "no texts": (changed(GOOD, **{"0__lengths": LENGTHS[:0]}), "malformed"),
    "lengths of two axes": (changed(GOOD, **{"0__lengths": LENGTHS[None]}), "malformed"),
    "more places than an honest batch has": (
        changed(GOOD, **{"0__lengths": np.array([12] + [1] * 7, np.int32)}),
        "too_large",
    ),
    "float64": (changed(GOOD, **{"0__activation__values": ROWS.astype(float)}), "dtype"),
    "narrow": (changed(GOOD, **{"0__activation__values": ROWS[:, :-1]}), "shape"),
    "flat": (changed(GOOD, **{"0__activation__values": ROWS.ravel()}), "shape"),
    "NaN": (changed(GOOD, **{"0__activation__values": poisoned(np.nan)}), "not_finite"),
    "infinite": (changed(GOOD, **{"0__activation__values": poisoned(-np.inf)}), "not_finite"),
    "steps of another precision": (
        changed(GOOD, **{"0__activation__steps": ROWS[:, 0]}),
        "missing",
    ),
    "past the classes": (changed(GOOD, **{"0__targets": np.array([0, CLASSES])}), "malformed"),
    "negative target": (changed(GOOD, **{"0__targets": np.array([-1, 0])}), "malformed"),
    "targets of int32": (changed(GOOD, **{"0__targets": np.array([0, 1], np.int32)}), "dtype"),
    "one target": (changed(GOOD, **{"0__targets": np.array([0])}), "dtype"),
    "targets of two axes": (changed(GOOD, **{"0__targets": np.zeros((2, 2), np.int64)}), "malformed"),
}  # fmt: skip


class TestHostileTurns:
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_each_is_refused_by_its_reason_and_leaves_nothing(self, half, kind):
        turn, reason = HOSTILE[kind]
        assert refused(half, dict(turn)) == reason

    def test_the_good_one_is_taken(self, half):
        half.learner.answer(0, dict(GOOD))
        assert half.change().any()

    @pytest.mark.parametrize("value", [1e19, 1e30, 3e38])
    @pytest.mark.parametrize("kind", ["bert", "llama"])
    def test_huge_activations_leave_the_half_finite(self, tmp_path, tmp_path_factory, kind, value):
        half = Half(tmp_path, save_tiny(tmp_path_factory.mktemp("huge"), kind))
        for rows in (value * ROWS, poisoned(value)):
            with contextlib.suppress(Refused):
                half.learner.answer(0, changed(GOOD, **{"0__activation__values": rows}))
        assert np.isfinite(half.change()).all()
        half.learner.answer(1, dict(GOOD))
        assert np.isfinite(half.change()).all()

    def test_a_refused_turn_leaves_not_even_the_steps_of_its_good_batches(self, half):
        """In v2 the same parameters and moments are the other clients' too."""
        other = Half(half.run.folder, half.run.pretrained)
        bad = half.turn(1, 2)
        bad["1.targets"] = np.full(5, CLASSES)
        assert refused(half, bad) == "malformed"
        for one in (half, other):
            one.learner.answer(1, one.turn(3))
        np.testing.assert_array_equal(half.change(), other.change())

    def test_a_gradient_that_overflows_leaves_moments_sound(self, tmp_path, folder):
        """U-shaped, the client's gradient of states is scaled at will: squares of 1e30 are infinite moments."""
        half = Half(tmp_path, folder, u_shaped=True)
        (batch,) = half.batches(1)
        up = write_batches([replace(batch, targets=None)], "fp32")
        half.learner.answer(0, up)
        huge = torch.full(batch.activation.shape, 1e30)
        assert (
            refused(half, write_rows("gradient", [huge], [batch.lengths], "fp32")) == "not_finite"
        )
        half.learner.answer(1, up)
        half.learner.answer(1, write_rows("gradient", [batch.activation], [batch.lengths], "fp32"))
        assert half.change().any()
        assert np.isfinite(half.change()).all()

    @pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
    def test_steps_of_int8_are_finite_and_not_negative(self, tmp_path, folder, value):
        half = Half(tmp_path, folder, precision="int8")
        turn = half.turn(1)
        turn["0.activation.steps"] = np.full_like(turn["0.activation.steps"], value)
        assert refused(half, turn) == "not_finite"

    @pytest.mark.parametrize("shape", [(4, HIDDEN), (5, HIDDEN + 1), (5,)])
    def test_u_shaped_gradients_of_another_shape_are_refused(self, tmp_path, folder, shape):
        half = Half(tmp_path, folder, u_shaped=True)
        half.learner.answer(0, {k: v for k, v in GOOD.items() if "targets" not in k})
        assert refused(half, {"0.gradient.values": np.ones(shape, np.float32)}) == "shape"

    def test_labels_of_another_clients_goal_are_refused(self, tmp_path, folder):
        half = Half(tmp_path, folder, task=Sentences(goals={"a": 3, "b": 2}))
        own = changed(GOOD, **{"0__targets": np.array([[0, -100], [1, -100]])})
        assert (
            refused(half, changed(own, **{"0__targets": np.array([[0, 1], [1, -100]])})) == "range"
        )
        assert refused(half, changed(own, **{"0__targets": np.array([0, 1])})) == "shape"
        half.learner.answer(0, own)
        _, layout, _ = half.learner.change(0)
        heads = {name for name in layout.names if name.startswith("heads.")}
        assert heads == {"heads.a.weight", "heads.a.bias"}

    @settings(max_examples=many(150), suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_whatever_comes_is_trained_on_or_refused(self, half, data):
        turn = half.turn(1, 2)
        for _ in range(data.draw(st.integers(1, 3))):
            if not turn:
                break
            name = data.draw(st.sampled_from(sorted(turn)))
            mutate(data, turn, name)
        client = data.draw(st.integers(0, 2))
        with contextlib.suppress(Refused):
            half.learner.answer(client, turn)
        assert np.isfinite(half.change()).all()


def mutate(data, turn: dict, name: str) -> None:
    array = turn[name]
    match data.draw(st.sampled_from(["drop", "rename", "dtype", "shape", "element", "order"])):
        case "drop":
            del turn[name]
        case "rename":
            turn[data.draw(st.text(max_size=12))] = turn.pop(name)
        case "dtype":
            turn[name] = array.astype(data.draw(st.sampled_from(["f4", "f8", "i8", "i4", "b1"])))
        case "shape":
            turn[name] = np.resize(array, data.draw(st.lists(st.integers(0, 9), max_size=3)))
        case "element" if array.size:
            array = array.copy()
            wild = st.sampled_from([0, -1, -100, 12, 13, 2**31 - 1, -(2**31)])
            if array.dtype.kind == "f":
                wild = st.floats(width=32)
            array.reshape(-1)[data.draw(st.integers(0, array.size - 1))] = data.draw(wild)
            turn[name] = array
        case "order":
            turn[name] = np.asfortranarray(array)
