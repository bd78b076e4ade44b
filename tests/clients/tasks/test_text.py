"""Text to tokens."""

import pytest

from clients.places import DataError
from clients.tasks.text import tokens, words


def encode(training, texts, **settings):
    way = tokens(training, **{"vocab_size": 100, "max_length": 5, "tokenizer": None, **settings})
    return way, way.encode(texts).tolist()


def test_words_are_runs_of_letters_in_lower_case():
    assert words("The n_samples, 3.5 of GRÜN (don't)!") == [
        "the",
        "n",
        "samples",
        "of",
        "grün",
        "don",
        "t",
    ]


def test_ids_count_from_the_most_frequent_word_and_ties_go_by_the_alphabet():
    way, rows = encode(["b a c a", "b a"], ["a b c d", "c c c c c a", ""])
    assert way.vocab_size == 5
    assert rows == [[2, 3, 4, 1, 0], [4, 4, 4, 4, 4], [0, 0, 0, 0, 0]]


def test_the_vocabulary_has_at_most_so_many_ids():
    way, rows = encode(["b a c a", "b a"], ["a b c"], vocab_size=3)
    assert (way.vocab_size, rows) == (3, [[2, 1, 1, 0, 0]])


def test_a_folder_that_is_not_there_is_never_looked_up_on_the_hub(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*models/none: `make models`"):
        encode([], [], tokenizer="./models/none")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file, and a folder is needed"):
        encode([], [], tokenizer=str(tmp_path / "file"))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        encode([], [], tokenizer=str(tmp_path))
