"""A model that is cut is the model that is not, bit for bit: every family, head and cut point."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from clients.split import blocks_of, cut
from tests.support.families import BLOCKS, CASES, Case

CUTS = [(at, None) for at in range(1, BLOCKS)]
U_SHAPED = [(at, tail) for at in range(1, BLOCKS) for tail in range(at + 1, BLOCKS + 1)]


def with_adapters(model: Any) -> Any:
    """Adapters in every layer of every block, with B not zero; nothing else is trained."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    blocks = model.get_submodule(blocks_of(model)[0])
    linear = {
        name.rpartition(".")[2]
        for name, layer in blocks.named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
    }
    transposed = any(isinstance(layer, Conv1D) for layer in blocks.modules())
    config = LoraConfig(
        r=3, target_modules=sorted(linear), init_lora_weights=False, fan_in_fan_out=transposed
    )
    return inject_adapter_in_model(config, model)


def trained(*models: Any) -> dict[str, torch.Tensor]:
    """Gradients by name, and forgets them."""
    found = {
        name: parameter.grad
        for model in models
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    for model in models:
        model.zero_grad(set_to_none=True)
    return found


def through(parts: Any, case: Case, inputs: dict[str, torch.Tensor]) -> Any:
    """Forward and backward part by part, each on its own graph, as if a wire were between them."""
    mask = inputs.get("attention_mask")
    first, *rest = parts
    given, sent = [], [first(**inputs)]
    for part in rest:
        received = sent[-1].detach().clone().requires_grad_()
        given.append(received)
        last = part is rest[-1]
        sent.append(part(received, attention_mask=mask, **(case.labels(inputs) if last else {})))
    output = sent.pop()
    case.loss(output).backward()
    for received, activation in zip(reversed(given), reversed(sent), strict=True):
        activation.backward(received.grad)
    return output


def assert_same(output: Any, expected: Any) -> None:
    """All tensors of two outputs have the same bits; the whole model's cache is no part of what is computed."""
    names = [name for name in expected if name != "past_key_values"]
    assert list(output.keys()) == names
    assert all(torch.equal(output[name], expected[name]) for name in names)


def check(case: Case, cuts: list[tuple[int, int | None]]) -> None:
    """One model, whole and cut."""
    model, inputs = with_adapters(case.build()), case.inputs()
    expected = model(**inputs, **case.labels(inputs))
    case.loss(expected).backward()
    gradients = trained(model)
    assert len(gradients) == sum("lora_" in name for name, _ in model.named_parameters())
    for at, tail in cuts:
        parts = cut(model, at, tail)
        assert_same(through(parts, case, inputs), expected)
        found = trained(*parts)
        assert found.keys() == gradients.keys()
        assert all(torch.equal(found[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_output_loss_and_every_gradient_have_the_same_bits(index):
    check(CASES[index], [CUTS[index % len(CUTS)]])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_so_they_have_at_every_cut_and_pair_of_cuts(case):
    check(case, CUTS + U_SHAPED)
