"""Files, folders and names on the hub."""

from pathlib import Path

import pytest

from clients.places import DataError, absolute, require_file, require_folder


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("./models/none", "/base/models/none"),
        ("../data", "/base/../data"),
        ("/data", "/data"),
        ("owner/name", "owner/name"),
        ("name", "name"),
    ],
)
def test_what_says_that_it_is_a_folder_is_one_even_where_it_is_not_there(place, expected):
    assert absolute(place, Path("/base")) == expected


def test_a_name_is_a_folder_where_there_is_one(tmp_path):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert absolute("owner/name", tmp_path) == str(tmp_path / "owner" / "name")


def test_the_home_is_written_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute("~/data", Path("/base")) == str(tmp_path / "data")
    (tmp_path / "file").write_text("")
    assert require_file(Path("~/file")) == tmp_path / "file"


def test_only_what_cannot_be_a_folder_goes_to_the_hub():
    assert require_folder("owner/name", "mend") == "owner/name"
    for place in ("./no/such", "/no/such", "~/no-such-folder", "../no-such-folder"):
        with pytest.raises(DataError, match=r"there is no folder .*: mend"):
            require_folder(place, "mend")
