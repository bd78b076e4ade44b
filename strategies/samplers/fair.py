"""Cohorts of devices of like speed, in which every device has its share: selection by availability, speed and fairness.

A round takes as long as the slowest of its cohort. Where the fast are asked more often (Nishio & Yonetani 2019, "Client
Selection for Federated Learning with Heterogeneous Resources in Mobile Edge") the model leans towards their data. Here
all are asked equally often, and those who are asked together are alike: the tiers of Chai et al. 2020, "TiFL: A
Tier-based Federated Learning System", section 4.2, without borders between them. Shares are kept by credits, as in the
virtual queues of Huang et al. 2021, "An Efficiency-Boosting Client Selection Scheme for Federated Learning with
Fairness Guarantee", section IV:

    c_i ← c_i + m/n          for each of the n devices that are there, where m are to be asked
    ask the m largest of     c_i + s·u_i,  u_i in [0, 1] how alike in speed i and the device of most credit are
    c_i ← c_i − 1            for each of those

**The bound.** Where the same devices are there in every round, credits are never further apart than s + 1, whatever the
speeds and however they change. For where i is asked and j is not, c_i + s ≥ c_j, so that c_j − (c_i − 1) ≤ s + 1
afterwards, and no other two move apart. Credits add up to 0, so each device has been asked within s + 1 rounds of its
share T·m/n. A device that is away earns and owes nothing, and its share is Σ m/n over the rounds in which it was there.
Then no more is proved than for any such scheme: an adversary who says who is there can drive credits apart as far as
n/2 (the carpool problem: Ajtai et al. 1998, "Fairness in Scheduling"). Where devices come and go by chance, tests hold
them near. The same goes for clients asked beside a cohort (`scheduler.over_selection`), who are drawn from the rest.

It knows clients' ids and what their requests took; not what they send.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray

from strategies.contract import Claim
from strategies.ranges import Ranged
from strategies.seeds import generator
from strategies.state import State
from strategies.timings import Timings

Floats = NDArray[np.float64]

_COLUMNS = ("credit", "share", "asked")


@dataclass
class Fair(Ranged):
    """Asks max(minimum, ⌊fraction · n⌉) of the n clients that are there.

    Attributes:
        fraction: of the clients, in (0, 1].
        minimum: asked at least (all of them where there are fewer).
        slack: s, rounds that a device may be ahead of its share or behind it so that cohorts are of like speed; 0 heeds
            no speed.
        population: clients planned in all, which fixes the cohort for the contract; 0 where it is not known.
    """

    fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    minimum: Annotated[int, Ge(1)] = 1
    slack: Annotated[float, Ge(0)] = 3.0
    population: Annotated[int, Ge(0)] = 0
    _table: Floats = field(default_factory=lambda: np.zeros((len(_COLUMNS), 0)), init=False)
    _timings: Timings | None = field(default=None, init=False)

    label = "sampler=fair"

    def check(self, claim: Claim) -> Claim:
        """Who is asked follows from how long clients took, of which no chance may be claimed."""
        cohort = self.cohort(self.population) if self.population else None
        return claim.given(self, sampling="uncontrolled", cohort=cohort, measured=True)

    def cohort(self, available: int) -> int:
        """How many of `available` clients are asked."""
        return min(available, max(self.minimum, round(self.fraction * available)))

    def informed(self, timings: Timings) -> None:
        """Takes what requests took so far, which the pipeline keeps up to date."""
        self._timings = timings

    def draw(
        self, clients: Sequence[int], *, seed: int, round_number: int, attempt: int
    ) -> list[int]:
        """A cohort, in ascending order.

        Args:
            clients: logical ids of those who are there.
            seed: the run's; it decides among equals. No privacy rests on it.
            round_number: from 1.
            attempt: from 0.
        """
        count = self.cohort(len(set(clients)))
        return self.pick(clients, count, seed=seed, round_number=round_number, attempt=attempt)

    def pick(
        self, clients: Sequence[int], count: int, *, seed: int, round_number: int, attempt: int
    ) -> list[int]:
        """At most `count` of the clients, in ascending order, who count as asked from now on."""
        there = np.unique(np.asarray(clients, np.int64))
        count = min(count, len(there))
        if not count:
            return []
        self._make_room(int(there[-1]) + 1)
        credit, share, asked = self._table
        credit[there] += count / len(there)
        share[there] += count / len(there)
        # In random order, so that a stable sort decides among equals by chance.
        there = generator(seed, "sampler", round_number, attempt).permutation(there)
        score = credit[there] + self.slack * self._likeness(there, credit[there])
        chosen = there[np.argsort(-score, kind="stable")[:count]]
        credit[chosen] -= 1
        asked[chosen] += 1
        return sorted(chosen.tolist())

    def took(self, clients: Iterable[int], round_number: int) -> None:
        """Being asked counts, whenever an update becomes part of the model."""

    def shares(self, clients: Sequence[int]) -> Floats:
        """How often each was asked for each time that it should have been: (n,), 1 where nothing was due."""
        places = np.asarray(clients, np.int64)
        self._make_room(int(places.max(initial=-1)) + 1)
        _, share, asked = self._table[:, places]
        found: Floats = np.divide(asked, share, out=np.ones(len(places)), where=share > 0)
        return found

    def _likeness(self, there: NDArray[np.int64], credit: Floats) -> Floats:
        """u, (n,): how near in the order of speeds each is to the one of most credit.

        Those whose speed is not known are alike, so that they are measured soon, and together.
        """
        if self._timings is None or not self.slack:
            return np.zeros(len(there))
        seconds = self._timings.means(there.tolist())
        known = np.isfinite(seconds)
        anchor = int(np.argmax(credit))
        if not known[anchor]:
            return np.where(known, 0.0, 1.0)
        order = np.empty(int(known.sum()))
        order[np.argsort(seconds[known], kind="stable")] = np.arange(len(order))
        places = np.full(len(there), np.inf)
        places[known] = order
        likeness: Floats = 1 - np.abs(places - places[anchor]) / len(order)
        return np.where(known, likeness, 0.0)

    def _make_room(self, size: int) -> None:
        missing = size - self._table.shape[1]
        if missing > 0:
            # Twice as much at least: ids that come one by one shall not copy the table each time.
            grown = np.zeros((len(_COLUMNS), max(missing, self._table.shape[1])))
            self._table = np.concatenate([self._table, grown], axis=1)

    def state_dict(self) -> State:
        """Three float64 arrays by logical id: credit, share due, times asked."""
        return {name: column.copy() for name, column in zip(_COLUMNS, self._table, strict=True)}

    def load_state_dict(self, state: State) -> None:
        """Goes on from an earlier run's credits.

        Raises:
            ValueError: another part's state.
        """
        columns = [_column(state, name) for name in _COLUMNS]
        if len({len(column) for column in columns}) > 1:
            raise ValueError("a fair sampler's state has columns of unequal length")
        self._table = np.stack(columns)


def _column(state: State, name: str) -> Floats:
    value = state.get(name)
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype != np.float64:
        raise ValueError(f"a fair sampler's {name!r} should be a vector of float64")
    if not np.isfinite(value).all():
        raise ValueError(f"a fair sampler's {name!r} holds what is no number")
    return value.astype(np.float64)


def jain_index(shares: Sequence[float] | Floats) -> float:
    """(Σx)²/(n·Σx²): 1 where all have the same, 1/n where one has it all.

    Jain, Chiu & Hawe 1984, "A Quantitative Measure of Fairness and Discrimination for Resource Allocation in Shared
    Computer Systems", equation 1.

    Args:
        shares: x, (n,), each at least 0. Of none, or all of nothing, it is 1.
    """
    x = np.asarray(shares, np.float64)
    squares = float(np.square(x).sum())
    return float(x.sum() ** 2 / (len(x) * squares)) if squares else 1.0
