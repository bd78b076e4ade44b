"""Adapters of BERT, GPT-2 and LLaMA: nothing else travels, and each example's gradient is what a loop gives."""

from pathlib import Path

import pytest
import torch

from clients.lora import LoraClassifier
from clients.lora import model as lora
from clients.resident import ResidentModel, arrays_of
from clients.tasks import Examples
from clients.trainers import DpSgd, FitJob
from clients.trainers.per_example import clipping
from clients.trainers.per_example_trial import require_per_example
from strategies.update import DELTA
from tests.clients.test_dp_sgd_gradients import CLASSES, Shaped, close, looped
from tests.support.bert import WORDS, save_tiny_bert

VOCABULARY, LENGTH = 5 + len(WORDS), 10
TASK = Shaped(LENGTH, vocab_size=VOCABULARY)
FAMILIES = ("bert", "gpt2", "llama")
EACH = pytest.mark.parametrize("family", FAMILIES)
WAYS = pytest.mark.parametrize("ghost", [False, True], ids=["hooks", "ghost"])


def _config(family: str):
    import transformers

    if family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16,
            bos_token_id=2, eos_token_id=3,
        )  # fmt: skip
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, max_position_embeddings=16,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A tiny model of random weights for each family, all with the same tokenizer."""
    import transformers

    found = {}
    for family in FAMILIES:
        folder = found[family] = save_tiny_bert(tmp_path_factory.mktemp(family))
        if family != "bert":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                transformers.AutoModel.from_config(_config(family)).save_pretrained(folder)
    return found


def made(folder: Path, *, trained: bool = True, **settings) -> ResidentModel:
    """A resident model, whose adapters are past their first step where `trained`."""
    torch.manual_seed(4)
    module = LoraClassifier((LENGTH,), CLASSES, VOCABULARY, 0, pretrained=str(folder), **settings)
    if trained:
        with torch.no_grad():
            for adapter in module.adapters.values():
                adapter["B"].weight.normal_(std=0.5)
    arrays = arrays_of(module)
    model = ResidentModel(module, arrays)
    model.load(arrays)
    module.train()
    return model


@WAYS
@EACH
def test_the_sum_is_that_of_a_loop_over_clipped_examples(folders, family, ghost):
    model, examples = made(folders[family]), TASK.train()
    gradients = looped(model, TASK, examples)
    parts = gradients.split([p.numel() for p in model.travelling], dim=1)
    assert all(part.any() for part in parts)  # every adapter has a gradient
    norms = gradients.norm(dim=1)
    norm = float(norms.median())
    expected = (norm / norms.clamp(min=norm)) @ gradients
    with clipping(model, TASK, norm=norm, ghost=ghost, most=4) as clipped_sum:
        found = clipped_sum(examples.inputs, examples.targets)
    assert close(found, expected, 1e-4)


@EACH
def test_ghost_clipping_gives_what_hooks_give(folders, family):
    model, examples = made(folders[family]), TASK.train()
    sums = []
    for ghost in (False, True):
        with clipping(model, TASK, norm=0.05, ghost=ghost, most=64) as clipped_sum:
            sums.append(clipped_sum(examples.inputs, examples.targets))
    assert close(*sums, 1e-5)


@EACH
def test_only_adapters_and_head_travel_and_the_base_is_not_touched(folders, family):
    model = made(folders[family])
    names = set(model.module.state_dict())
    assert all(name.startswith(("adapters.", "head.")) for name in names)
    assert all(p.requires_grad for p in model.module.parameters())
    layers = 1 if family == "bert" else 2
    targets = {"bert": ("query", "value"), "gpt2": ("c_attn",), "llama": ("q_proj", "v_proj")}
    expected = len(targets[family]) * layers
    assert len(model.module.adapters) == expected
    assert all(name.endswith(targets[family]) for name in model.module.adapters)
    base = lora._frozen(str(folders[family]), "float32")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    ours = DpSgd(noise_multiplier=1.0, batch_size=4, lr=1.0, reproducible_noise=True)
    asked = FitJob(0, arrays_of(model.module), {}, TASK.train(), 1, {}, {})
    fit = ours.fit_one(asked, model, TASK)
    changed = fit.sections[DELTA].layout.views(fit.sections[DELTA].vector)
    assert all(view.any() for view in changed.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert not any(tensor.requires_grad for tensor in base.parameters())
    assert not any("lora" in name for name, _ in base.named_modules())


@EACH
def test_an_untrained_adapter_changes_nothing(folders, family):
    model, rows = made(folders[family], trained=False), TASK.train().inputs
    lengths = (rows != 0).sum(dim=1).clamp(min=1)
    base = lora._frozen(str(folders[family]), "float32")
    for row, length in zip(rows, lengths, strict=True):
        with torch.no_grad():
            states = base(input_ids=row[:length].unsqueeze(0)).last_hidden_state
            expected = model.module.head(states.mean(dim=1))
            torch.testing.assert_close(model.module(row.unsqueeze(0)), expected)


@EACH
def test_padding_and_the_others_of_a_batch_change_nothing(folders, family):
    model, rows = made(folders[family]), TASK.train().inputs
    together = model.module(rows)
    longer = torch.nn.functional.pad(rows, (0, 4))
    for i in range(len(rows)):
        torch.testing.assert_close(model.module(longer[i : i + 1]), together[i : i + 1])


@EACH
def test_models_of_one_process_share_the_base_and_not_the_adapters(folders, family):
    first, second = made(folders[family]), made(folders[family])
    ours = dict(first.module._encoder.named_parameters())
    theirs = dict(second.module._encoder.named_parameters())
    shared = {name for name in ours if ours[name] is theirs[name]}
    assert {name for name in ours if "lora_" not in name} == shared
    first.flat.zero_()
    assert second.flat.any()


@WAYS
def test_the_trial_lets_adapters_pass(folders, ghost):
    model = made(folders["bert"], trained=False)
    require_per_example(model, TASK, TASK.train(), ghost=ghost)
    empty = Examples(TASK.train().inputs[:0], TASK.train().targets[:0])
    with clipping(model, TASK, norm=1.0, ghost=ghost, most=4) as clipped_sum:
        assert not clipped_sum(empty.inputs, empty.targets).any()


def test_rank_and_targets_are_settings(folders):
    model = made(folders["bert"], rank=3, targets=["dense"])
    assert {a["A"].out_features for a in model.module.adapters.values()} == {3}
    assert all(name.endswith("dense") for name in model.module.adapters)
    with pytest.raises(ValueError, match="nowhere"):
        made(folders["bert"], targets=["nowhere"])


@pytest.mark.parametrize(
    ("shape", "vocab_size", "message"),
    [
        ((1, 8, 8), None, "takes rows of tokens"),
        ((LENGTH,), VOCABULARY + 1, "set task.tokenizer="),
        ((17,), VOCABULARY, "takes at most 16: set task.max_length=16"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(folders, shape, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        LoraClassifier(shape, 3, vocab_size, pretrained=str(folders["bert"]))


def test_it_goes_where_the_model_goes(folders):
    module = LoraClassifier((LENGTH,), 3, VOCABULARY, pretrained=str(folders["bert"]))
    assert module.to(torch.float64)(TASK.train().inputs).dtype == torch.float64
    module.to(torch.float32)
