"""`sweep.json`: what became of every job, also of those that left no summary.

One file for all sweeps into the same folder, those that run at the same time too: each job has one entry, by the name
of its folder, and only entries of one's own jobs are written.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from fl_app.config.faults import ConfigError, Fault
from fl_app.config.schema import FolderName
from fl_app.services.files import write_atomically

NAME = "sweep.json"
_LARGEST = 64 * 2**20

Status = Literal["waiting", "running", "completed", "failed", "stopped"]


class Entry(BaseModel):
    """One job.

    Attributes:
        folder: name of its folder, beside the file.
        overrides: that it was composed of.
        status: `waiting` until it starts; `stopped` by the user or a guard.
        reason: why, where it did not complete.
        seconds: that its last process took, None before that.
        sweep: which invocation wrote the entry.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    folder: FolderName
    overrides: tuple[str, ...]
    status: Status
    reason: str = ""
    seconds: Annotated[float, Ge(0)] | None = None
    sweep: str


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal["trellis-sweep-1"] = "trellis-sweep-1"
    jobs: tuple[Entry, ...] = ()


def read_record(path: Path) -> dict[str, Entry]:
    """The entries of a file, by folder; none where there is no file.

    Raises:
        ValueError: it is not a sweep's record, with the reason.
        OSError: it can't be read.
    """
    if not path.exists():
        return {}
    if not path.is_file():
        raise ValueError("it is no regular file")  # a pipe of that name would never end
    with path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise ValueError(f"it is larger than {_LARGEST // 2**20} MB")
    try:
        jobs = _File.model_validate_json(data).jobs
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{place}: {first['msg']}") from error
    return {entry.folder: entry for entry in jobs}


class Record:
    """The file of a folder, written by one sweep among several.

    Args:
        output_dir: the folder, which is made where it is missing.

    Raises:
        ConfigError: the folder can't be written, or its sweep.json is not one.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / NAME
        self._sweep = uuid.uuid4().hex[:12]
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(output_dir / ".sweep.lock")
            with self._entries():
                pass
        except ValueError as error:
            told = f"{self.path} is no record of a sweep ({error}); move it away"
            raise ConfigError([Fault("output_dir", told)]) from error
        except OSError as error:
            told = f"{output_dir} can't be written ({error.strerror})"
            raise ConfigError([Fault("output_dir", told)]) from error

    def announce(self, jobs: Mapping[str, tuple[str, ...]]) -> None:
        """Enters jobs that are to run, folder to overrides; those that another sweep runs keep their entries.

        Raises:
            OSError: the file can't be written.
            ValueError: somebody else has made it unreadable.
        """
        with self._entries() as entries:
            for folder, overrides in jobs.items():
                there = entries.get(folder)
                if there is None or there.status != "running":
                    entries[folder] = self._entry(folder, overrides, "waiting", "", None)

    def note(
        self,
        folder: str,
        overrides: tuple[str, ...],
        status: Status,
        reason: str = "",
        seconds: float | None = None,
    ) -> None:
        """Enters how a job stands; of one that was complete before, the entry is left.

        Raises:
            OSError: the file can't be written.
            ValueError: somebody else has made it unreadable.
        """
        with self._entries() as entries:
            there = entries.get(folder)
            if seconds is None and there is not None and there.status == status == "completed":
                return
            entries[folder] = self._entry(folder, overrides, status, reason, seconds)

    def _entry(
        self,
        folder: str,
        overrides: tuple[str, ...],
        status: Status,
        reason: str,
        seconds: float | None,
    ) -> Entry:
        taken = None if seconds is None else round(seconds, 3)
        return Entry(
            folder=folder,
            overrides=tuple(map(_writable, overrides)),
            status=status,
            reason=_writable(reason),
            seconds=taken,
            sweep=self._sweep,
        )

    @contextmanager
    def _entries(self) -> Iterator[dict[str, Entry]]:
        """The entries, for this process alone; what was changed in them is written."""
        with self._lock:
            entries = read_record(self.path)
            before = dict(entries)
            yield entries
            if entries != before or not self.path.exists():
                text = _File(jobs=tuple(entries.values())).model_dump_json(indent=2)
                write_atomically(self.path, text.encode() + b"\n")


def _writable(text: str) -> str:
    """The text without what UTF-8 can't hold: bytes of an argument that were no letters."""
    return text.encode(errors="backslashreplace").decode()
