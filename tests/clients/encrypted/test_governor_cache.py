"""A mini-batch that was stored is read back to the bit, or found to be torn; memory is given back on demand."""

import multiprocessing
import os
import pickle
import resource
import threading
import time

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.encrypted.footprint import MB, tree_mb
from clients.encrypted.memory import BatchKey, BatchMissingError, CiphertextCache, StoredCiphertexts

OWNER = "00ab" * 8


def residues(seed: int, d: int = 5, primes: int = 2, columns: int = 64) -> np.ndarray:
    words = np.random.default_rng(seed).integers(0, 2**60, (d, 2, primes, columns), np.uint64)
    return words


def whole(stored: StoredCiphertexts, key: BatchKey) -> np.ndarray:
    _, _, primes, columns = stored.shape(key)
    return np.stack([stored.columns(key, p, 0, columns) for p in range(primes)], axis=2)


def key(number: int = 0, owner: str = OWNER) -> BatchKey:
    return BatchKey(owner, number)


@settings(max_examples=40, deadline=None)
@given(
    d=st.integers(1, 6),
    primes=st.integers(1, 3),
    columns=st.sampled_from([1, 8, 64, 128]),
    width=st.sampled_from([1, 16, 64, 1024]),
    data=st.data(),
)
def test_any_columns_are_those_that_were_stored(tmp_path_factory, d, primes, columns, width, data):
    stored = residues(columns + width, d, primes, columns)
    cache = CiphertextCache(tmp_path_factory.mktemp("cache"), width=width)
    cache.put(key(), stored)
    prime = data.draw(st.integers(0, primes - 1))
    start = data.draw(st.integers(0, columns - 1))
    stop = data.draw(st.integers(start + 1, columns))
    read = cache.columns(key(), prime, start, stop)
    np.testing.assert_array_equal(read, stored[:, :, prime, start:stop])
    assert cache.shape(key()) == stored.shape
    cache.close()


def test_the_file_is_an_array_that_numpy_reads(tmp_path):
    stored = residues(1)
    CiphertextCache(tmp_path, width=16).put(key(3), stored)
    blocks = np.load(tmp_path / OWNER / "3.npy", allow_pickle=False)
    assert blocks.shape == (2, 4, 5, 2, 16)
    np.testing.assert_array_equal(blocks[1, 2], stored[:, :, 1, 32:48])


def test_columns_go_where_they_are_asked_for(tmp_path):
    cache, out = CiphertextCache(tmp_path, width=16), np.empty((5, 2, 16), np.uint64)
    cache.put(key(), residues(0))
    assert cache.columns(key(), 1, 16, 32, out=out) is out
    np.testing.assert_array_equal(out, residues(0)[:, :, 1, 16:32])
    for wrong in (np.empty((5, 2, 15), np.uint64), np.empty((5, 2, 16)), out[::-1]):
        with pytest.raises(ValueError, match="C-contiguous uint64"):
            cache.columns(key(), 1, 16, 32, out=wrong)


@pytest.mark.parametrize(
    ("prime", "start", "stop"), [(2, 0, 8), (-1, 0, 8), (0, 8, 8), (0, -8, 8), (0, 0, 65)]
)
def test_columns_that_are_not_there_are_refused(tmp_path, prime, start, stop):
    cache = CiphertextCache(tmp_path)
    cache.put(key(), residues(0))
    with pytest.raises(ValueError, match="64 columns and 2 primes"):
        cache.columns(key(), prime, start, stop)


@pytest.mark.parametrize("owner", ["../../etc", "", "ABCDEF0123", "00ab" * 40, "00ab00ab\n"])
def test_a_fingerprint_that_is_none_leads_to_no_file(tmp_path, owner):
    cache = CiphertextCache(tmp_path / "cache")
    with pytest.raises(ValueError, match="names no mini-batch"):
        cache.put(key(0, owner), residues(0))
    with pytest.raises(ValueError, match="names no mini-batch"):
        cache.forget(owner)
    assert list(tmp_path.rglob("*")) == [tmp_path / "cache"]


@pytest.mark.parametrize(
    "wrong",
    [residues(0)[0], residues(0).astype(np.int64), residues(0, columns=24), residues(0)[:0]],
)
def test_what_is_no_mini_batch_is_not_stored(tmp_path, wrong):
    cache = CiphertextCache(tmp_path, width=16)
    with pytest.raises(ValueError, match=r"residues are|multiple"):
        cache.put(key(), wrong)
    assert cache.missing([key()]) == [key()]


def test_what_is_missing_is_asked_for(tmp_path):
    cache = CiphertextCache(tmp_path)
    cache.put(key(1), residues(1))
    assert cache.missing([key(0), key(1), key(2)]) == [key(0), key(2)]
    with pytest.raises(BatchMissingError, match="mini-batch 2 of 00ab00ab00ab00ab must be sent"):
        cache.columns(key(2), 0, 0, 8)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found_before_anything_wrong_is_read(tmp_path_factory, data):
    """In header, numbers or checksums; the batch is asked for again, and is whole once it has come."""
    cache = CiphertextCache(tmp_path_factory.mktemp("cache"), width=16)
    cache.put(key(), residues(2))
    path = cache.folder / OWNER / "0.npy"
    content = bytearray(path.read_bytes())
    at = data.draw(st.one_of(st.integers(0, 140), st.integers(0, len(content) - 1)))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(BatchMissingError):
        whole(cache, key())
    assert cache.missing([key()]) == [key()]
    cache.put(key(), residues(2))
    np.testing.assert_array_equal(whole(cache, key()), residues(2))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_file_that_was_cut_off_is_found_when_it_is_looked_for(tmp_path_factory, data):
    cache = CiphertextCache(tmp_path_factory.mktemp("cache"))
    cache.put(key(), residues(2))
    path = cache.folder / OWNER / "0.npy"
    os.truncate(path, data.draw(st.integers(0, path.stat().st_size - 1)))
    assert key() not in cache
    assert not path.exists()


def test_a_file_that_is_cut_off_while_it_is_open_is_found(tmp_path):
    cache = CiphertextCache(tmp_path)
    cache.put(key(), residues(2))
    cache.columns(key(), 0, 0, 8)
    path = tmp_path / OWNER / "0.npy"
    times = path.stat()
    os.truncate(path, 1000)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(BatchMissingError, match="shorter"):
        cache.columns(key(), 1, 0, 8)


def test_a_torn_file_is_not_kept_in_memory(tmp_path):
    cache = CiphertextCache(tmp_path)
    cache.put(key(), residues(2))
    with (tmp_path / OWNER / "0.npy").open("r+b") as file:
        file.seek(400)
        file.write(b"torn")
    cache = CiphertextCache(tmp_path, budget_mb=1)
    with pytest.raises(BatchMissingError, match="block 0 of prime 0"):
        cache.keep(key())
    assert cache.kept_mb == 0
    assert cache.missing([key()]) == [key()]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    cache = CiphertextCache(tmp_path)
    cache.put(key(), residues(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="large"):
            cache.put(key(), residues(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    np.testing.assert_array_equal(whole(cache, key()), residues(1))
    assert [path.name for path in (tmp_path / OWNER).iterdir()] == ["0.npy"]


def _stores_for_ever(folder):
    cache = CiphertextCache(folder)
    while True:
        cache.put(key(), residues(1, d=200, columns=1024))


def test_a_kill_while_a_batch_is_written_leaves_the_old_one_or_the_new_one(tmp_path):
    cache = CiphertextCache(tmp_path)
    cache.put(key(), residues(1, d=200, columns=1024))
    writer = multiprocessing.get_context("spawn").Process(target=_stores_for_ever, args=(tmp_path,))
    writer.start()
    pause, deadline = threading.Event(), time.monotonic() + 60
    while not list(tmp_path.glob("*/*.tmp")):
        assert time.monotonic() < deadline
        pause.wait(0.001)
    writer.kill()
    writer.join()
    writer.close()
    cache = CiphertextCache(tmp_path)
    assert [path.name for path in (tmp_path / OWNER).iterdir()] == ["0.npy"]
    np.testing.assert_array_equal(whole(cache, key()), residues(1, d=200, columns=1024))


def test_a_reader_sees_a_batch_that_took_anothers_place(tmp_path):
    cache = CiphertextCache(tmp_path)
    cache.put(key(), residues(1))
    reader = pickle.loads(pickle.dumps(cache))
    assert type(reader) is StoredCiphertexts
    np.testing.assert_array_equal(whole(reader, key()), residues(1))
    cache.put(key(), residues(2, d=7))
    np.testing.assert_array_equal(whole(reader, key()), residues(2, d=7))


def test_an_owner_who_leaves_takes_its_batches_along(tmp_path):
    cache, other = CiphertextCache(tmp_path, budget_mb=1), "ff" * 16
    for owner in (OWNER, other):
        cache.put(key(0, owner), residues(1))
    kept = cache.kept_mb
    cache.forget(OWNER)
    assert cache.kept_mb == kept / 2
    assert cache.missing([key(), key(0, other)]) == [key()]
    assert [folder.name for folder in tmp_path.iterdir()] == [other]
    cache.forget(OWNER)  # nothing is there, which is what was asked for
    cache.close()


def test_memory_is_kept_up_to_the_budget_and_counted_and_given_back(tmp_path):
    process = psutil.Process()
    cache = CiphertextCache(tmp_path, budget_mb=70)
    batch = residues(1, d=256, primes=2, columns=4096)  # 32 MB
    for number in range(2):
        cache.put(key(number), batch)
    cache.shed()
    low = tree_mb(process)
    assert cache.returns_mb == pytest.approx(64, rel=0.01)
    assert cache.restore()
    assert cache.kept_mb == pytest.approx(64, rel=0.01)
    assert cache.returns_mb == 0
    assert tree_mb(process) - low == pytest.approx(64, abs=8)
    cache.put(key(2), batch)
    assert not cache.keep(key(2))  # a third would be beyond the budget
    assert cache.kept_mb * MB <= 70 * MB
    assert cache.shed()
    assert tree_mb(process) - low == pytest.approx(0, abs=8)
    assert not cache.shed()
    assert not cache.keep(key(0))  # not before it is restored
    np.testing.assert_array_equal(cache.columns(key(0), 1, 0, 1024), batch[:, :, 1, :1024])
    cache.close()


def test_without_a_budget_nothing_is_kept_or_shed(tmp_path):
    cache = CiphertextCache(tmp_path)
    cache.put(key(), residues(1))
    assert cache.kept_mb == 0
    assert not cache.shed()
    assert not cache.restore()


def test_a_width_is_a_power_of_two(tmp_path):
    with pytest.raises(ValueError, match="power of two"):
        CiphertextCache(tmp_path, width=100)


def _reads(reader, seeds, rounds, connection):
    wrong = 0
    for _ in range(rounds):
        for number in seeds:
            wrong += not np.array_equal(whole(reader, key(number)), residues(number))
    connection.send(wrong)


def test_threads_and_processes_read_rightly_while_memory_is_shed_and_batches_are_replaced(tmp_path):
    cache, seeds = (
        CiphertextCache(tmp_path, budget_mb=1, width=16),
        range(40),
    )  # more than stay open
    for number in seeds:
        cache.put(key(number), residues(number))
    spawn = multiprocessing.get_context("spawn")
    ends = [spawn.Pipe(duplex=False) for _ in range(3)]
    worker = spawn.Process(target=_reads, args=(cache, seeds, 4, ends[0][1]))
    threads = [threading.Thread(target=_reads, args=(cache, seeds, 4, end[1])) for end in ends[1:]]
    for reader in (worker, *threads):
        reader.start()
    while worker.is_alive() or any(thread.is_alive() for thread in threads):
        cache.shed()
        cache.put(key(7), residues(7))
        cache.restore()
    assert [end[0].recv() for end in ends] == [0, 0, 0]
    worker.join()
    worker.close()
    for both in ends:
        for end in both:
            end.close()
    cache.close()
