"""What many releases come to: the interface of accountants, their factory, and the noise that keeps to a budget.

An accountant is told of releases (`events.py`) and says for which (ε, δ) all of them together are differentially
private (Dwork, Rothblum & Vadhan 2010, "Boosting and Differential Privacy", §III), however each was chosen after those
before it. There are three:

* `pld`: privacy loss distributions, composed exactly up to rounding upwards (`pld.py`); the default.
* `rdp`: Rényi divergences, an upper bound that also knows integer noise and sampling without replacement (`rdp.py`).
* `prv`: privacy random variables as Opacus composes them (`prv.py`).

Each gives an upper bound. A release that an accountant has no theorem for is refused, never guessed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any, Literal, Protocol, Self, get_args

from strategies.privacy.events import GaussianRelease, LatticeRelease, Relation, Release
from strategies.state import State, Value, mapping_in

AccountantName = Literal["pld", "rdp", "prv"]

LEAST_NOISE, MOST_NOISE = 1e-2, 1e6
"""Between these `calibrate` looks for a noise multiplier."""

_KINDS: Mapping[str, type[GaussianRelease] | type[LatticeRelease]] = {
    "gaussian": GaussianRelease,
    "lattice": LatticeRelease,
}


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


def make_accountant(name: AccountantName, relation: Relation = "add_or_remove_one") -> Accountant:
    """A new accountant with nothing composed.

    Raises:
        ValueError: the name or the relation is not known.
    """
    if name == "pld":
        from strategies.privacy.pld import PLD

        return PLD(relation)
    if name == "rdp":
        from strategies.privacy.rdp import RDP

        return RDP(relation)
    if name == "prv":
        from strategies.privacy.prv import PRV

        return PRV(relation)
    raise ValueError(f"accountant = {name!r}: choose one of {', '.join(get_args(AccountantName))}")


def calibrate(
    accountant_name: AccountantName,
    target_epsilon: float,
    delta: float,
    plan: Callable[[float], Iterable[tuple[Release, int]]],
    *,
    tolerance: float = 0.01,
) -> float:
    """The least noise multiplier with which a plan keeps to a budget.

    Args:
        accountant_name: by whose account.
        target_epsilon: above 0.
        delta: in (0, 1).
        plan: the releases that a noise multiplier leads to, each with its count; more noise must not cost more.
        tolerance: how much of the budget may be left over, as a share of it.

    Returns:
        z in [1e-2, 1e6] with ε(plan(z)) ≤ target, and ≥ (1 − tolerance)·target unless z is 1e-2 or ε leaps there.

    Raises:
        ValueError: even z = 1e6 costs more, or the accountant can't account for the plan.
    """
    if not 0 < target_epsilon < math.inf or not 0 < tolerance < 1:
        raise ValueError(
            f"target_epsilon = {target_epsilon!r} must be above 0, tolerance = {tolerance!r} between 0 and 1"
        )

    # Room for what rounding adds where the same releases are composed one by one.
    target_epsilon *= 1 - 1e-9

    def cost(log_noise: float) -> float:
        return _cost(accountant_name, plan(math.exp(log_noise)), delta)

    least, most = math.log(LEAST_NOISE), math.log(MOST_NOISE)
    high, spent = 0.0, cost(0.0)
    low = high
    while spent > target_epsilon:
        if high >= most:
            raise ValueError(
                f"no noise multiplier up to {MOST_NOISE:g} keeps to epsilon = {target_epsilon:g} at delta = {delta:g}:"
                f" the plan costs {spent:.4g} there by {accountant_name!r}"
            )
        low, high = high, min(most, high + math.log(2))
        spent = cost(high)
    while low == high and high > least:  # z = 1 was enough: down to where it is not
        low = max(least, high - math.log(2))
        if (cheaper := cost(low)) <= target_epsilon:
            high, low, spent = low, low, cheaper
    while spent < (1 - tolerance) * target_epsilon and high - low > 1e-6:
        middle = (low + high) / 2
        if (between := cost(middle)) <= target_epsilon:
            high, spent = middle, between
        else:
            low = middle
    return math.exp(high)


def release_to_data(release: Release) -> dict[str, Any]:
    """A release as numbers and strings: its kind, and its fields."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(release, cls))
    return {"kind": kind, **asdict(release)}


def release_from_data(data: Mapping[str, Any]) -> Release:
    """The release of `release_to_data`.

    Raises:
        ValueError: the kind is not known, a field is missing, unknown or of a wrong kind, or out of its range.
    """
    cls = _KINDS.get(str(data.get("kind")))
    if cls is None:
        raise ValueError(f"a release of unknown kind: {dict(data)}")
    values = {key: value for key, value in data.items() if key != "kind"}
    expected = {field.name: field.type for field in fields(cls)}
    if values.keys() != expected.keys():
        raise ValueError(f"a {data['kind']} release has {sorted(expected)}, not {sorted(values)}")
    for key, value in values.items():
        kinds = (
            int
            if "int" in str(expected[key])
            else int | float
            if "float" in str(expected[key])
            else str
        )
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"a {data['kind']} release's {key} can't be {value!r}")
    return cls(**values)


def require_delta(delta: float) -> None:
    """Raises `ValueError` unless δ lies strictly between 0 and 1."""
    if not 0 < delta < 1:
        raise ValueError(f"delta = {delta!r}: must lie between 0 and 1")


def require_epsilon(epsilon: float) -> None:
    """Raises `ValueError` unless ε is at least 0 and finite."""
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon = {epsilon!r}: must be at least 0")


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


def _cost(name: AccountantName, releases: Iterable[tuple[Release, int]], delta: float) -> float:
    accountant = make_accountant(name, "add_or_remove_one")
    for number, (release, count) in enumerate(releases):
        if number == 0:
            accountant = make_accountant(name, release.relation)
        accountant.step(release, count)
    return accountant.epsilon(delta)
