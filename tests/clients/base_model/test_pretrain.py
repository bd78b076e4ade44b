"""A base model: it learns, it is made once, and a half-made one is none."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from clients.base_model import pretrain
from clients.base_model.corpus import corpus_source, read_corpus
from clients.base_model.pretrain import (
    BaseModelError,
    BaseModelSettings,
    is_made,
    make_base_model,
    mean_loss,
    read_record,
    stream,
)
from clients.tasks.text import load_tokenizer
from tests.support.notes import write_notes

TINY = {"layers": 2, "width": 16, "heads": 2, "vocab": 300, "context": 32, "lr": 1e-2}
SETTINGS = BaseModelSettings(**TINY, tokens=40_000)


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    return write_notes(tmp_path_factory.mktemp("notes"))


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def made(notes, told, tmp_path_factory):
    output = tmp_path_factory.mktemp("made") / "deep" / "model"
    record = make_base_model(
        SETTINGS, read_corpus(notes), corpus_source(notes), output, lambda *item: told.append(item)
    )
    return output, record


def test_it_learns_the_language(made, notes):
    figures = made[1]["figures"]
    # Untrained, all of the vocabulary is about as likely; what no model can beat is that the notes were drawn from
    # 8 * 4 * 6 * 8 sentences, all as likely.
    sentences = sum(text.count(".") for text in read_corpus(notes).held_out)
    least = math.exp(sentences * math.log(8 * 4 * 6 * 8) / figures["held_out_tokens"])
    assert 250 < figures["perplexity_before"] < 400
    assert least < figures["perplexity_after"] < 10
    assert figures["trained_tokens"] >= 40_000 > figures["trained_tokens"] - 16 * 32


def test_what_is_written_is_what_the_figures_are_of(made, notes):
    output, record = made
    model = AutoModelForCausalLM.from_pretrained(output, use_safetensors=True)
    assert isinstance(model, GPT2LMHeadModel)
    tokenizer = load_tokenizer(str(output))
    corpus = read_corpus(notes)
    loss = mean_loss(model, stream(tokenizer, corpus.held_out), 32)
    assert math.exp(loss) == pytest.approx(record["figures"]["perplexity_after"], rel=1e-5)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    assert model.config.pad_token_id == tokenizer.pad_token_id == 1
    assert record["corpus_sha256"] == corpus.sha256
    assert sum(p.numel() for p in model.parameters()) == record["figures"]["parameters"]


def test_mean_loss_is_that_of_each_token_by_itself(made):
    model = AutoModelForCausalLM.from_pretrained(made[0]).eval()
    tokens = torch.randint(2, 250, (100,), generator=torch.Generator().manual_seed(1))
    losses = []
    for start in (0, 32, 64):
        row = tokens[start : start + 33]
        with torch.no_grad():
            logits = model(input_ids=row[None, :-1]).logits[0]
        losses += F.cross_entropy(logits, row[1:], reduction="none").tolist()
    assert mean_loss(model, tokens, 32, batch_size=2) == pytest.approx(
        sum(losses) / len(losses), rel=1e-5
    )


def test_progress_grows_to_the_whole(made, told):
    spent = [item[0] for item in told]
    assert spent == sorted(spent)
    assert spent[-1] == 1
    assert told[-1][1] < told[0][1]


def test_the_same_seed_gives_the_same_model(notes, tmp_path):
    settings = BaseModelSettings(**TINY, tokens=2_000, seed=3)
    corpus = read_corpus(notes)
    torch.manual_seed(99)
    weights = []
    for name in ("one", "two"):
        make_base_model(settings, corpus, {}, tmp_path / name)
        weights.append(load_file(tmp_path / name / "model.safetensors"))
        torch.rand(5)
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_finished_folder_is_known_by_settings_source_and_hashes(made, notes, tmp_path):
    output, _ = made
    source = corpus_source(notes)
    assert is_made(output, SETTINGS, source)
    assert not is_made(output, BaseModelSettings(**TINY, tokens=40_001), source)
    assert not is_made(output, SETTINGS, {**source, "note-0.md": "0"})
    assert not is_made(tmp_path, SETTINGS, source)
    assert read_record(tmp_path) is None
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in output.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    assert is_made(damaged, SETTINGS, source)
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    assert not is_made(damaged, SETTINGS, source)


def test_only_files_that_need_no_unpickling_are_written(made):
    names = {file.name for file in made[0].iterdir()}
    assert "model.safetensors" in names
    assert {name.rpartition(".")[2] for name in names} <= {"safetensors", "json", "jinja"}
    json.loads((made[0] / "base_model.json").read_text())


def test_what_is_stopped_leaves_nothing(notes, tmp_path):
    def stop(spent, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_base_model(SETTINGS, read_corpus(notes), {}, tmp_path / "model", stop)
    assert list(tmp_path.iterdir()) == []


def test_what_is_stopped_while_it_is_written_leaves_nothing(notes, tmp_path, monkeypatch):
    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "_sha256", stop)
    settings = BaseModelSettings(**TINY, tokens=1)
    with pytest.raises(KeyboardInterrupt):
        make_base_model(settings, read_corpus(notes), {}, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_never_written_over(notes, tmp_path):
    (tmp_path / "own.txt").write_text("mine")
    with pytest.raises(BaseModelError, match="is there already"):
        make_base_model(SETTINGS, read_corpus(notes), {}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["own.txt"]


def test_a_corpus_that_is_shorter_than_a_row_is_refused(notes, tmp_path):
    settings = BaseModelSettings(**{**TINY, "context": 30_000}, tokens=1)
    with pytest.raises(BaseModelError, match=r"must be more than a row's 30000"):
        make_base_model(settings, read_corpus(notes), {}, tmp_path / "model")


def test_a_budget_of_minutes_ends(notes, tmp_path):
    settings = BaseModelSettings(**TINY, tokens=None, minutes=0.005)
    record = make_base_model(settings, read_corpus(notes), {}, tmp_path / "model")
    assert record["figures"]["trained_tokens"] > 0
    assert record["figures"]["seconds"] < 30  # 0.3 s and a step, on a machine that may be busy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "width = 16: must be a multiple of heads = 3"),
        ({"minutes": 1.0}, "one of them"),
        ({"tokens": None}, "one of them"),
        ({"vocab": 100}, "vocab = 100: must be at least 258"),
        ({"lr": 1.0}, "lr = 1.0: must be less than 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        BaseModelSettings(**{**TINY, "tokens": 10, **change})
