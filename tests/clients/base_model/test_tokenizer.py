"""A byte-level tokenizer of one's own."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.base_model.tokenizer import END, LEAST_VOCABULARY, PADDING, train_tokenizer
from clients.tasks.text import load_tokenizer
from tests.support.examples import many

TEXTS = ["Clients train the model.", "The server adds what the clients send.", "the model " * 9]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@settings(max_examples=many(100))
@given(text=st.text())
def test_any_text_has_tokens_and_comes_back(tokenizer, text):
    ids = tokenizer(text.replace("<|", ""))["input_ids"]
    assert tokenizer.decode(ids) == text.replace("<|", "")
    assert all(1 < number < len(tokenizer) for number in ids)


def test_the_ends_have_ids_of_their_own(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert tokenizer.convert_ids_to_tokens([0, 1]) == [END, PADDING]
    assert tokenizer("model")["input_ids"][0] not in (0, 1)  # nothing is added to a text


def test_what_is_frequent_is_one_token_and_the_vocabulary_is_bounded(tokenizer):
    assert len(tokenizer(" model")["input_ids"]) == 1
    assert len(tokenizer("qxzj")["input_ids"]) == 4
    assert LEAST_VOCABULARY < len(tokenizer) <= 300


def test_the_same_texts_give_the_same_tokenizer_and_it_is_read_back(tokenizer, tmp_path):
    assert train_tokenizer(TEXTS, 300).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(str(tmp_path))
    again = load_tokenizer(str(tmp_path))
    assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert (again.eos_token_id, again.pad_token_id, len(again)) == (0, 1, len(tokenizer))


def test_fewer_ids_than_bytes_are_refused():
    with pytest.raises(ValueError, match="vocab_size = 257: must be at least 258"):
        train_tokenizer(TEXTS, 257)
