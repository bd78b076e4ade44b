"""What a part promises beside exactness: what it shares, what it refuses, and what it does without the tokens."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from clients.lora.adapters import adapted
from clients.split import Bottom, Middle, Top, blocks_of, cut, load_bottom, load_top, seeded
from tests.support.families import BLOCKS, CASES, CONFIGS, LENGTHS, Case

ROOT = Path(__file__).parents[3]
BERT = Case("bert", hf.BertForSequenceClassification, "classes")
GPT2 = Case("gpt2", hf.GPT2ForSequenceClassification, "classes")
LLAMA = Case("llama", hf.LlamaForSequenceClassification, "classes")
GPT2_LM = Case("gpt2", hf.GPT2LMHeadModel, "words")
BASES = [case for case in CASES if case.kind == "base"]
NOT_KNOWN_TO_PEFT = {
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"],
    "phi3": ["qkv_proj"],
    "vit": ["q_proj", "v_proj"],
}


def run(bottom: Any, top: Any, inputs: dict[str, torch.Tensor], **labels: Any) -> Any:
    return top(bottom(**inputs), attention_mask=inputs.get("attention_mask"), **labels)


class TestSharing:
    def test_parts_have_the_model_s_own_tensors_mode_and_frozen_layers(self):
        model = BERT.build()
        model.bert.encoder.layer[1].requires_grad_(False)
        model.bert.encoder.layer[2].train()
        whole = dict(model.named_parameters())
        for part in cut(model, 1, 2):
            assert all(parameter is whole[name] for name, parameter in part.named_parameters())
            modules = dict(model.named_modules())
            held = {
                name: module for name, module in part.named_modules() if list(module.parameters())
            }
            assert all(module.training == modules[name].training for name, module in held.items())

    @pytest.mark.parametrize("case", [BERT, GPT2_LM, LLAMA], ids=str)
    def test_the_model_stays_as_it_was(self, case):
        model, inputs = case.build(), case.inputs()
        before = {name: vars(module).copy() for name, module in model.named_modules()}
        inside = {name: list(module._modules.items()) for name, module in model.named_modules()}
        config, expected = copy.deepcopy(model.config.to_dict()), model(**inputs).logits
        cut(model, 1, 2)
        run(*cut(model, 1), inputs)
        after = dict(model.named_modules())
        assert after.keys() == before.keys()
        for name, module in after.items():
            assert vars(module) == before[name]
            assert list(module._modules.items()) == inside[name]
        assert model.config.to_dict() == config
        assert torch.equal(model(**inputs).logits, expected)

    def test_a_step_of_the_parts_is_a_step_of_the_model(self):
        model, inputs = BERT.build(), BERT.inputs()
        bottom, top = cut(model, 1)
        optimizer = torch.optim.SGD([*bottom.parameters(), *top.parameters()], 0.1)
        run(bottom, top, inputs, **BERT.labels(inputs)).loss.backward()
        optimizer.step()
        assert torch.equal(run(bottom, top, inputs).logits, model(**inputs).logits)

    def test_a_copy_of_a_part_runs_by_itself(self):
        bottom, top = cut(LLAMA.build(), 2)
        inputs = LLAMA.inputs()
        expected = run(bottom, top, inputs).logits
        copies = copy.deepcopy(bottom), copy.deepcopy(top)
        with torch.no_grad():
            for parameter in (*bottom.parameters(), *top.parameters()):
                parameter.zero_()
        assert torch.equal(run(*copies, inputs).logits, expected)

    def test_checkpointing_stays_the_model_s(self):
        model, inputs = GPT2_LM.build().train(), GPT2_LM.inputs()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.activation_checkpointing_enable()
        bottom, top = cut(model, 1)
        assert model.is_activation_checkpointing
        assert not bottom.is_activation_checkpointing
        assert not top.is_activation_checkpointing
        labels = GPT2_LM.labels(inputs)
        run(bottom, top, inputs, **labels).loss.backward()
        found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        model(**inputs, **labels).loss.backward()
        assert all(torch.equal(p.grad, found[name]) for name, p in model.named_parameters())


class TestNames:
    @pytest.mark.parametrize("case", BASES, ids=str)
    def test_each_parameter_is_in_one_part_under_its_own_name(self, case):
        model = case.build()
        names = [name for name, _ in model.named_parameters()]
        for cuts in ((1,), (BLOCKS - 1,), (1, 2), (1, BLOCKS)):
            held = [name for part in cut(model, *cuts) for name, _ in part.named_parameters()]
            assert sorted(held) == sorted(names)

    def test_a_tied_matrix_is_in_both_halves_and_nothing_else_is(self):
        model = Case("bert", hf.BertForMaskedLM, "words").build()
        bottom, top = (dict(part.named_parameters()) for part in cut(model, 1))
        assert bottom.keys() & top.keys() == {"bert.embeddings.word_embeddings.weight"}

    @pytest.mark.parametrize("case", BASES, ids=str)
    def test_adapters_put_into_a_half_have_the_whole_model_s_names(self, case):
        targets = NOT_KNOWN_TO_PEFT.get(case.config)

        def names(model: Any) -> list[str]:
            found = adapted(model, rank=2, alpha=4.0, targets=targets).adapters
            return [name for name, _ in found.named_parameters()]

        below, above = (names(half) for half in cut(case.build(), 1))
        assert below
        assert below + above == names(case.build())

    def test_parts_say_what_they_hold(self):
        bottom, middle, tail = cut(BERT.build(), 1, 2)
        assert (type(bottom), type(middle)) != (type(tail), type(bottom))
        assert isinstance(bottom, Bottom)
        assert isinstance(middle, Middle)
        assert isinstance(tail, Top)
        assert [part.span for part in (bottom, middle, tail)] == [
            range(1),
            range(1, 2),
            range(2, 3),
        ]
        assert [part.count for part in (bottom, middle, tail)] == [BLOCKS] * 3
        for part in (bottom, middle, tail):
            assert blocks_of(part) == ("bert.encoder.layer", BLOCKS)


class TestSources:
    def test_a_configuration_gives_parts_of_one_random_model(self):
        config = CONFIGS["bert"]()
        torch.manual_seed(3)
        model = hf.BertForSequenceClassification(copy.deepcopy(config)).eval()
        torch.manual_seed(3)
        bottom, top = cut(config, 1, cls=hf.AutoModelForSequenceClassification)
        inputs = BERT.inputs()
        expected = model(**inputs).logits
        assert torch.equal(run(bottom.eval(), top.eval(), inputs).logits, expected)
        assert isinstance(cut(config, 1)[0], hf.BertModel)

    def test_what_can_t_be_cut_is_refused_with_the_families_that_can(self):
        listed = r"can't be cut; those that can are bert, .*, gpt2, .*, vit"
        small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2}
        config = hf.T5Config(**small, vocab_size=16)
        for source in (config, hf.T5EncoderModel(config)):
            with pytest.raises(ValueError, match=f"models of type 't5' {listed}"):
                cut(source, 1)
        with pytest.raises(ValueError, match="a Linear is no Hugging Face model"):
            blocks_of(nn.Linear(2, 2))

    def test_layers_that_are_left_out_by_chance_are_refused(self):
        with pytest.raises(ValueError, match="layerdrop=0"):
            cut(Case("opt", hf.OPTModel, "base").build(layerdrop=0.1), 1)

    @pytest.mark.parametrize("at", [0, -1, BLOCKS, BLOCKS + 1])
    def test_cuts_that_leave_nothing_on_a_side_are_refused(self, at):
        with pytest.raises(ValueError, match=f"of 3 blocks can be cut .* not at {at}"):
            cut(BERT.build(), at)

    def test_second_cuts_before_the_first_or_past_the_end_are_refused(self):
        for tail in (1, 2, BLOCKS + 1):
            with pytest.raises(ValueError, match=f"{tail} is not there"):
                cut(BERT.build(), 2, tail)


class TestWithoutTokens:
    @pytest.mark.parametrize("case", [GPT2, LLAMA], ids=str)
    def test_texts_end_where_the_mask_says_also_without_a_padding_id(self, case):
        model, inputs = case.build(), case.inputs()
        expected = model(**inputs, **case.labels(inputs))
        model.config.pad_token_id = None
        with pytest.raises(ValueError, match="no padding token"):
            model(**inputs)
        output = run(*cut(model, 1), inputs, **case.labels(inputs))
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.loss, expected.loss)
        one = {name: rows[:1] for name, rows in inputs.items()}
        assert torch.equal(run(*cut(model, 1), one).logits, model(**one).logits)

    @pytest.mark.parametrize("case", [GPT2, BERT, Case("opt", hf.OPTModel, "base")], ids=str)
    def test_a_batch_without_a_mask_has_no_padding(self, case):
        model = case.build()
        ids = {"input_ids": case.inputs()["input_ids"].clamp(min=3)}
        assert torch.equal(run(*cut(model, 1), ids)[0], model(**ids)[0])

    def test_position_ids_are_those_that_the_whole_is_given(self):
        case = Case("llama", hf.LlamaModel, "base")
        model, inputs = case.build(), case.inputs()
        positions = {"position_ids": torch.arange(max(LENGTHS)).expand(len(LENGTHS), -1) + 3}
        expected = model(**inputs, **positions).last_hidden_state
        output = run(*cut(model, 1), {**inputs, **positions}, **positions).last_hidden_state
        assert torch.equal(output, expected)

    @pytest.mark.parametrize(
        "shape", [(4, 9, 8), (4, 8, 16), (3, 9, 16), (4, 9), (4, 9, 16, 1), (36, 16)]
    )
    def test_an_activation_of_another_shape_is_refused_with_both(self, shape):
        _, *above = cut(BERT.build(), 1, 2)
        mask = BERT.inputs()["attention_mask"]
        both = f"{re.escape(str(shape))} was given, .* takes {re.escape('(4, 9, 16)')}"
        for part in above:
            with pytest.raises(ValueError, match=both):
                part(torch.zeros(shape), attention_mask=mask)

    def test_an_activation_is_forgotten_when_a_pass_ends_or_fails(self):
        _, top = cut(BERT.build(), 1)
        mask = BERT.inputs()["attention_mask"]
        top(torch.zeros(4, 9, 16), attention_mask=mask)
        assert top._channel.activation is None
        with pytest.raises(ValueError, match="batch_size"):
            top(torch.zeros(4, 9, 16), attention_mask=mask, labels=torch.tensor([0]))
        assert top._channel.activation is None

    def test_a_part_is_not_run_past_its_ends(self):
        bottom, top = cut(BERT.build(), 1)
        inputs = BERT.inputs()
        with pytest.raises(RuntimeError, match="past its own forward"):
            hf.BertForSequenceClassification.forward(top, **inputs)
        with pytest.raises(RuntimeError, match="ends before what was called"):
            bottom.classifier(torch.zeros(4, 16))
        bottom.bert.encoder.layer[0]._forward_hooks.clear()
        with pytest.raises(RuntimeError, match="ends before what was called"):
            bottom(**inputs)


class TestSeeds:
    def gradients(self, part: Any, inputs: Any, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
        part.zero_grad()
        with seeded(11):
            part(**inputs).backward(gradient)
        return {name: parameter.grad.clone() for name, parameter in part.named_parameters()}

    @pytest.mark.parametrize("case", [BERT, GPT2_LM], ids=str)
    def test_a_pass_under_a_seed_can_be_had_again(self, case):
        bottom, top = cut(case.build().train(), 2)
        inputs, gradient = case.inputs(), torch.randn(4, 9, 16)
        with seeded(11):
            first = bottom(**inputs)
        with seeded(12):
            other = bottom(**inputs)
        assert not torch.equal(first, other)
        bottom.zero_grad()
        first.backward(gradient)
        kept = {name: parameter.grad.clone() for name, parameter in bottom.named_parameters()}
        torch.rand(17)
        again = self.gradients(bottom, inputs, gradient)
        assert all(torch.equal(kept[name], again[name]) for name in kept)

        outputs = []
        for _ in range(2):
            with seeded(5):
                outputs.append(top(first.detach(), attention_mask=inputs["attention_mask"]).logits)
        assert torch.equal(*outputs)

    def test_random_numbers_outside_are_as_if_there_had_been_no_seed(self):
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        with seeded(1):
            torch.rand(8)
        assert torch.equal(torch.rand(3), expected)

    @pytest.mark.slow
    def test_another_process_has_the_same_gradients(self, tmp_path):
        GPT2_LM.build().save_pretrained(tmp_path)
        inputs, gradient = GPT2_LM.inputs(), torch.randn(4, 9, 16)
        save_file({**inputs, "gradient": gradient}, tmp_path / "given.safetensors")
        code = (
            "import sys, transformers, safetensors.torch as files\n"
            "from clients.split import load_bottom, seeded\n"
            "cls = transformers.GPT2LMHeadModel\n"
            "part = load_bottom(sys.argv[1], at=2, cls=cls).train()\n"
            "given = files.load_file(sys.argv[1] + '/given.safetensors')\n"
            "gradient = given.pop('gradient')\n"
            "with seeded(11):\n"
            "    part(**given).backward(gradient)\n"
            "found = {name: p.grad for name, p in part.named_parameters()}\n"
            "files.save_file(found, sys.argv[1] + '/found.safetensors')\n"
        )
        command = [sys.executable, "-c", code, str(tmp_path)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=200, capture_output=True)
        found = load_file(tmp_path / "found.safetensors")
        part = load_bottom(str(tmp_path), at=2, cls=hf.GPT2LMHeadModel).train()
        here = self.gradients(part, inputs, gradient)
        assert found.keys() == here.keys()
        assert all(torch.equal(found[name], here[name]) for name in here)


class TestHalfPrecision:
    @pytest.mark.parametrize(
        "case", [BERT, LLAMA, GPT2_LM, Case("gemma3", hf.Gemma3ForCausalLM, "words")], ids=str
    )
    def test_a_bfloat16_base_with_float32_adapters(self, case, tmp_path):
        """The same bits as the whole in bfloat16; logits within 2% (in norm) of float32, and finite gradients."""
        model, inputs = case.build(), case.inputs()
        model.save_pretrained(tmp_path)
        exact = model(**inputs).logits
        whole = case.cls.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        kind: Any = {"at": 1, "cls": case.cls, "dtype": torch.bfloat16}
        parts = [load(str(tmp_path), **kind).eval() for load in (load_bottom, load_top)]
        adapters = [adapted(part.requires_grad_(False), rank=4, alpha=8.0) for part in parts]
        output = run(*parts, inputs, **case.labels(inputs))
        assert torch.equal(output.logits, whole(**inputs).logits)
        assert (output.logits.float() - exact).norm() <= 0.02 * exact.norm()

        output.loss.backward()
        for half in adapters:
            trained = list(half.adapters.parameters())
            assert trained
            assert {parameter.dtype for parameter in trained} == {torch.float32}
            assert all(parameter.grad.isfinite().all() for parameter in trained)

    def test_a_float32_activation_is_taken_in_the_weights_dtype(self):
        bottom, top = cut(BERT.build().to(torch.bfloat16), 1)
        inputs = BERT.inputs()
        sent = bottom(**inputs)
        received = sent.detach().float().requires_grad_()
        mask = inputs["attention_mask"]
        output = top(received, attention_mask=mask)
        assert torch.equal(output.logits, top(sent, attention_mask=mask).logits)
        output.logits.sum().backward()
        assert received.grad.dtype == torch.float32
