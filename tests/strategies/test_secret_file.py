"""Files of secrets: whole or not at all, never over another, for nobody else's eyes."""

import stat
import threading

import pytest

from strategies import secret_file


def test_a_secret_is_read_back_from_a_file_that_only_its_owner_can_read(tmp_path):
    path = tmp_path / "deep" / "secret"
    secret_file.save(path, b"abc")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == ["secret"]
    assert secret_file.load(path, 3) == b"abc"


def test_of_a_longer_file_no_more_is_read_than_tells_so(tmp_path):
    secret_file.save(tmp_path / "secret", bytes(1000))
    assert len(secret_file.load(tmp_path / "secret", 10)) == 11


def test_a_secret_is_never_written_over_another(tmp_path):
    secret_file.save(tmp_path / "secret", b"first")
    with pytest.raises(FileExistsError):
        secret_file.save(tmp_path / "secret", b"second")
    assert secret_file.load(tmp_path / "secret", 100) == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_a_file_that_others_can_open_is_refused(tmp_path, mode):
    secret_file.save(tmp_path / "secret", b"abc")
    (tmp_path / "secret").chmod(mode)
    with pytest.raises(secret_file.ReadableError, match="chmod 600"):
        secret_file.load(tmp_path / "secret", 3)


def test_of_many_who_ask_at_once_one_makes_the_secret(tmp_path):
    path, calls, begin = tmp_path / "secret", [], threading.Barrier(8)

    def make():
        calls.append(1)
        secret_file.save(path, b"abc")

    def ask():
        begin.wait()
        secret_file.make_once(path, make)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]
    assert secret_file.load(path, 3) == b"abc"
