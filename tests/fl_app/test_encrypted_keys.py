"""`trellis keys encrypted`: an owner's key, made by hand before any run."""

import stat

import pytest

from clients.encrypted.keys import OwnerKeys
from clients.encrypted.ring import Ring
from fl_app.cli import keys


def test_the_command_makes_a_key_and_prints_its_fingerprint(tmp_path, capsys):
    path = tmp_path / "deep" / "owner.key"
    assert keys.main(["encrypted", str(path)]) == 0
    made = OwnerKeys.load(path)
    assert capsys.readouterr().out == f"{made.fingerprint}\n"
    assert made.ring == Ring(8192, (60, 54, 60))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_it_is_never_made_over_another(tmp_path, capsys):
    path = tmp_path / "owner.key"
    assert keys.main(["encrypted", str(path)]) == 0
    before = path.read_bytes()
    assert keys.main(["encrypted", str(path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_the_runs_overrides_decide_the_ring(tmp_path):
    path = tmp_path / "owner.key"
    assert keys.main(["encrypted", str(path), "model=encrypted_logistic"]) == 0
    assert OwnerKeys.load(path).ring == Ring(4096, (54, 55))


@pytest.mark.parametrize("order", [0, 1])
def test_another_ring_is_named_before_or_behind_the_file(tmp_path, order):
    ring = ["--degree", "4096", "--bits", "54,55"]
    path = tmp_path / "owner.key"
    named = [[str(path), *ring], [*ring, str(path)]][order]
    assert keys.main(["encrypted", *named]) == 0
    assert OwnerKeys.load(path).ring == Ring(4096, (54, 55))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--degree", "8192", "--bits", "60,60,60,60"], "128-bit secure"),
        (["--degree", "8192", "--bits", "60"], "two primes or more"),
        (["--degree", "8192", "--bits", "60,20"], "30 to 60 bits"),
        (["model=cnn"], "use model=encrypted_mlp"),
        (["model=encrypted_mlp", "model.hidden=[0]"], "hidden"),
    ],
)
def test_an_insecure_ring_is_refused_and_leaves_nothing(tmp_path, capsys, wrong, said):
    assert keys.main(["encrypted", str(tmp_path / "owner.key"), *wrong]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong", [["--bits", "sixty"], ["--degree", "1000"], ["--bits", "60,54,60"], []]
)
def test_a_wrong_command_says_what_is_wrong(tmp_path, wrong):
    named = [str(tmp_path / "owner.key"), *wrong] if wrong else []
    with pytest.raises(SystemExit) as ended:
        keys.main(["encrypted", *named])
    assert ended.value.code == 2
    assert not list(tmp_path.iterdir())


def test_the_help_names_the_kind(capsys):
    assert keys.main(["--help"]) == 0
    assert "trellis keys encrypted owner.key" in capsys.readouterr().out
