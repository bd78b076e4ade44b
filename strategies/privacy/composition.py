"""What all accountants share: their interface, the releases that they have composed, and the state of these.

Each counts equal releases once, refuses those of another neighbouring relation, and claims no more sampling than there
is a theorem for. What many releases come to is each accountant's own affair (`pld.py`, `rdp.py`, `prv.py`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Protocol, Self, get_args

from strategies.privacy.events import (
    GaussianRelease,
    LatticeRelease,
    Relation,
    Release,
    release_from_data,
    release_to_data,
)
from strategies.state import State, Value, mapping_in


class Accountant(Protocol):
    """Composes releases under one neighbouring relation."""

    @property
    def name(self) -> str:
        """Which accountant it is: `pld`, `rdp` or `prv`."""
        ...

    @property
    def relation(self) -> Relation:
        """The neighbouring relation that its guarantee is for."""
        ...

    @property
    def releases(self) -> list[tuple[Release, int]]:
        """What was composed: each release once, with how often it was made."""
        ...

    def step(self, release: Release, count: int = 1) -> None:
        """Composes `count` equal releases; raises `ValueError` for what it can't account for."""
        ...

    def epsilon(self, delta: float) -> float:
        """An upper bound of the ε of all releases at δ in (0, 1); infinite where none is known."""
        ...

    def delta(self, epsilon: float) -> float:
        """An upper bound of the δ of all releases at ε ≥ 0."""
        ...

    def fork(self) -> Self:
        """An accountant of its own with the same releases, to ask what a further one would cost."""
        ...

    def state_dict(self) -> State:
        """What was composed, as plain data."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Takes up a state in place of its own; raises `ValueError` where it is another accountant's."""
        ...


class Composition:
    """What accountants share: the releases with their counts, and the state.

    Attributes:
        name: of the accountant.
        relation: of its guarantee, and of all its releases.
    """

    name: str

    def __init__(self, relation: Relation) -> None:
        if relation not in get_args(Relation):
            raise ValueError(
                f"relation = {relation!r}: choose one of {', '.join(get_args(Relation))}"
            )
        self.relation: Relation = relation
        self._counts: dict[Release, int] = {}

    @property
    def releases(self) -> list[tuple[Release, int]]:
        """Each release once, with how often it was made."""
        return list(self._counts.items())

    def step(self, release: Release, count: int = 1) -> None:
        """Composes `count` equal releases.

        Args:
            release: under the accountant's own relation.
            count: at least 1.

        Raises:
            ValueError: the release is of another relation, or of a kind that the accountant doesn't know.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count = {count!r}: a release is made a whole number of times")
        if not isinstance(release, GaussianRelease | LatticeRelease):
            raise ValueError(f"no accountant knows the cost of {release!r}")
        if release.relation != self.relation:
            raise ValueError(
                f"a release under {release.relation!r} can't be composed under {self.relation!r}: its sensitivity is"
                f" another"
            )
        self._compose(claimed(release), count)
        self._counts[release] = self._counts.get(release, 0) + count

    def fork(self) -> Self:
        """An accountant of its own with the same releases."""
        other = copy.copy(self)
        other._counts = dict(self._counts)
        return other

    def state_dict(self) -> State:
        """The accountant's name, its relation, and the releases with their counts."""
        releases: dict[str, Value] = {
            str(number): {**release_to_data(release), "count": count}
            for number, (release, count) in enumerate(self._counts.items())
        }
        return {"accountant": self.name, "relation": self.relation, "releases": releases}

    def load_state_dict(self, state: State) -> None:
        """Takes up a state in place of its own.

        Raises:
            ValueError: it is of another accountant or relation, or holds a release of an unknown kind; the accountant
                is then as it was.
        """
        for key, own in (("accountant", self.name), ("relation", self.relation)):
            if state.get(key) != own:
                raise ValueError(
                    f"a state with {key} {state.get(key)!r} can't be taken up by {own!r}"
                )
        fresh = type(self)(self.relation)
        for entry in mapping_in(state, "releases").values():
            if not isinstance(entry, Mapping):
                raise ValueError(f"the state holds {entry!r} in place of a release")
            count = entry.get("count")
            if not isinstance(count, int):
                raise ValueError(f"the state's release was made {count!r} times")
            data = {key: value for key, value in entry.items() if key != "count"}
            fresh.step(release_from_data(data), count)
        self.__dict__.update(fresh.__dict__)

    def _compose(self, release: Release, count: int) -> None:
        """Adds to the whole; raises `ValueError`, and then changes nothing, where it can't.

        Args:
            release: with no more sampling than can be claimed.
            count: at least 1.
        """
        raise NotImplementedError


def claimed(release: Release) -> Release:
    """The release with such sampling as any accountant has a theorem for; without it, the release costs no less.

    Poisson's coins amplify where neighbours differ by one who is there or not, cohorts of a fixed size where one is
    replaced. Elsewhere, given the coins or the cohort, one unit still changes no more than it would without sampling.
    """
    if not isinstance(release, GaussianRelease) or release.sampling == "none":
        return release
    needed = "add_or_remove_one" if release.sampling == "poisson" else "replace_one"
    if release.relation != needed or release.rate == 1.0:
        return GaussianRelease(release.noise_multiplier, relation=release.relation)
    return release


def require_delta(delta: float) -> None:
    """Raises `ValueError` unless δ lies strictly between 0 and 1."""
    if not 0 < delta < 1:
        raise ValueError(f"delta = {delta!r}: must lie between 0 and 1")


def require_epsilon(epsilon: float) -> None:
    """Raises `ValueError` unless ε is at least 0 and finite."""
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon = {epsilon!r}: must be at least 0")
