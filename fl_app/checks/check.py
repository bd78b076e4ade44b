"""A check, what it found, and a list of them run in order.

`trellis doctor` and `trellis preflight` are lists of checks. Each says in a line what it found and, where that is no
good, in another how to mend it. One that fails stops no other, but for those that need it: these are skipped, and say
for whose sake. An exception within a check is a finding, too. Nothing here knows what is checked, or how it is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fl_app.config.faults import ConfigError
from strategies.contract import ContractError

State = Literal["ok", "warning", "failed", "skipped"]

_GRAVITY: dict[State, int] = {"skipped": 0, "ok": 1, "warning": 2, "failed": 3}


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        state: `failed` is a no-go; a `warning` is to be read.
        said: what was found, with its figures.
        mend: what to do about it; empty where nothing has to be done.
    """

    state: State
    said: str
    mend: str = ""


@dataclass(frozen=True)
class Check:
    """Something to be looked at.

    Attributes:
        name: in a word or two; unique in a list.
        run: looks, and says what it found.
        needs: names of checks before it that must not have failed, or have been skipped.
    """

    name: str
    run: Callable[[], Finding]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checked:
    """A check that is over."""

    name: str
    finding: Finding


def conduct(
    checks: Sequence[Check], told: Callable[[Checked], None] = lambda checked: None
) -> list[Checked]:
    """Runs checks in their order.

    Args:
        checks: each behind those that it needs.
        told: of each as soon as it is over.

    Raises:
        ValueError: a check needs one that does not stand before it.
    """
    done: dict[str, Checked] = {}
    cause: dict[str, str] = {}
    for check in checks:
        if absent := [name for name in check.needs if name not in done]:
            raise ValueError(f"check {check.name!r} needs {absent[0]!r}, which is not before it")
        missing = [name for name in check.needs if name in cause]
        if missing:
            root = cause[missing[0]]
            finding = Finding("skipped", f"for want of {root!r}, which {_became(done[root])}")
        else:
            finding = _looked(check)
        if finding.state in ("failed", "skipped"):
            cause[check.name] = cause[missing[0]] if missing else check.name
        done[check.name] = Checked(check.name, finding)
        told(done[check.name])
    return list(done.values())


def passed(checked: Iterable[Checked]) -> bool:
    """Whether nothing has failed."""
    return all(one.finding.state != "failed" for one in checked)


def together(findings: Sequence[Finding]) -> Finding:
    """Several findings of one check as one: the gravest state, all that was said, and the mends of what is no good."""
    worst = max(findings, key=lambda finding: _GRAVITY[finding.state])
    mends = dict.fromkeys(finding.mend for finding in findings if finding.mend)
    return Finding(worst.state, "; ".join(f.said for f in findings), "; ".join(mends))


def _became(checked: Checked) -> str:
    return "was skipped" if checked.finding.state == "skipped" else "failed"


def _looked(check: Check) -> Finding:
    try:
        return check.run()
    except ConfigError as error:
        if isinstance(error.__cause__, ContractError):
            return _clash(error.__cause__)
        said = "; ".join(f"{fault.place}: {fault.message}" for fault in error.faults)
        return Finding("failed", said, f"as it says; the setting is {error.faults[0].path}")
    except ContractError as error:
        return _clash(error)
    except MemoryError as error:
        return Finding("failed", f"out of memory: {error}".rstrip(": "), "free memory, or ask less")
    except Exception as error:  # a task or a model of the user's own raises what it likes
        return Finding("failed", f"{type(error).__name__}: {error}", "")


def _clash(error: ContractError) -> Finding:
    """Two parts that may not be composed."""
    said = f"{error.second} cannot be composed with {error.first}: {error.why}"
    return Finding("failed", said, error.instead)
