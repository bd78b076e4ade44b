"""Every run below a folder, and why any of them can't be counted. What is read is hostile until it is checked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Le
from pydantic import BaseModel, ValidationError

from fl_app.config.faults import ConfigError, Fault
from fl_app.config.identity import BESIDE_IDENTITY
from fl_app.report.text import one_line
from fl_app.services.summary import NAME
from fl_app.sweep.record import NAME as SWEEP
from fl_app.sweep.record import Entry, read_record

Scalar = None | bool | int | float | str

BESIDE = frozenset(BESIDE_IDENTITY) - {"rounds"}
"""Keys that make no difference to what a run comes to."""

_LARGEST_SUMMARY, _LARGEST_CONFIG = 64 * 2**20, 2**18
_MOST_KEYS, _DEEPEST = 2000, 32
_LARGEST_FIGURE = 1e100
"""Nothing that is measured is larger, and sums and squares stay finite."""


@dataclass(frozen=True)
class Run:
    """A run that completed.

    Attributes:
        name: its folder, as counted from the one that was searched.
        config: dotted key to value; a part's own key holds its class's name, a list its JSON.
        final: figures of the last evaluation.
        history: figures by round, rounds rising.
        upload_bytes: in all.
        download_bytes: in all.
        seconds: wall time.
    """

    name: str
    config: Mapping[str, Scalar]
    final: Mapping[str, float]
    history: Sequence[tuple[int, Mapping[str, float]]]
    upload_bytes: int
    download_bytes: int
    seconds: float


@dataclass(frozen=True)
class LeftOut:
    """A run that is not counted.

    Attributes:
        name: its folder.
        status: `failed`, `stopped`, `running`, `waiting`, `unreadable`, `duplicate` or `unmeasured`.
        reason: why.
    """

    name: str
    status: str
    reason: str


@dataclass(frozen=True)
class Collection:
    """What a folder holds.

    Attributes:
        root: absolute.
        runs: completed ones, sorted by name, each configuration once.
        left_out: all others, sorted by name.
    """

    root: Path
    runs: tuple[Run, ...]
    left_out: tuple[LeftOut, ...]


_Whole = Annotated[int, Ge(0), Le(2**63)]


class _Totals(BaseModel):
    upload_bytes: _Whole
    download_bytes: _Whole
    wall_seconds: Annotated[float, Ge(0), Le(1e12)]


class _Summary(BaseModel):
    status: Literal["running", "completed", "failed", "stopped"]
    reason: str
    strategy: str
    task: str
    seed: _Whole
    final: dict[str, Any]
    history: list[dict[str, Any]]
    totals: _Totals


def collect(root: Path) -> Collection:
    """Reads every summary, the configuration beside it, and every sweep's record below a folder.

    Raises:
        ConfigError: there is no such folder, or no run in it.
    """
    root = root.expanduser().resolve()
    if not root.is_dir():
        raise ConfigError([Fault("DIR", "there is no such folder", str(root))])
    runs: dict[str, Run] = {}
    left: dict[str, LeftOut] = {}
    entries: dict[str, Entry] = {}
    for folder, names in _walk(root):
        name = _name(folder, root)
        if NAME in names:
            found = _read(folder, name)
            if isinstance(found, Run):
                runs[name] = found
            else:
                left[name] = found
        if SWEEP in names:
            try:
                for entry in read_record(folder / SWEEP).values():
                    entries[_name(folder / entry.folder, root)] = entry
            except (OSError, ValueError) as error:
                path = _name(folder / SWEEP, root)
                left[path] = LeftOut(path, "unreadable", one_line(str(error)))
    if not runs and not left and not entries:
        told = (
            f"holds no run: no {NAME} is in it nor below it; name the output_dir of runs (trellis run writes to "
            "runs/ where nothing else is said)"
        )
        raise ConfigError([Fault("DIR", told, str(root))])
    for name, entry in entries.items():
        _reconcile(name, entry, runs, left)
    kept, twice = _without_duplicates([runs[name] for name in sorted(runs)])
    others = sorted([*left.values(), *twice], key=lambda item: item.name)
    return Collection(root, tuple(kept), tuple(others))


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    for folder, folders, names in os.walk(root):
        folders.sort()
        yield Path(folder), names


def _name(path: Path, root: Path) -> str:
    return one_line(str(path.relative_to(root)))


def _reconcile(name: str, entry: Entry, runs: Mapping[str, Run], left: dict[str, LeftOut]) -> None:
    """What a sweep knows of a job that the job's folder doesn't tell."""
    if name in runs:
        return
    there = left.get(name)
    reason = one_line(entry.reason)
    if there is None:
        told = {
            "completed": "its summary is gone",
            "waiting": "its sweep has not started it",
            "running": "it has not written a summary yet",
        }.get(entry.status, "it left no summary")
        left[name] = LeftOut(name, entry.status, reason or told)
    elif there.status == "running" and entry.status in ("failed", "stopped"):
        left[name] = LeftOut(name, entry.status, reason)


def _read(folder: Path, name: str) -> Run | LeftOut:
    """A run, or why it can't be counted."""
    try:
        summary = _summary(_bytes(folder / NAME, _LARGEST_SUMMARY))
        config = _config(_bytes(folder / "config.yaml", _LARGEST_CONFIG))
    except (OSError, ValueError) as error:
        told = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
        return LeftOut(name, "unreadable", one_line(told))
    if summary.status == "running":
        told = "it has not ended, or was killed before it could say so"
        return LeftOut(name, "running", f"{told}; {len(summary.history)} rounds are there")
    if summary.status != "completed":
        return LeftOut(name, summary.status, one_line(summary.reason) or "no reason given")
    config |= {"strategy": summary.strategy, "task": summary.task, "seed": summary.seed}
    return Run(
        name=name,
        config=config,
        final=_figures(summary.final),
        history=_history(summary.history),
        upload_bytes=summary.totals.upload_bytes,
        download_bytes=summary.totals.download_bytes,
        seconds=summary.totals.wall_seconds,
    )


def _bytes(path: Path, largest: int) -> bytes:
    if not path.is_file():  # a pipe of that name would never end
        raise ValueError(f"there is no {path.name}")
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"{path.name} is larger than {largest // 1024} kB")
    return data


def _summary(data: bytes) -> _Summary:
    try:
        return _Summary.model_validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        told = f"{place}: {first['msg']}" if place else first["msg"]
        raise ValueError(f"{NAME} is not a run's: {told}") from error


def _config(data: bytes) -> dict[str, Scalar]:
    try:
        content = yaml.safe_load(data.decode())
    except (UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"config.yaml can't be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError("config.yaml holds no keys")
    leaves = _Leaves()
    leaves.add(content, "")
    return leaves.found


class _Leaves:
    """The leaves of a tree by dotted key. Aliases of YAML can make a small file's tree a vast one."""

    def __init__(self) -> None:
        self.found: dict[str, Scalar] = {}
        self._visited = 0

    def add(self, value: Any, path: str, depth: int = 0) -> None:
        """Adds those of a value.

        Raises:
            ValueError: they are too many, or too deep.
        """
        self._visit(depth)
        if not isinstance(value, dict):
            self.found[path] = self._leaf(value, depth)
            return
        target = value.get("_target_")
        if isinstance(target, str):
            self.found[path] = target.rpartition(".")[2]
        for key, item in value.items():
            if key != "_target_":
                self.add(item, f"{path}.{key}" if path else str(key), depth + 1)

    def _leaf(self, value: Any, depth: int) -> Scalar:
        if isinstance(value, list | dict):
            return json.dumps(self._plain(value, depth))
        if isinstance(value, int | float) and not abs(value) <= _LARGEST_FIGURE:
            return str(value)
        return value if isinstance(value, Scalar) else str(value)

    def _plain(self, value: Any, depth: int) -> Any:
        self._visit(depth)
        if isinstance(value, dict):
            return {str(key): self._plain(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list):
            return [self._plain(item, depth + 1) for item in value]
        return self._leaf(value, depth)

    def _visit(self, depth: int) -> None:
        self._visited += 1
        if depth > _DEEPEST or self._visited > _MOST_KEYS:
            raise ValueError(f"config.yaml is deeper than {_DEEPEST} or has over {_MOST_KEYS} keys")


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The measured figures of a row."""
    return {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= _LARGEST_FIGURE
    }


def _history(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, dict[str, float]], ...]:
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        number = row.get("round")
        if isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= 10**9:
            found[number] = _figures(row)
    return tuple(sorted(found.items()))


def canonical(value: Scalar) -> str:
    """The same text for the same value; 1 and 1.0 are the same, 1 and true are not."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(int(value)) if value == int(value) else repr(value)
    return json.dumps(value)


def _without_duplicates(runs: Sequence[Run]) -> tuple[list[Run], list[LeftOut]]:
    """Each configuration once: the same run twice is one figure, not two."""
    first: dict[str, Run] = {}
    twice = []
    for run in runs:
        identity = {
            key: canonical(value)
            for key, value in run.config.items()
            if key not in BESIDE and value is not None
        }
        text = json.dumps(identity, sort_keys=True)
        if text in first:
            told = f"the same configuration as {first[text].name}, counted there"
            twice.append(LeftOut(run.name, "duplicate", told))
        else:
            first[text] = run
    return list(first.values()), twice


def unmeasured(collection: Collection, metric: str) -> Collection:
    """The same with the runs that have no figure for a metric left out."""
    told = f"it has no {metric}"
    have = tuple(run for run in collection.runs if metric in run.final)
    others = [
        LeftOut(run.name, "unmeasured", told) for run in collection.runs if metric not in run.final
    ]
    left = sorted([*collection.left_out, *others], key=lambda item: item.name)
    return replace(collection, runs=have, left_out=tuple(left))
