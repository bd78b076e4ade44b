"""The text of a base model."""

import hashlib
from importlib.metadata import version

import pytest

from clients.base_model.corpus import PACKAGES, corpus_source, read_corpus
from clients.places import DataError
from clients.tasks.docstrings import PACKAGES as TASKS
from clients.tasks.passages import read_packages
from tests.support.notes import write_notes


def paragraphs(texts):
    return {paragraph for text in texts for paragraph in text.split("\n\n")}


def test_a_base_model_reads_no_package_that_is_a_task():
    assert not set(PACKAGES) & set(TASKS)


def test_whole_modules_are_held_out_and_no_paragraph_is_in_both_parts():
    corpus = read_corpus(packages=("rich", "click"))
    passages = read_packages(("click", "rich"))
    of_text = {item.text: item.module for item in passages}
    assert not {of_text[text] for text in corpus.train} & {of_text[t] for t in corpus.held_out}
    assert not paragraphs(corpus.train) & paragraphs(corpus.held_out)
    assert len(corpus.train) + len(corpus.held_out) == len(passages)
    assert corpus.held_out
    assert corpus.described == "click, rich"


def test_a_folder_is_a_corpus_even_of_one_long_file(tmp_path):
    notes = write_notes(tmp_path / "notes", files=1, paragraphs=400)
    corpus = read_corpus(notes)
    assert len(corpus.held_out) == 1
    assert len(corpus.train) > 5
    assert not paragraphs(corpus.train) & paragraphs(corpus.held_out)


def test_the_hash_tells_texts_and_the_source_tells_files(tmp_path):
    one, same, other = (
        write_notes(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert read_corpus(one).sha256 == read_corpus(same).sha256 != read_corpus(other).sha256
    assert corpus_source(one) == corpus_source(same) != corpus_source(other)
    digest = hashlib.sha256((one / "note-0.md").read_bytes()).hexdigest()
    assert corpus_source(one)["note-0.md"] == digest
    assert corpus_source(packages=("rich",)) == {"rich": version("rich")}


def test_too_little_to_hold_any_out_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("One two three four five six seven eight nine.")
    with pytest.raises(DataError, match="too little to hold any out"):
        read_corpus(tmp_path)
