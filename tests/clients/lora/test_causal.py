"""The whole language model with adapters: exact, small to send, and it learns."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM

from clients.lora import causal
from clients.lora.causal import LoraCausalLM
from clients.places import DataError
from clients.resident import ResidentModel, arrays_of
from clients.tasks import Prose, evaluate
from clients.tasks.prose import perplexity
from clients.trainers import SGD, AdamW, FitJob
from clients.trainers.per_example import clipping
from strategies.update import DELTA
from tests.clients.test_dp_sgd_gradients import close, looped
from tests.support.notes import save_tiny_language_model, write_notes

LAYER = "transformer_h_{}_attn_c_attn"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_language_model(tmp_path_factory.mktemp("tiny"), tokens=40_000))


@pytest.fixture(scope="module")
def task(folder, tmp_path_factory):
    # The language that the model was trained on, of fewer things.
    notes = write_notes(tmp_path_factory.mktemp("others"), seed=5, nouns=("layers", "sums"))
    return Prose(folder=notes, tokenizer=folder, max_length=32)


@pytest.fixture(autouse=True)
def nothing_loaded():
    """Each test begins with weights of its own."""
    causal._frozen.cache_clear()


def made(folder, task, **settings):
    torch.manual_seed(4)
    return LoraCausalLM(
        task.input_shape,
        task.num_classes,
        task.vocab_size,
        task.padding_id,
        pretrained=folder,
        **{"rank": 4, **settings},
    )


def filled(model):
    with torch.no_grad():
        for parameter in (*model.adapters.parameters(), *model.residual.parameters()):
            parameter.normal_(std=0.3)
    return model


def test_untrained_it_is_the_pretrained_model(folder, task):
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = task.test().inputs[:5]
    with torch.no_grad():
        assert torch.equal(made(folder, task)(rows), whole(input_ids=rows).logits)


def test_trained_it_is_pefts_own(folder, task):
    model = filled(made(folder, task))
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=16, fan_in_fan_out=True), whole)
    state = whole.state_dict()
    for number in (0, 1):
        inner = f"transformer.h.{number}.attn.c_attn"
        for part in "AB":
            weight = model.adapters[LAYER.format(number)][part].weight
            state[f"{inner}.lora_{part}.default.weight"] = weight.detach()
    whole.load_state_dict(state)
    rows = task.test().inputs[:5]
    with torch.no_grad():
        torch.testing.assert_close(model(rows), whole(input_ids=rows).logits)


def test_only_adapters_are_trained_sent_and_saved(folder, task):
    names = {f"adapters.{LAYER.format(n)}.{p}.weight" for n in (0, 1) for p in "AB"}
    model = made(folder, task)
    assert set(model.state_dict()) == names
    assert list(model.buffers()) == []
    assert ResidentModel(model, arrays_of(model)).flat.numel() == 2 * 4 * (16 + 48)
    assert model.factors == "both"
    shared = made(folder, task, share_a=True, residual_rank=2)
    left = {f"residual.{LAYER.format(n)}.{p}" for n in (0, 1) for p in ("left", "right")}
    assert set(shared.state_dict()) == {name for name in names if ".B." in name} | left
    assert shared.factors == "shared_a"


def test_what_follows_changes_nothing_so_padding_needs_no_mask(folder, task):
    model = filled(made(folder, task)).eval()
    row = task.test().inputs[:1]
    with torch.no_grad():
        whole = model(row)
        for length in (1, 9, 31):
            padded = row.clone()
            padded[:, length:] = task.padding_id
            torch.testing.assert_close(model(padded)[:, :length], whole[:, :length])
            torch.testing.assert_close(model(row[:, :length]), whole[:, :length])


def test_it_adapts_and_the_base_stays_as_it_was(folder, task):
    model = made(folder, task)
    before = {name: weight.clone() for name, weight in model._model.state_dict().items()}
    first = evaluate(model, task, task.test())
    arrays = arrays_of(model)
    resident = ResidentModel(model, arrays)
    job = FitJob(0, arrays, {}, task.train(), 1, {}, {})
    trainer = AdamW(local_epochs=4, batch_size=4, lr=3e-2)
    fit = trainer.fit_one(job, resident, task)
    assert fit.metrics["train_loss"] < first["loss"]
    found = evaluate(resident.module, task, task.test())
    assert perplexity(found) < 0.95 * perplexity(first)
    after = model._model.state_dict()
    frozen = [name for name in before if "lora_" not in name]
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)


def test_a_residual_travels_and_is_not_trained(folder, task):
    model = filled(made(folder, task, residual_rank=2))
    arrays = arrays_of(model)
    resident = ResidentModel(model, arrays)
    job = FitJob(0, arrays, {}, task.train().take(range(8)), 1, {}, {})
    section = SGD(lr=0.1).fit_one(job, resident, task).sections[DELTA]
    moved = {name: view.any() for name, view in section.layout.views(section.vector).items()}
    assert not any(moved[name] for name in moved if name.startswith("residual."))
    assert all(moved[name] for name in moved if name.startswith("adapters."))


@pytest.mark.parametrize("ghost", [False, True], ids=["hooks", "ghost"])
def test_a_rows_gradient_under_dp_sgd_is_what_a_loop_gives(folder, task, ghost):
    model = filled(made(folder, task))
    arrays = arrays_of(model)
    resident = ResidentModel(model, arrays)
    resident.load(arrays)
    rows = task.train().take(range(6))
    gradients = looped(resident, task, rows)
    norms = gradients.norm(dim=1)
    norm = float(norms.median())
    expected = (norm / norms.clamp(min=norm)) @ gradients
    with clipping(resident, task, norm=norm, ghost=ghost, most=4) as clipped_sum:
        found = clipped_sum(rows.inputs, rows.targets)
    assert close(found, expected, 1e-4)


def test_half_precision_of_the_base_leaves_float32_logits_and_adapters(folder, task):
    model = made(folder, task, base_dtype="bfloat16")
    rows = task.test().inputs[:5]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        half = model(rows)
    causal._frozen.cache_clear()
    with torch.no_grad():
        full = made(folder, task)(rows)
    assert half.dtype == torch.float32
    # bfloat16 keeps 8 bits: a few parts in a hundred of logits that go through two blocks.
    assert (half - full).norm() < 0.03 * full.norm()


def test_models_of_a_process_share_the_pretrained_weights(folder, task):
    one, two = made(folder, task), made(folder, task)
    embedding = one._model.transformer.wte.weight
    assert embedding.data_ptr() == two._model.transformer.wte.weight.data_ptr()
    filled(one)
    rows = task.test().inputs[:2]
    with torch.no_grad():
        assert not torch.equal(one(rows), two(rows))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 28, 28), 10, None), "use task=prose"),
        (((32,), 6, 300), "use task=prose"),
        (((32,), 299, 299), "the task's tokens have 299 ids"),
        (((33,), 300, 300), "takes at most 32: set task.max_length=32"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(folder, task, arguments, message):
    assert task.vocab_size == 300
    with pytest.raises(ValueError, match=message):
        LoraCausalLM(*arguments, pretrained=folder)


def test_ranks_of_layers_that_are_not_there_are_refused(folder, task):
    with pytest.raises(ValueError, match=r"ranks of \['nowhere'\]"):
        made(folder, task, ranks={"nowhere": 2})
    model = made(folder, task, ranks={"transformer.h.0.attn.c_attn": 2})
    assert model.adapters[LAYER.format(0)]["A"].weight.shape == (2, 16)
    assert list(model.adapters) == [LAYER.format(0)]


def test_a_folder_that_is_not_there_says_what_to_do(task):
    with pytest.raises(DataError, match=r"there is no folder .*: `trellis make-base-model` makes"):
        made("./no/such/folder", task)
