"""What a report says: each group's figures, and its difference from the baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fl_app.config.faults import ConfigError, Fault, nearest
from fl_app.report.collect import Collection, Run, canonical, unmeasured
from fl_app.report.grouping import (
    REPLICATES,
    Group,
    check_keys,
    default_keys,
    grouped,
    matched,
    varying,
)
from fl_app.report.statistics import Difference, Estimate, estimate, paired
from fl_app.report.text import said

_LOWER_IS_BETTER = ("loss", "error", "perplexity", "seconds", "backdoor", "label_flip")
_NAMED = 20
"""Values that a refusal lists."""


@dataclass(frozen=True)
class Row:
    """A group's figures.

    Attributes:
        group: whose.
        metric: of the last evaluation.
        rounds: to the target, over the runs that reached it; None without a target.
        upload: bytes.
        download: bytes.
        seconds: wall time.
        baseline: the group that it is held against; None where it is one itself, or there is none.
        difference: from the baseline's replicates; None without a baseline.
        unmatched: why no replicate has a partner, empty where some have.
    """

    group: Group
    metric: Estimate
    rounds: Estimate | None
    upload: Estimate
    download: Estimate
    seconds: Estimate
    baseline: Group | None = None
    difference: Difference | None = None
    unmatched: str = ""


@dataclass(frozen=True)
class Report:
    """All of it.

    Attributes:
        collection: the runs, those without the metric left out.
        metric: its name.
        by: the keys of the groups.
        target: value of the metric that rounds are counted to; None for no such count.
        rows: one a group.
        along: keys that differ between groups beside `by`, never within one.
        within: keys that differ within groups, replicates' own left out.
    """

    collection: Collection
    metric: str
    by: tuple[str, ...]
    target: float | None
    rows: tuple[Row, ...]
    along: tuple[str, ...]
    within: tuple[str, ...]

    @property
    def lower_is_better(self) -> bool:
        """Whether a target is reached from above."""
        return lower_is_better(self.metric)


def lower_is_better(metric: str) -> bool:
    """Whether a metric is an error rather than a success, judged by its name."""
    return any(word in metric for word in _LOWER_IS_BETTER)


def analyse(
    collection: Collection,
    *,
    by: Sequence[str] = (),
    metric: str = "accuracy",
    baseline: Sequence[str] = (),
    target: float | None = None,
) -> Report:
    """Groups the runs and compares them.

    Args:
        collection: what was found.
        by: keys of the groups; by default those that tell settings apart.
        metric: a figure of the runs' last evaluation.
        baseline: `key=value` or a bare value, for some or all of the keys; by default the first group.
        target: the value of the metric that rounds are counted to.

    Raises:
        ConfigError: no run has the metric or one of the keys, or the baseline names no group.
    """
    _check_metric(collection.runs, metric)
    collection = unmeasured(collection, metric)
    runs = collection.runs
    keys = tuple(dict.fromkeys(by)) or tuple(default_keys(runs))
    if runs:
        check_keys(keys, runs)
    groups = grouped(runs, keys)
    rows = [_row(group, metric, target) for group in groups]
    if groups:
        held_against = _baselines(groups, keys, baseline)
        rows = [
            _compared(row, held_against(row.group), keys, metric) if len(groups) > 1 else row
            for row in rows
        ]
    others = [key for key in varying(runs) if key not in keys and key not in REPLICATES]
    within = {key for group in groups for key in varying(group.runs)}
    return Report(
        collection=collection,
        metric=metric,
        by=keys,
        target=target,
        rows=tuple(rows),
        along=tuple(key for key in others if key not in within),
        within=tuple(key for key in others if key in within),
    )


def _check_metric(runs: Sequence[Run], metric: str) -> None:
    known = sorted({name for run in runs for name in run.final})
    if runs and metric not in known:
        guess = nearest(metric, known)
        hint = f"; did you mean {guess}?" if guess else ""
        told = f"there are {', '.join(known)}" if known else "none was ever evaluated"
        raise ConfigError([Fault("--metric", f"no run has this figure{hint} ({told})", metric)])


def _row(group: Group, metric: str, target: float | None) -> Row:
    runs = group.runs
    reached = None
    if target is not None:
        counts = [rounds_to(run, metric, target) for run in runs]
        reached = estimate([count for count in counts if count is not None])
    return Row(
        group=group,
        metric=estimate([run.final[metric] for run in runs]),
        rounds=reached,
        upload=estimate([run.upload_bytes for run in runs]),
        download=estimate([run.download_bytes for run in runs]),
        seconds=estimate([run.seconds for run in runs]),
    )


def rounds_to(run: Run, metric: str, target: float) -> int | None:
    """The first round whose figure is as good as the target; None where none is."""
    for number, figures in run.history:
        value = figures.get(metric)
        if value is not None and (value <= target if lower_is_better(metric) else value >= target):
            return number
    return None


def _compared(row: Row, baseline: Group | None, by: Sequence[str], metric: str) -> Row:
    if baseline is None or baseline is row.group:
        return row
    pairs, unmatched = matched(row.group, baseline, by)
    difference = paired([(mine.final[metric], theirs.final[metric]) for mine, theirs in pairs])
    return replace(row, baseline=baseline, difference=difference, unmatched=unmatched)


def _baselines(
    groups: Sequence[Group], keys: Sequence[str], written: Sequence[str]
) -> Callable[[Group], Group | None]:
    """Gives the group that a group is held against.

    With some of the keys in the baseline, it is the group that agrees with one's own in the others.

    Raises:
        ConfigError: no group is meant.
    """
    if not written:
        return lambda group: groups[0]
    wanted = dict(_condition(condition, groups, keys) for condition in written)
    known = {tuple(map(canonical, group.values)): group for group in groups}
    if not any(all(place[at] == value for at, value in wanted.items()) for place in known):
        raise ConfigError([Fault("--baseline", "no group is all of this", list(written))])

    def held_against(group: Group) -> Group | None:
        own = map(canonical, group.values)
        return known.get(tuple(wanted.get(at, value) for at, value in enumerate(own)))

    return held_against


def _condition(text: str, groups: Sequence[Group], keys: Sequence[str]) -> tuple[int, str]:
    """Which key a condition is about, by its place, and the canonical value that it asks for."""
    name, equals, value = text.partition("=")
    named = bool(equals) and name in keys
    places = [keys.index(name)] if named else range(len(keys))
    found = [
        (place, meant)
        for place in places
        if (meant := _meant(value if named else text, groups, place)) is not None
    ]
    if len(found) > 1:
        told = f"may be any of {', '.join(keys[place] for place, _ in found)}: write KEY={text}"
        raise ConfigError([Fault("--baseline", told, text)])
    if not found:
        pairs = (zip(keys, group.labels, strict=True) for group in groups)
        there = sorted({f"{key}={label}" for pair in pairs for key, label in pair})
        told = f"no group is that (there are {', '.join(there[:_NAMED])})"
        raise ConfigError([Fault("--baseline", told, text)])
    return found[0]


def _meant(text: str, groups: Sequence[Group], place: int) -> str | None:
    """The groups' value that a text means, 0.1 by 1e-1 too; None where it means none of them."""
    values = [group.values[place] for group in groups]
    number = _number(text)
    for value in values:
        if text in (said(value), str(value)):
            return canonical(value)
    for value in values:
        if number is not None and not isinstance(value, bool) and number == value:
            return canonical(value)
    return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
