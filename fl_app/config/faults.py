"""What is wrong with a configuration, said so that it can be mended: every fault at once, each with its place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_WIDEST = 48
"""Left column of a refusal at its widest, in characters; longer entries push their message to the right."""


class _Absent:
    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Any = _Absent()
"""Stands for a value that is not there, where None is a value."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        path: dotted path of the key, or the override itself where no key could be read from it.
        message: what would be right, a clause without a full stop.
        value: the value that is refused, `ABSENT` where the key itself is the matter.
    """

    path: str
    message: str
    value: Any = ABSENT

    @property
    def place(self) -> str:
        """The path, with the value where there is one."""
        return self.path if self.value is ABSENT else f"{self.path} = {shown(self.value)}"


class ConfigError(ValueError):
    """A configuration that is refused.

    Attributes:
        faults: all that is wrong, at least one.
    """

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        if not self.faults:
            raise ValueError("a refusal needs a fault")
        super().__init__(_table(self.faults))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Fault, ...]]]:
        return type(self), (self.faults,)


def _table(faults: Sequence[Fault]) -> str:
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    width = min(_WIDEST, max(len(fault.place) for fault in faults))
    rows = (f"  {fault.place:<{width}}  {fault.message}" for fault in faults)
    return "\n".join([f"configuration refused, {count}:", *rows])


def by_cause(faults: Sequence[Fault], keys: Sequence[str]) -> list[Fault]:
    """In the order of the overrides that caused them; those that no override caused come last.

    Args:
        faults: in any order.
        keys: what each override sets, as dotted paths.
    """

    def rank(fault: Fault) -> int:
        related = [
            key
            for key in keys
            if f"{fault.path}.".startswith(f"{key}.") or key.startswith(f"{fault.path}.")
        ]
        return keys.index(max(related, key=len)) if related else len(keys)

    return sorted(faults, key=rank)


def shown(value: Any) -> str:
    """A value as the user would write it: null, true, bare text; shortened in the middle when it is long."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(map(shown, value)) + "]"
    else:
        text = str(value)
    if not text or not text.isprintable():
        text = repr(text)
    return text if len(text) <= 60 else f"{text[:40]}…{text[-15:]}"


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known word that is most like `word` (case does not count), None when none is near.

    Args:
        word: what was written.
        known: what could have been meant.
        cutoff: least likeness, from 0 (anything) to 1 (the same), by `difflib`'s ratio.
    """
    folded = {item.casefold(): item for item in sorted(known)}
    found = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=cutoff)
    return folded[found[0]] if found else None


def unknown_choice(path: str, value: str, choices: Sequence[str]) -> Fault:
    """The fault of a word that is not among the `choices`, with the nearest of them."""
    guess = nearest(value, choices)
    hint = f"; did you mean {guess}?" if guess else ""
    return Fault(path, f"unknown choice{hint} (choices: {', '.join(choices)})", value)


def unknown_key(
    path: str, known: Iterable[str], everywhere: Iterable[str] = (), leaf: str = ""
) -> Fault:
    """The fault of a key that nothing reads.

    Args:
        path: dotted path of the key.
        known: names that are known at the same place.
        everywhere: dotted paths that are known at any place.
        leaf: what was set under the key, as a dotted path; the key itself by default.
    """
    parent, _, word = path.rpartition(".")
    leaf = leaf or path
    known = sorted(known)
    guess = nearest(word, known)
    if guess:
        mend = f"{parent + '.' if parent else ''}{guess}{leaf.removeprefix(path)}"
        return Fault(leaf, f"unknown key; did you mean {mend}?")
    hint = _elsewhere(leaf, [item for item in everywhere if item != leaf])
    if hint and not parent:
        return Fault(leaf, f"unknown key{hint}")
    takes = f"takes {', '.join(known)}" if known else "takes no keys"
    return Fault(leaf, f"unknown key{hint} ({parent or 'the top level'} {takes})")


def _elsewhere(leaf: str, known: Sequence[str]) -> str:
    """A hint at keys of the same or nearly the same name at other places; empty where there are none."""
    last = leaf.rpartition(".")[2]
    names = {item.rpartition(".")[2] for item in known}
    meant = last if last in names else nearest(last, names, cutoff=0.8)
    same = sorted(item for item in known if item.rpartition(".")[2] == meant)
    return f"; did you mean {' or '.join(same[:3])}?" if same else ""
