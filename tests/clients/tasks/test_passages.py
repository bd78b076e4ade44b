"""Prose out of packages and folders."""

import sys
from pathlib import Path

import pytest

from clients.places import DataError
from clients.tasks.passages import read_folder, read_packages, text_files


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages of the test's own; importing one would fail."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("firstness", "secondness"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('never imported')\n")
    return tmp_path


def write(path: Path, *docstrings: str) -> None:
    functions = [f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(docstrings)]
    path.write_text("\n".join(functions))


def test_prose_keeps_case_and_punctuation_and_loses_code_and_indentation(packages):
    write(
        packages / "firstness" / "a.py",
        "Adds, as One would (twice).\n\n    More of it:\n\n    >>> add(1,\n    ...     2)\n    3\n\n"
        "    The end is near.\n    ",
    )
    (found,) = read_packages(("firstness",), None, 3)
    assert (found.source, found.module) == ("firstness", "firstness/a.py")
    assert found.text == "Adds, as One would (twice).\n\nMore of it:\n\nThe end is near."
    assert "firstness" not in sys.modules


def test_a_paragraph_stands_once_whatever_its_spaces(packages):
    write(
        packages / "firstness" / "a.py", "A first\n    paragraph here.\n\n    Its own words here."
    )
    write(
        packages / "secondness" / "b.py", "A  first paragraph here.\n\n    Other words stand here."
    )
    found = read_packages(("firstness", "secondness"), None, 3)
    assert [item.text for item in found] == [
        "A first\nparagraph here.\n\nIts own words here.",
        "Other words stand here.",
    ]


def test_short_texts_and_what_is_over_the_most_are_left_out(packages):
    texts = [f"Words and words of number {chr(97 + i)}{chr(98 + i)}." for i in range(20)]
    write(packages / "firstness" / "a.py", "Too short.", *texts)
    write(packages / "firstness" / "b.py", *[text.upper() for text in texts])
    assert len(read_packages(("firstness",), None, 5)) == 40
    few = read_packages(("firstness",), 10, 5)
    assert len(few) == 2  # a tenth of them of one module at most
    assert len({item.module for item in few}) == 2


def test_real_packages_give_the_same_in_the_same_order():
    first = read_packages(("rich",), 50)
    read_packages.cache_clear()
    assert read_packages(("rich",), 50) == first
    assert len(first) == 50
    assert all(item.module.startswith("rich/") for item in first)
    paragraphs = [p for item in first for p in item.text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))


def test_files_of_text_are_cut_into_pieces_of_whole_paragraphs(tmp_path):
    paragraphs = [f"Paragraph {i} has so many words in it. " + "word " * 200 for i in range(10)]
    (tmp_path / "long.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "short.MD").write_text("One two three four five six seven eight nine.")
    (tmp_path / "left.py").write_text("One two three four five six seven eight nine ten.")
    found = read_folder(tmp_path)
    assert {item.module for item in found} == {"long.txt", "below/short.MD"}
    assert {item.source for item in found} == {"long.txt", "below"}
    assert [path.name for path in text_files(tmp_path)] == ["short.MD", "long.txt"]
    pieces = [item.text for item in found if item.module == "long.txt"]
    assert len(pieces) == 3
    assert "\n\n".join(pieces).split("\n\n") == [p.rstrip() for p in paragraphs]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b"\xff\xfe no text"}, r"a.txt: not UTF-8 \(invalid start byte, byte 0\)"),
        ({"a.txt": b"too short"}, r"holds no .txt or .md file with 8 words"),
        ({}, r"holds no .txt or .md file"),
    ],
)
def test_a_folder_without_text_is_refused(tmp_path, files, message):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_folder(tmp_path)


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        read_folder(tmp_path / "none")
    with pytest.raises(DataError, match="no installed package 'no_such_package'"):
        read_packages(("no_such_package",))
    with pytest.raises(DataError, match="name one or more"):
        read_packages(())
    with pytest.raises(DataError, match="rich has no docstrings of 100000 words"):
        read_packages(("rich",), None, 100_000)
