"""Runs into groups by some keys of their configuration, and the replicates of one matched with those of another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fl_app.config.faults import ConfigError, Fault, nearest
from fl_app.report.collect import BESIDE, Run, Scalar, canonical
from fl_app.report.text import said

REPLICATES = ("seed", "task.fold")
"""Keys that tell replicates apart, by which they are matched."""

_FIRST = ("strategy", "task")
_UNNAMED = 12
"""Keys that a refusal lists."""


@dataclass(frozen=True)
class Group:
    """Runs that agree in some keys.

    Attributes:
        values: of these keys, in their order.
        runs: at least one, sorted by name.
    """

    values: tuple[Scalar, ...]
    runs: tuple[Run, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The values as text."""
        return tuple(map(said, self.values))


def varying(runs: Iterable[Run]) -> list[str]:
    """The keys that runs differ in, `strategy` and `task` first, then in the order of the configuration."""
    runs = list(runs)
    keys = dict.fromkeys([*_FIRST, *(key for run in runs for key in run.config)])
    return [key for key in keys if key not in BESIDE and len({_of(run, [key]) for run in runs}) > 1]


def default_keys(runs: Sequence[Run]) -> list[str]:
    """The keys that tell settings apart: those that differ, without the replicates' and those that follow from others.

    Which client a strategy trains with follows from the strategy, and is no second key.
    """
    chosen: list[str] = []
    for key in varying(runs):
        classes = len({_of(run, chosen) for run in runs})
        if key not in REPLICATES and len({_of(run, [*chosen, key]) for run in runs}) > classes:
            chosen.append(key)
    return chosen or ["strategy"]


def check_keys(by: Sequence[str], runs: Sequence[Run]) -> None:
    """Refuses keys that no run has.

    Raises:
        ConfigError: there is such a key.
    """
    known = {key for run in runs for key in run.config}
    different = varying(runs)
    faults = []
    for key in dict.fromkeys(by):
        if key not in known:
            guess = nearest(key, known)
            hint = f"; did you mean {guess}?" if guess else ""
            rest = ", …" if len(different) > _UNNAMED else ""
            among = (
                f" (runs differ in {', '.join(different[:_UNNAMED])}{rest})" if different else ""
            )
            faults.append(Fault("--by", f"no run has this key{hint}{among}", key))
    if faults:
        raise ConfigError(faults)


def grouped(runs: Sequence[Run], by: Sequence[str]) -> list[Group]:
    """The groups, sorted by their values: none, false, true, numbers, texts."""
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(_of(run, by), []).append(run)
    groups = [
        Group(tuple(members[0].config.get(key) for key in by), tuple(members))
        for members in found.values()
    ]
    return sorted(groups, key=lambda group: [_rank(value) for value in group.values])


def matched(group: Group, baseline: Group, by: Sequence[str]) -> tuple[list[tuple[Run, Run]], str]:
    """The replicates of a group with those of another that agree in seed, fold and all else that varies within either.

    Returns:
        Pairs (run of the group, run of the baseline), each run at most once; and why there are none, empty where there
        are.
    """
    mine, theirs = varying(group.runs), varying(baseline.runs)
    keys = [key for key in dict.fromkeys([*REPLICATES, *mine, *theirs]) if key not in by]
    # Within a group no two runs agree in all of these: collecting has left duplicates out.
    there = {_of(run, keys): run for run in baseline.runs}
    pairs = [(run, there[of]) for run in group.runs if (of := _of(run, keys)) in there]
    if pairs:
        return pairs, ""
    lopsided = [key for key in keys if key not in REPLICATES and (key in mine) != (key in theirs)]
    if lopsided:
        return [], f"{', '.join(lopsided)} varies within one of the two only: add it to --by"
    told = [key for key in keys if key in mine or key in theirs or key == "seed"]
    return [], f"no two of them agree in {', '.join(told)}"


def _of(run: Run, keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(canonical(run.config.get(key)) for key in keys)


def _rank(value: Scalar) -> tuple[int, float, str]:
    if value is None:
        return 0, 0.0, ""
    if isinstance(value, bool):
        return 1, float(value), ""
    if isinstance(value, int | float):
        return 2, float(value), ""
    return 3, 0.0, value
