"""Text out of a language model."""

import pytest
import torch

from clients.generation import continuation, load_language_model
from clients.places import DataError
from clients.tasks.text import load_tokenizer
from tests.support.bert import save_tiny_bert
from tests.support.notes import save_tiny_language_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_language_model(tmp_path_factory.mktemp("tiny"), tokens=40_000))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def logits_of(folder):
    model = load_language_model(folder)
    return lambda rows: model(input_ids=rows).logits


def test_the_likeliest_continuation_is_that_of_transformers(folder, tokenizer):
    model = load_language_model(folder)
    ids = [0, *tokenizer("Clients never")["input_ids"]]
    expected = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=12, do_sample=False,
    )[0, len(ids) :]  # fmt: skip
    text = continuation(logits_of(folder), tokenizer, "Clients never", tokens=12, context=32)
    assert text == tokenizer.decode(expected, skip_special_tokens=True)
    assert len(text) > 10


def test_it_ends_with_the_text_and_after_so_many_tokens(tokenizer):
    letters = tokenizer(" a b c")["input_ids"]
    rows = [*letters, tokenizer.eos_token_id, letters[0]]

    def logits(row):
        step = row.shape[1] - 2  # behind the end of the text before it, and a prompt of one token
        return torch.nn.functional.one_hot(torch.tensor([[rows[step]]]), len(tokenizer)).float()

    assert continuation(logits, tokenizer, "x", tokens=99, context=99) == " a b c"
    assert continuation(logits, tokenizer, "x", tokens=2, context=99) == tokenizer.decode(
        letters[:2]
    )


def test_no_row_is_longer_than_the_context(tokenizer):
    seen = []

    def logits(row):
        seen.append(row.shape[1])
        return torch.nn.functional.one_hot(torch.tensor([[70]]), len(tokenizer)).float()

    continuation(logits, tokenizer, "some words before it", tokens=9, context=8)
    assert max(seen) == 8
    assert len(seen) == 9


def test_draws_follow_the_likelihoods_within_the_share(tokenizer):
    # Three tokens with 0.6, 0.3 and 0.1: a share of 0.9 leaves the last one out, and 2 to 1 between the others.
    shares = torch.full((1, 1, len(tokenizer)), -1e9)
    shares[0, 0, [70, 80, 90]] = torch.tensor([0.6, 0.3, 0.1]).log()

    def count(share):
        texts = [
            continuation(
                lambda row: shares, tokenizer, "x", tokens=1, context=9, temperature=1.0,
                share=share, seed=seed,
            )
            for seed in range(900)
        ]  # fmt: skip
        return [texts.count(tokenizer.decode([number])) for number in (70, 80, 90)]

    # Four standard deviations: falsely alarmed in 6 of 100,000 draws of seeds, which are fixed.
    first, second, third = count(0.9)
    assert (first + second, third) == (900, 0)
    assert abs(first - 600) < 4 * (900 * 2 / 9) ** 0.5
    assert abs(count(1.0)[2] - 90) < 4 * (900 * 0.09) ** 0.5


def test_the_seed_decides_the_draws(folder, tokenizer):
    def text(seed):
        return continuation(
            logits_of(folder),
            tokenizer,
            "Servers",
            tokens=20,
            context=32,
            temperature=1.5,
            seed=seed,
        )

    assert text(0) == text(0)
    assert len({text(seed) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    "change", [{"tokens": 0}, {"context": 0}, {"temperature": -1.0}, {"share": 0.0}]
)
def test_numbers_out_of_range_are_refused(tokenizer, change):
    with pytest.raises(ValueError, match="is out of its range"):
        continuation(lambda row: row, tokenizer, "x", **{"context": 9, **change})


def test_what_is_no_language_model_is_refused(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        load_language_model("./no/such/folder")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="no language model can be loaded"):
        load_language_model(str(tmp_path))


def test_weights_that_would_be_unpickled_are_refused(tmp_path):
    save_tiny_bert(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="no language model can be loaded"):
        load_language_model(str(tmp_path))
