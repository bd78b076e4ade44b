"""Mini-batches of ciphertexts: on disk always, in memory as far as a budget goes.

Workers read by `pread` through the system's page cache, whose copy serves all processes. A copy in shared memory was no
faster (8 to 10 GB/s each, where the file is in the cache), would have to be cleared away after a kill, and the kernel
can't take it back. To keep a mini-batch in memory is therefore to map its file: the kernel then prefers to drop others,
it counts in this process' PSS, workers read the same pages without knowing, and letting go needs no word to them.

Files are written beside their place and renamed to it. What is torn all the same is found out when it is opened, or
when a block is first read; it is deleted, and its owner asked again. This file knows nothing of rings and keys.
"""

from __future__ import annotations

import mmap
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from clients.encrypted.batch_file import UNFINISHED, BatchFile, Residues, TornError, store_batch
from clients.encrypted.footprint import MB
from clients.encrypted.levers import Order

_OPEN_FILES: Final = 32
"""Files that a reader keeps open."""
_OWNER: Final = re.compile(r"[0-9a-f]{8,128}")


class BatchKey(NamedTuple):
    """Which mini-batch.

    Attributes:
        owner: fingerprint of the owner's keys, in lower-case hexadecimal digits.
        number: which of the owner's mini-batches, from 0.
    """

    owner: str
    number: int


class BatchMissingError(LookupError):
    """A mini-batch isn't there, or was torn and is no more; its owner must send it again.

    Attributes:
        key: which.
    """

    def __init__(self, key: BatchKey, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"mini-batch {self.key.number} of {self.key.owner[:16]} must be sent again: {self.reason}"


class StoredCiphertexts:
    """Reads mini-batches; any number of threads and processes may. Pickled, it is a reader of the same folder.

    Args:
        folder: one folder an owner below it, one file a mini-batch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: OrderedDict[BatchKey, BatchFile] = OrderedDict()
        self._files_lock = threading.Lock()

    def __reduce__(self) -> tuple[type[StoredCiphertexts], tuple[Path]]:
        return StoredCiphertexts, (self.folder,)

    def __contains__(self, key: BatchKey) -> bool:
        """Whether it is there, as long as it should be; blocks are proved when they are read."""
        try:
            self._file(key)
        except BatchMissingError:
            return False
        return True

    def missing(self, keys: Iterable[BatchKey]) -> list[BatchKey]:
        """Those that must be asked for."""
        return [key for key in keys if key not in self]

    def shape(self, key: BatchKey) -> tuple[int, int, int, int]:
        """(d, 2, primes, N) of a mini-batch; raises `BatchMissingError`."""
        primes, blocks, d, parts, width = self._file(key).shape
        return d, parts, primes, blocks * width

    def columns(
        self, key: BatchKey, prime: int, start: int, stop: int, out: Residues | None = None
    ) -> Residues:
        """Columns [start, stop) of all ciphertexts of a mini-batch modulo one prime; fastest one block at a time.

        Args:
            key: which mini-batch.
            prime: index of the prime.
            start: first column.
            stop: the one behind the last.
            out: (d, 2, stop - start) uint64 to read into, C-contiguous; by default a new array.

        Returns:
            (d, 2, stop - start) uint64.

        Raises:
            BatchMissingError: it isn't there or was torn; it has been deleted then.
            ValueError: there is no such prime or column, or `out` has another shape.
        """
        file = self._file(key)
        primes, blocks, d, parts, width = file.shape
        if not (0 <= prime < primes and 0 <= start < stop <= blocks * width):
            raise ValueError(
                f"columns {start} to {stop} of prime {prime}: there are {blocks * width} columns "
                f"and {primes} primes"
            )
        shape = d, parts, stop - start
        if out is None:
            out = np.empty(shape, np.uint64)
        elif out.shape != shape or out.dtype != np.uint64 or not out.flags.c_contiguous:
            raise ValueError(f"out must be a C-contiguous uint64 array {shape}")
        with self._deleting(key, file):
            if start % width == 0 and stop - start == width:
                file.read(prime, start // width, out)
                return out
            block = np.empty((d, parts, width), np.uint64)
            for number in range(start // width, -(-stop // width)):
                file.read(prime, number, block)
                first = number * width
                begin, end = max(start, first), min(stop, first + width)
                out[..., begin - start : end - start] = block[..., begin - first : end - first]
        return out

    def _path(self, key: BatchKey) -> Path:
        if not _OWNER.fullmatch(key.owner) or key.number < 0:
            raise ValueError(f"{key} names no mini-batch")
        return self.folder / key.owner / f"{key.number}.npy"

    def _file(self, key: BatchKey) -> BatchFile:
        path = self._path(key)
        with self._files_lock:
            try:
                file = self._files.get(key)
                if file is None or not file.is_at(path):
                    file = self._files[key] = BatchFile(path)
            except FileNotFoundError:
                self._files.pop(key, None)
                raise BatchMissingError(key, "it isn't here") from None
            except TornError as torn:
                self._files.pop(key, None)
                path.unlink(missing_ok=True)
                raise BatchMissingError(key, str(torn)) from None
            self._files.move_to_end(key)
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
            return file

    @contextmanager
    def _deleting(self, key: BatchKey, file: BatchFile) -> Iterator[None]:
        """Deletes a file that turns out to be torn, unless another is in its place by now."""
        try:
            yield
        except TornError as torn:
            path = self._path(key)
            with self._files_lock, suppress(FileNotFoundError):
                self._files.pop(key, None)
                if file.is_at(path):
                    path.unlink()
            raise BatchMissingError(key, str(torn)) from None


class CiphertextCache(StoredCiphertexts):
    """Stores mini-batches, and keeps some in memory: the first that fit.

    Not the ones used last: passes over the data come back to each in turn, and would find each just thrown out. It is a
    lever of a `Governor`. One process writes to a folder; it may do so from any threads.

    Args:
        folder: of the files; it is made.
        budget_mb: MB of mini-batches to keep in memory.
        width: columns of a block, a power of two; an array's N where that is smaller.

    Raises:
        ValueError: the width is no power of two.
    """

    name = "cached ciphertexts"
    order = int(Order.CACHE)
    needs_permission = False
    immediate = True

    def __init__(self, folder: Path, budget_mb: float = 0.0, width: int = 1024) -> None:
        super().__init__(folder)
        if width < 1 or width & (width - 1):
            raise ValueError(f"width = {width}: must be a power of two")
        self._width = width
        self._budget = self._allowed = int(budget_mb * MB)
        self._lock = threading.RLock()
        self._kept: dict[BatchKey, mmap.mmap] = {}
        self._dropped: list[BatchKey] = []
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(
            f"*/*{UNFINISHED}"
        ):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)

    @property
    def kept_mb(self) -> float:
        """MB that are in memory now."""
        with self._lock:
            return sum(map(len, self._kept.values())) / MB

    @property
    def returns_mb(self) -> float:
        """MB of what was dropped and would be kept again."""
        with self._lock:
            paths = [self._path(key) for key in self._dropped]
        return sum(path.stat().st_size for path in paths if path.exists()) / MB

    def put(self, key: BatchKey, residues: Residues) -> None:
        """Stores a mini-batch, in place of what was there, and keeps it in memory if the budget allows.

        Args:
            key: which.
            residues: (d, 2, primes, N) uint64, N a power of two.

        Raises:
            ValueError: another shape or dtype.
            OSError: the disk is full, or can't be written to; what was there before still is.
        """
        if residues.ndim != 4 or residues.dtype != np.uint64 or 0 in residues.shape:
            raise ValueError(f"residues are {residues.dtype} {residues.shape}: not of a mini-batch")
        columns = residues.shape[3]
        width = min(self._width, columns)
        if columns % width:
            raise ValueError(f"{columns} columns are no multiple of a block's {width}")
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        store_batch(path, residues, width)
        with self._lock:
            self._release(key)
            self.keep(key)

    def keep(self, key: BatchKey) -> bool:
        """Keeps a stored mini-batch in memory; False where the budget is used up.

        Raises:
            BatchMissingError: it isn't there.
        """
        with self._lock:
            if key in self._kept:
                return True
            file = self._file(key)
            if sum(map(len, self._kept.values())) + file.size > self._allowed:
                return False
            with self._deleting(key, file):
                self._kept[key] = file.mapped()
            return True

    def remove(self, key: BatchKey) -> None:
        """Deletes a mini-batch, in memory and on disk; nothing where it isn't there."""
        with self._lock:
            self._release(key)
            self._dropped = [other for other in self._dropped if other != key]
        with self._files_lock:
            self._files.pop(key, None)
        self._path(key).unlink(missing_ok=True)

    def forget(self, owner: str) -> None:
        """Deletes all of an owner's mini-batches, in memory and on disk."""
        folder = self._path(BatchKey(owner, 0)).parent
        with self._lock:
            for key in [key for key in self._kept if key.owner == owner]:
                self._release(key)
            self._dropped = [key for key in self._dropped if key.owner != owner]
        with self._files_lock:
            for key in [key for key in self._files if key.owner == owner]:
                del self._files[key]
        for path in folder.glob("*.npy"):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()

    def shed(self) -> bool:
        """Lets all of them go, on disk they stay; False where none was in memory. None is kept until `restore`."""
        with self._lock:
            if not self._kept:
                return False
            self._allowed = 0
            self._dropped = list(self._kept)
            for key in self._dropped:
                self._release(key)
                with suppress(BatchMissingError):
                    self._file(key).drop_pages()
            return True

    def restore(self) -> bool:
        """Keeps again what was let go, as far as it is still there; False where nothing was."""
        with self._lock:
            self._allowed, dropped = self._budget, self._dropped
            self._dropped = []
            for key in dropped:
                with suppress(BatchMissingError):
                    self.keep(key)
            return bool(dropped)

    def close(self) -> None:
        """Lets go of all memory and files; what is on disk stays."""
        with self._lock, self._files_lock:
            for key in list(self._kept):
                self._release(key)
            self._dropped.clear()
            self._files.clear()

    def _release(self, key: BatchKey) -> None:
        mapped = self._kept.pop(key, None)
        if mapped is not None:
            mapped.close()
