"""Parts that are read from disk each by itself: those of the whole, and no more of it in memory than they hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clients.fetch import MINILM, is_whole
from clients.places import DataError
from clients.split import cut, load_bottom, load_middle, load_tail, load_top
from tests.support.families import BLOCKS, CASES, Case

ROOT = Path(__file__).parents[3]
FAMILIES = [case for case in CASES if case.kind in ("words", "classes")]
MIB = 2**20


def tensors(*models: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for model in models for name, tensor in model.named_parameters()}


def saved(case: Case, folder: Path, **changes: Any) -> Any:
    model = case.build(**changes)
    model.save_pretrained(folder)
    return model


def loaded(folder: Path, case: Case, at: int, tail: int | None) -> tuple[Any, ...]:
    parts = cut(str(folder), at, tail, cls=case.cls)
    return tuple(part.eval() for part in parts)


def output_of(parts: tuple[Any, ...], inputs: dict[str, torch.Tensor], **labels: Any) -> Any:
    state, mask = parts[0](**inputs), inputs.get("attention_mask")
    for part in parts[1:-1]:
        state = part(state, attention_mask=mask)
    return parts[-1](state, attention_mask=mask, **labels)


def gradients(loss: torch.Tensor, *parts: Any) -> dict[str, torch.Tensor]:
    """Of every weight; of a matrix that is in two parts the sum, as it is in the whole."""
    loss.backward()
    found: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            if parameter.grad is not None:
                found[name] = found[name] + parameter.grad if name in found else parameter.grad
    return found


def assert_whole(case: Case, folder: Path, cuts: list[tuple[int, int | None]]) -> None:
    model, inputs = saved(case, folder), case.inputs()
    expected, names = model(**inputs, **case.labels(inputs)), tensors(model)
    slopes = gradients(expected.loss, model)
    for at, tail in cuts:
        parts = loaded(folder, case, at, tail)
        held = [set(tensors(part)) for part in parts]
        assert set().union(*held) == names.keys()
        tied = set(model.all_tied_weights_keys.values())
        assert sum(map(len, held)) <= len(names) + len(tied)
        output = output_of(parts, inputs, **case.labels(inputs))
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.loss, expected.loss)
        found = gradients(output.loss, *parts)
        assert found.keys() == slopes.keys()
        assert all(torch.equal(found[name], slopes[name]) for name in slopes)


@pytest.mark.parametrize("index", range(0, len(FAMILIES), 3), ids=lambda i: str(FAMILIES[i]))
def test_parts_from_disk_are_those_of_the_whole(index, tmp_path):
    assert_whole(FAMILIES[index], tmp_path, [(1 + index % (BLOCKS - 1), None)])


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_so_they_are_for_every_family_and_cut(case, tmp_path):
    pairs = [(at, tail) for at in range(1, BLOCKS) for tail in range(at + 1, BLOCKS + 1)]
    assert_whole(case, tmp_path, [*((at, None) for at in range(1, BLOCKS)), *pairs])


def test_a_file_of_the_base_model_serves_a_model_with_heads_and_the_other_way_round(tmp_path):
    base, classes = Case("bert", CASES[4].cls, "base"), CASES[0]
    model = saved(base, tmp_path / "base")
    bottom = load_bottom(str(tmp_path / "base"), at=2, cls=classes.cls)
    top = load_top(str(tmp_path / "base"), at=2, cls=classes.cls, num_labels=7)
    assert top.classifier.weight.shape == (7, 16)
    found = {name.removeprefix("bert."): tensor for name, tensor in tensors(bottom, top).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(model).items())

    model = saved(classes, tmp_path / "classes")
    top = load_top(str(tmp_path / "classes"), at=2)
    assert all(torch.equal(t, tensors(model.bert)[name]) for name, t in tensors(top).items())


def test_buffers_that_no_file_has_are_those_of_the_whole(tmp_path):
    case = CASES[10]
    assert case.config == "gemma3"
    model = saved(case, tmp_path)
    for part in loaded(tmp_path, case, 2, 3):
        for name, buffer in part.named_buffers():
            whole = dict(model.named_buffers()).get(name)
            assert (whole is not None and torch.equal(buffer, whole)) or buffer.numel() == 0


def test_a_part_can_be_loaded_in_half_precision(tmp_path):
    case = CASES[0]
    saved(case, tmp_path)
    bottom = load_bottom(str(tmp_path), at=1, cls=case.cls, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in bottom.parameters()} == {torch.bfloat16}
    assert bottom(**case.inputs()).dtype == torch.bfloat16


@pytest.mark.parametrize("load", [load_bottom, load_top])
def test_what_can_t_be_loaded_is_an_error_that_names_it(load, tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        load(str(tmp_path / "nowhere"), at=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no model can be loaded from .*empty"):
        load(str(tmp_path / "empty"), at=1)
    saved(CASES[4], tmp_path / "bert")
    with pytest.raises(ValueError, match=r"of 3 blocks can be cut behind block 1 to 2, not at 3"):
        load(str(tmp_path / "bert"), at=3)


def test_second_cuts_that_are_not_there_are_refused(tmp_path):
    saved(CASES[4], tmp_path)
    with pytest.raises(ValueError, match="comes behind the first, at 2"):
        load_middle(str(tmp_path), at=2, tail=2)
    with pytest.raises(ValueError, match="not behind the last of 3"):
        load_tail(str(tmp_path), at=4)
    assert load_tail(str(tmp_path), at=3).span == range(3, 3)


def test_pickled_weights_are_not_read(tmp_path):
    saved(CASES[4], tmp_path)
    file = tmp_path / "model.safetensors"
    torch.save(load_file(file), tmp_path / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(DataError, match="no model can be loaded"):
        load_bottom(str(tmp_path), at=1)


def test_code_that_comes_with_weights_is_not_run(tmp_path):
    saved(CASES[4], tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    assert load_bottom(str(tmp_path), at=1).span == range(1)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "lost", ["encoder.layer.0.output.dense.bias", "embeddings.word_embeddings.weight"]
)
def test_a_file_without_a_part_of_the_body_is_an_error_and_no_random_weight(lost, tmp_path):
    saved(CASES[4], tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=f"it has no {lost}"):
        load_bottom(str(tmp_path), at=1)
    load_top(str(tmp_path), at=2)


@pytest.mark.skipif(not is_whole(ROOT / "models" / "minilm", MINILM), reason="needs `make models`")
@pytest.mark.parametrize(("at", "tail"), [(1, None), (5, None), (2, 4), (3, 6)])
def test_minilm_from_disk_in_parts_is_minilm(at, tail):
    from clients.pretrained import load_encoder

    place = str(ROOT / "models" / "minilm")
    encoder = load_encoder(place).eval()
    inputs = {"input_ids": torch.randint(1000, 2000, (3, 12)), "attention_mask": torch.ones(3, 12)}
    inputs["attention_mask"][1, 5:] = 0
    parts = tuple(part.eval() for part in cut(place, at, tail))
    with torch.no_grad():
        expected, output = encoder(**inputs), output_of(parts, inputs)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(output.pooler_output, expected.pooler_output)


_RESIDENT = """
import json, sys, psutil, torch, transformers
from clients.split import load_bottom, load_top
cls = transformers.GPT2LMHeadModel
loaders = {"whole": lambda folder, at: cls.from_pretrained(folder, dtype=torch.float32),
           "bottom": lambda folder, at: load_bottom(folder, at=at, cls=cls),
           "top": lambda folder, at: load_top(folder, at=at, cls=cls)}
def load(folder, kind, at):
    part = loaders[kind](folder, int(at))
    # Weights are mapped from the file, and resident once they are read.
    return part, sum(float(tensor.detach().sum()) for tensor in part.parameters())
folder, spare, kind, at = sys.argv[1:]
load(spare, kind, 1)  # what is imported and allocated once is none of the model
before = psutil.Process().memory_info().rss
part, _ = load(folder, kind, at)
grown = psutil.Process().memory_info().rss - before
print(json.dumps([grown, sum(tensor.numel() * 4 for tensor in part.parameters())]))
"""


def resident(folder: Path, spare: Path, kind: str, at: int) -> tuple[int, int]:
    """Bytes that a process holds more with a part loaded, and bytes of the part's weights."""
    found = subprocess.run(
        [sys.executable, "-c", _RESIDENT, str(folder), str(spare), kind, str(at)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    grown, weights = json.loads(found.stdout.splitlines()[-1])
    return grown, weights


def save_gpt2(folder: Path, **settings: int) -> Path:
    import transformers

    special = {"bos_token_id": 1, "eos_token_id": 1, "n_head": 8, "n_positions": 64}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**special, **settings)).save_pretrained(
        folder
    )
    return folder


@pytest.mark.slow
def test_a_part_takes_the_memory_of_its_own_weights(tmp_path):
    folder = save_gpt2(tmp_path / "gpt2", n_layer=12, n_embd=512, vocab_size=4096)
    spare = save_gpt2(tmp_path / "spare", n_layer=2, n_embd=64, vocab_size=64)
    whole, _ = resident(folder, spare, "whole", 0)
    shares = {}
    for kind, at in (("bottom", 6), ("top", 6), ("bottom", 3), ("top", 9)):
        grown, weights = resident(folder, spare, kind, at)
        assert abs(grown - weights) < 4 * MIB
        shares[kind, at] = grown / whole
    # Embeddings of 4,096 words stand beside six blocks in the bottom, and in the top, whose head they are.
    assert shares["bottom", 6] < 0.55
    assert shares["top", 6] < 0.55
    assert shares["bottom", 3] < 0.31
    assert shares["top", 9] < 0.31
