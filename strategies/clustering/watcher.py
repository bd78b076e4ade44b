"""Watches the first rounds' updates and says which clients seem to learn the same task.

It sees decoded updates, each of one client, after a round is over (as quarantine does), and changes nothing: what
follows from a report is somebody else's to decide. Who is like whom is a function of updates that were never released,
so it is refused under a central promise of privacy; updates that are noised by the clients may be looked at. It takes
clients at their word: a liar chooses its group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Lt
from numpy.typing import NDArray

from strategies.clustering.clusters import (
    LEAST_CLIENTS,
    agglomerative,
    distances,
    hdbscan,
    k_means,
    one_group,
)
from strategies.clustering.fingerprints import (
    SUFFIX,
    common,
    coordinates,
    fingerprints,
    trained,
    units,
)
from strategies.contract import Claim, ContractError, Visibility, name_of
from strategies.ranges import Ranged
from strategies.state import State, array_in, integer_in, mapping_in
from strategies.update import Layout, Update


@dataclass
class _Seen:
    """What is known of one client: rounds, the sum of their directions over all B, (k,), and the ranks it trains."""

    rounds: int
    total: NDArray[np.float64]
    ranks: dict[str, int]


@dataclass
class TaskClusters(Ranged):
    """Groups of clients by the directions of their adapters.

    Attributes:
        warmup: rounds at the run's begin that are not looked at.
        rounds: of each client, how many of its updates after these are.
        method: how groups are found.
        level: of the test for more than one group: how often groups are reported where there is one, at most.
        most: groups at most; never more than half as many as clients.
    """

    warmup: Annotated[int, Ge(0)] = 1
    rounds: Annotated[int, Ge(1)] = 3
    method: Literal["agglomerative", "k_means", "hdbscan"] = "agglomerative"
    level: Annotated[float, Gt(0), Lt(1)] = 0.05
    most: Annotated[int, Ge(2)] = 8
    _layout: Layout | None = field(default=None, init=False)
    _seen: dict[int, _Seen] = field(default_factory=dict, init=False)

    label = "task clusters"

    def check(self, claim: Claim) -> Claim:
        """Looks at each client's update; refuses where there are too few, or sums only."""
        claim.need_visibility(
            self,
            Visibility.EACH,
            why="groups are of single clients, and a sum of several tells nobody's direction",
            instead="leave the groups out",
        )
        if claim.factors is None or claim.served == "shared":
            lacks = "factors" if claim.factors is None else "served"
            raise ContractError(
                claim.source(lacks),
                name_of(self),
                "directions are those of adapters that each client trains, and there are none, or the server's one"
                " upper part is in all of them",
                "use a model with adapters (model=lora), collector.variant=v1, or clusters=none",
            )
        if claim.cohort is not None and claim.cohort < 2:
            raise ContractError(
                claim.source("cohort"),
                name_of(self),
                "a round asks one client, and directions of different rounds are from different models",
                "ask more clients a round",
            )
        return claim.given(self, watched=True)

    def observe(self, round_number: int, updates: Sequence[Update]) -> None:
        """Takes up a round that is over.

        Args:
            round_number: from 1.
            updates: decoded and admitted, each of one client; of the same layout in all rounds.

        Raises:
            ValueError: the model has no array whose name ends in `.B.weight`, or another layout than before.
        """
        if round_number <= self.warmup:
            return
        for update in updates:
            (client,) = update.members
            seen = self._seen.get(client)
            if seen is not None and seen.rounds >= self.rounds:
                continue
            places = self._places(update.delta.layout)
            values = update.delta.vector[places].astype(np.float64)
            length = float(np.linalg.norm(values))
            if not length > 0:
                continue
            ranks = trained(update)
            total = values / length if seen is None else seen.total + values / length
            kept = ranks if seen is None else common([seen.ranks, ranks])
            self._seen[client] = _Seen(1 if seen is None else seen.rounds + 1, total, kept)

    @property
    def complete(self) -> bool:
        """Whether as many rounds as wanted were seen of every client that was seen at all."""
        return bool(self._seen) and all(seen.rounds >= self.rounds for seen in self._seen.values())

    def report(self) -> Mapping[str, object]:
        """What was found, as plain data.

        Returns:
            ``groups``: lists of clients, each sorted, the one with the smallest id first; one list where the test finds
            no more, and none at all where fewer than 6 clients were seen or no B is trained by all. ``candidates``: the
            groups that there are if there is more than one, whatever the test says, and their ``silhouette``.
            ``p_value`` of the test. ``method``; ``rounds``, by client. What was not to be had is None.
        """
        clients = sorted(self._seen)
        found: dict[str, object] = {
            "method": self.method,
            "groups": [],
            "candidates": None,
            "silhouette": None,
            "p_value": None,
            "rounds": {str(client): self._seen[client].rounds for client in clients},
        }
        rows = self._rows(clients)
        if len(clients) < LEAST_CLIENTS or not rows.size:
            return found
        p_value = one_group(rows, self.most)
        labels, score = self._labels(fingerprints(rows))
        candidates = sorted(
            [client for client, at in zip(clients, labels, strict=True) if at == label]
            for label in set(labels.tolist())
        )
        found |= {"candidates": candidates, "silhouette": score, "p_value": p_value}
        found["groups"] = candidates if p_value <= self.level else [clients]
        return found

    def state_dict(self) -> State:
        """What was seen."""
        if self._layout is None:
            return {}
        names = {
            name: list(shape)
            for name, shape in zip(self._layout.names, self._layout.shapes, strict=True)
        }
        return {
            "layout": {name: np.array(shape, np.int64) for name, shape in names.items()},
            "clients": {
                str(client): {
                    "rounds": seen.rounds,
                    "total": seen.total.copy(),
                    "ranks": dict(seen.ranks),
                }
                for client, seen in self._seen.items()
            },
        }

    def load_state_dict(self, state: State) -> None:
        """Takes up what an earlier run saw.

        Raises:
            ValueError: it is no such state.
        """
        self._layout, self._seen = None, {}
        if not state:
            return
        shapes = {name: _shape(value) for name, value in mapping_in(state, "layout").items()}
        self._layout = Layout(tuple(shapes), tuple(shapes.values()))
        size = len(self._places(self._layout))
        clients = mapping_in(state, "clients")
        for client in clients:
            of = mapping_in(clients, client)
            ranks = mapping_in(of, "ranks")
            self._seen[int(client)] = _Seen(
                integer_in(of, "rounds"),
                array_in(of, "total", (size,)),
                {name: integer_in(ranks, name) for name in ranks},
            )

    def _places(self, layout: Layout) -> NDArray[np.int64]:
        if self._layout is not None and layout != self._layout:
            raise ValueError("task clusters: the model's layout has changed")
        self._layout = layout
        every = {
            name: shape[1]
            for name, shape in zip(layout.names, layout.shapes, strict=True)
            if name.endswith(SUFFIX) and len(shape) == 2
        }
        if not every:
            raise ValueError(
                "task clusters: the model has no low-rank adapters: use model=lora, or leave the groups out"
            )
        return coordinates(layout, every)

    def _rows(self, clients: Sequence[int]) -> NDArray[np.float64]:
        """Directions on the columns that all clients train, (n, k)."""
        if self._layout is None:
            return np.zeros((0, 0))
        shared = coordinates(self._layout, common(self._seen[c].ranks for c in clients))
        at = np.searchsorted(self._places(self._layout), shared)
        return units(np.stack([self._seen[client].total[at] for client in clients]))

    def _labels(self, rows: NDArray[np.float64]) -> tuple[NDArray[np.int64], float]:
        if self.method == "agglomerative":
            return agglomerative(distances(rows), self.most)
        return k_means(rows, self.most) if self.method == "k_means" else hdbscan(rows)


def _shape(value: object) -> tuple[int, ...]:
    if not isinstance(value, np.ndarray) or value.ndim != 1:
        raise ValueError("the state's layout should hold shapes")
    return tuple(int(length) for length in value)
