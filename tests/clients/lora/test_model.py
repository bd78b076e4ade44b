"""The classifier: what travels, goals, a shared A, a residual that goes down and is not trained, half precision."""

import numpy as np
import pytest
import torch

from clients.lora import LoraClassifier
from clients.resident import ResidentModel, arrays_of
from clients.tasks import Examples
from clients.trainers import SGD, DpSgd, FitJob
from strategies.update import DELTA
from tests.clients.test_dp_sgd_gradients import Shaped
from tests.support.bert import WORDS, save_tiny_bert

VOCABULARY, LENGTH, CLASSES = 5 + len(WORDS), 10, 5
TASK = Shaped(LENGTH, vocab_size=VOCABULARY)
QUERY = "encoder_layer_0_attention_self_query"
VALUE = "encoder_layer_0_attention_self_value"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_tiny_bert(tmp_path_factory.mktemp("bert")))


def made(folder, *, classes=CLASSES, goals=None, **settings) -> LoraClassifier:
    torch.manual_seed(4)
    return LoraClassifier(
        (LENGTH,), classes, VOCABULARY, 0, goals, pretrained=folder, **{"rank": 4, **settings}
    )


def filled(model: LoraClassifier) -> LoraClassifier:
    with torch.no_grad():
        for parameter in (*model.adapters.parameters(), *model.residual.parameters()):
            parameter.normal_(std=0.3)
    return model


def fit(model: LoraClassifier, trainer, examples: Examples):
    arrays = arrays_of(model)
    job = FitJob(0, arrays, {}, examples, 1, {}, {})
    resident = ResidentModel(model, arrays)
    result = trainer.fit_one(job, resident, TASK)
    return result.sections[DELTA].layout.views(result.sections[DELTA].vector)


class TestGoals:
    def test_logits_stand_side_by_side_in_the_goals_order(self, folder):
        model = made(folder, goals={"kind": 2, "author": 3})
        names = {n for n in model.state_dict() if not n.startswith("adapters.")}
        assert names == {f"heads.{g}.{p}" for g in ("kind", "author") for p in ("weight", "bias")}
        rows = TASK.train().inputs
        logits = model(rows)
        assert logits.shape == (len(rows), 5)
        with torch.no_grad():
            model.heads["author"].weight.zero_()
            model.heads["author"].bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
        assert torch.equal(model(rows)[:, :2], logits[:, :2])
        assert torch.equal(model(rows)[0, 2:], torch.tensor([1.0, 2.0, 3.0]))

    def test_a_goal_that_nobody_asks_for_has_no_gradient(self, folder):
        model = made(folder, goals={"kind": 2, "author": 3})
        model(TASK.train().inputs)[:, 2:].sum().backward()
        assert model.heads["author"].weight.grad.any()
        assert not model.heads["kind"].weight.grad.any()

    @pytest.mark.parametrize("goals", [None, {}, {"kind": CLASSES}])
    def test_one_goal_or_none_is_the_head_as_ever(self, folder, goals):
        ours, plain = made(folder, goals=goals), made(folder)
        assert set(ours.state_dict()) == set(plain.state_dict())
        assert all(torch.equal(a, plain.state_dict()[n]) for n, a in ours.state_dict().items())

    def test_goals_that_are_not_the_task_s_classes_are_refused(self, folder):
        with pytest.raises(ValueError, match="the task has 5 classes, and its goals"):
            made(folder, goals={"kind": 2, "author": 2})


class TestShareA:
    def test_a_does_not_travel_and_is_the_same_whatever_the_seed(self, folder):
        model = made(folder, share_a=True)
        assert set(model.state_dict()) == {
            f"adapters.{QUERY}.B.weight", f"adapters.{VALUE}.B.weight", "head.weight", "head.bias",
        }  # fmt: skip
        assert (model.factors, made(folder).factors) == ("shared_a", "both")
        filled(model)
        torch.manual_seed(99)
        other = LoraClassifier(
            (LENGTH,), CLASSES, VOCABULARY, pretrained=folder, rank=4, share_a=True
        )
        other.load_state_dict(model.state_dict())
        rows = TASK.train().inputs
        assert torch.equal(other(rows), model(rows))

    def test_mean_of_b_is_mean_of_products(self, folder):
        """What the shared A is for: models that are linear in B average exactly."""
        model = made(folder, share_a=True)
        a = model._encoder.encoder.layer[0].attention.self.query.lora_A["default"].weight
        torch.manual_seed(0)
        bs = torch.randn(3, 16, 4)
        torch.testing.assert_close((bs @ a).mean(0), bs.mean(0) @ a)

    def test_b_is_trained(self, folder):
        changed = fit(made(folder, share_a=True), SGD(lr=0.1), TASK.train())
        assert all(view.any() for view in changed.values())


class TestResidual:
    NAMES = tuple(f"residual.{layer}.{side}" for layer in (QUERY, VALUE) for side in ("left", "right"))  # fmt: skip

    def test_it_travels_and_is_loaded(self, folder):
        server, client = filled(made(folder, residual_rank=2)), made(folder, residual_rank=2)
        arrays = arrays_of(server)
        assert set(self.NAMES) < set(arrays)
        assert arrays[self.NAMES[0]].shape == (16, 2)
        assert arrays[self.NAMES[1]].shape == (2, 16)
        resident = ResidentModel(client, arrays)
        resident.load(arrays)
        rows = TASK.train().inputs
        assert torch.equal(client(rows), server(rows))
        with torch.no_grad():
            server.residual[QUERY]["left"].zero_()
        assert not torch.equal(client(rows), server(rows))

    @pytest.mark.parametrize(
        "trainer",
        [
            SGD(lr=0.1),
            SGD(lr=0.1, momentum=0.9, max_grad_norm=0.5),
            DpSgd(noise_multiplier=1.0, batch_size=4, lr=1.0, reproducible_noise=True),
            DpSgd(noise_multiplier=1.0, batch_size=4, lr=1.0, reproducible_noise=True, ghost=True),
        ],
        ids=["plain", "momentum", "dp", "ghost"],
    )
    def test_it_is_not_trained(self, folder, trainer):
        changed = fit(filled(made(folder, residual_rank=2)), trainer, TASK.train())
        for name, view in changed.items():
            assert view.any() != (name in self.NAMES)

    def test_it_is_there_where_a_layer_has_no_adapter(self, folder):
        model = made(folder, residual_rank=2, ranks={QUERY: 0, VALUE: 1})
        assert set(model.residual) == {QUERY, VALUE}
        assert set(model.adapters) == {VALUE}
        before = model(TASK.train().inputs)
        with torch.no_grad():
            for side in ("left", "right"):
                model.residual[QUERY][side].normal_()
        assert not torch.equal(model(TASK.train().inputs), before)


class TestRanks:
    def test_they_are_those_of_the_arrays(self, folder):
        shapes = {
            n: a.shape for n, a in arrays_of(made(folder, ranks={QUERY: 4, VALUE: 2})).items()
        }
        assert shapes[f"adapters.{QUERY}.A.weight"] == (4, 16)
        assert shapes[f"adapters.{VALUE}.A.weight"] == (2, 16)
        assert shapes[f"adapters.{VALUE}.B.weight"] == (16, 2)

    def test_a_client_starts_from_the_leading_block_of_the_server_s_model(self, folder):
        whole, ours = (arrays_of(made(folder, ranks=ranks)) for ranks in (None, {VALUE: 2}))
        for name, array in ours.items():
            assert np.array_equal(array, whole[name][tuple(map(slice, array.shape))])

    def test_a_layer_that_the_model_does_not_have_is_refused(self, folder):
        with pytest.raises(ValueError, match=r"ranks of \['elsewhere'\]: there are encoder_layer"):
            made(folder, ranks={"elsewhere": 2})


def test_over_a_bfloat16_base_all_that_travels_is_float32_and_it_learns(folder):
    model = made(folder, base_dtype="bfloat16", residual_rank=1)
    assert {p.dtype for p in model._encoder.embeddings.parameters()} == {torch.bfloat16}
    assert {a.dtype for a in arrays_of(model).values()} == {np.dtype(np.float32)}
    assert model(TASK.train().inputs).dtype == torch.float32
    changed = fit(filled(model), SGD(lr=0.1), TASK.train())
    assert all(view.any() for name, view in changed.items() if not name.startswith("residual."))
    full = made(folder)
    assert {p.dtype for p in full._encoder.embeddings.parameters()} == {torch.float32}
