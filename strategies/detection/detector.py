"""From scores to flags: who of a round's clients is unlike the others, by which figures.

Four tests, each one-sided and each against the round's own clients; docs/detection.md has their formulas and where the
thresholds come from. Excess and agreement are averaged over a client's rounds with a memory of about five: an honest
client has a bad round, a liar has nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Annotated

import numpy as np
from annotated_types import Gt, Le
from numpy.typing import NDArray

from strategies.detection.scores import Matrix, Scores, deviation, groups
from strategies.ranges import Ranged
from strategies.state import State, mapping_in

Mask = NDArray[np.bool_]

LEAST_UPDATES = 5
"""Updates below which a round is not judged: two of four may be liars, and then there are no others."""

MEMORY = 0.8
"""How much of a client's average the next round leaves."""
EXCESS_SPREAD = 3.5
"""Deviations of the round's clients that a client's excess must reach as well."""
AGREEMENT_SPREAD = 2.0
"""Deviations of the round's clients by which a client's agreement must fall short as well."""
CORRELATION_SPREAD = 3.0
"""Times the median client's highest correlation that those of a group must reach as well, …"""
CORRELATION_CERTAIN = 0.85
"""… and the correlation that is enough whatever the others' are."""
_LEAST_SPREAD = 0.01


@dataclass
class Average:
    """A mean that forgets: the last value weighs 1, the one before `MEMORY`, and so on.

    Attributes:
        total: Σ weight · value.
        weight: Σ weight; 0 while there is no value.
    """

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> float:
        """Takes a value; returns the mean."""
        self.total, self.weight = MEMORY * self.total + value, MEMORY * self.weight + 1
        return self.total / self.weight

    def state_dict(self) -> State:
        """Both sums."""
        return {"total": self.total, "weight": self.weight}

    @classmethod
    def of(cls, state: State) -> Average:
        """The mean that `state_dict` was of.

        Raises:
            ValueError: it is no such state.
        """
        total, weight = state.get("total"), state.get("weight")
        if not isinstance(total, float) or not isinstance(weight, float):
            raise ValueError(f"an average should have a total and a weight, not {dict(state)!r}")
        return cls(total, weight)


@dataclass
class Detector(Ranged):
    """Flags clients, and remembers what it needs to judge them better.

    Attributes:
        excess: the mean excess from which a client is flagged.
        certain: the excess of one round from which it is flagged whatever it did before.
        correlation: of the residuals of two clients, from which they are one group; more where clients are alike.
    """

    excess: Annotated[float, Gt(0)] = 1.3
    certain: Annotated[float, Gt(0)] = 3.0
    correlation: Annotated[float, Gt(0), Le(1)] = 0.5
    _excesses: dict[int, Average] = field(default_factory=dict, init=False)
    _agreements: dict[int, Average] = field(default_factory=dict, init=False)
    _spreads: tuple[Average, Average] = field(
        default_factory=lambda: (Average(), Average()), init=False
    )

    def judge(self, clients: Sequence[int], scores: Scores) -> dict[int, list[str]]:
        """The reasons, with numbers, for each client that is flagged.

        Args:
            clients: logical ids, in the scores' order; fewer than `LEAST_UPDATES` are not judged.
            scores: of their updates.
        """
        if len(clients) < LEAST_UPDATES:
            return {}
        reasons: dict[int, list[str]] = {}
        tests = (self._long(clients, scores), self._faint(scores), self._against(clients, scores))
        for mask, texts in (*tests, self._together(clients, scores)):
            for index in map(int, np.flatnonzero(mask)):
                reasons.setdefault(clients[index], []).append(texts[index])
        return reasons

    def forget(self, client: int) -> None:
        """Drops what is held against a client: it begins anew."""
        self._excesses.pop(client, None)
        self._agreements.pop(client, None)

    def state_dict(self) -> State:
        """All averages."""
        return {
            "excess": {str(client): mean.state_dict() for client, mean in self._excesses.items()},
            "agreement": {str(key): mean.state_dict() for key, mean in self._agreements.items()},
            "excess_spread": self._spreads[0].state_dict(),
            "agreement_spread": self._spreads[1].state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Takes up the averages of an earlier run."""
        self._excesses = _averages(mapping_in(state, "excess"))
        self._agreements = _averages(mapping_in(state, "agreement"))
        self._spreads = (
            Average.of(mapping_in(state, "excess_spread")),
            Average.of(mapping_in(state, "agreement_spread")),
        )

    def _long(self, clients: Sequence[int], scores: Scores) -> tuple[Mask, list[str]]:
        """Too long for the progress it makes: scaling, noise, training on false labels."""
        # Cut off, so that one wild round is not held against a client for the five that follow.
        now = np.clip(scores.excess, -self.certain, 2 * self.certain)
        kept = np.minimum(now, self.certain)
        means = _remember(self._excesses, clients, kept)
        spread = EXCESS_SPREAD * _wider(len(clients)) * self._spreads[0].add(deviation(now))
        often = (means > max(self.excess, spread)) & (now > 0)
        mask = (now > max(self.certain, spread)) | often
        texts = [
            f"excess {excess:.2f} (norm {norm:.3g}, others' {_range(scores.norm, mask)}; "
            f"cosine {cosine:.2f}, others' {_range(scores.cosine, mask)})"
            for excess, norm, cosine in zip(scores.excess, scores.norm, scores.cosine, strict=True)
        ]
        return mask, texts

    def _faint(self, scores: Scores) -> tuple[Mask, list[str]]:
        """As good as nothing: a free rider, or a vote for no change."""
        mask = scores.norm < exp(-self.certain) * float(np.median(scores.norm))
        return mask, [
            f"norm {norm:.3g}, others' {_range(scores.norm, mask)}" for norm in scores.norm
        ]

    def _against(self, clients: Sequence[int], scores: Scores) -> tuple[Mask, list[str]]:
        """Against the others: flipped signs, and half of all noise."""
        means = _remember(self._agreements, clients, scores.agreement)
        middle = float(np.median(means))
        spread = max(_LEAST_SPREAD, self._spreads[1].add(deviation(-scores.agreement)))
        least = min(0.0, middle - AGREEMENT_SPREAD * _wider(len(clients)) * spread)
        mask = means < least
        texts = [
            f"agreement {mean:.2f} with the others, theirs {_range(means, mask)}" for mean in means
        ]
        return mask, texts

    def _together(self, clients: Sequence[int], scores: Scores) -> tuple[Mask, list[str]]:
        """More alike than separate data make anyone: colluders, copies."""
        n = len(clients)
        mask, texts = np.zeros(n, bool), [""] * n
        highest = (scores.correlation - 2 * np.eye(n)).max(axis=1)
        usual = min(CORRELATION_SPREAD * float(np.median(highest)), CORRELATION_CERTAIN)
        for group in groups(scores.correlation, max(self.correlation, usual)):
            if 2 * len(group) >= n:  # the majority is what the others are held against
                continue
            mask[group] = True
            inside = scores.correlation[np.ix_(group, group)][~np.eye(len(group), dtype=bool)]
            for index in group:
                others = ", ".join(str(clients[other]) for other in group if other != index)
                texts[index] = f"correlation {inside.min():.2f} to {inside.max():.2f} with {others}"
        if mask.any():
            rest = scores.correlation[np.ix_(~mask, ~mask)] - 2 * np.eye(int((~mask).sum()))
            texts = [f"{text}, at most {rest.max():.2f} among the others" for text in texts]
        return mask, texts


def _remember(averages: dict[int, Average], clients: Sequence[int], values: Matrix) -> Matrix:
    """Each client's mean after its new value, (n,)."""
    means = [
        averages.setdefault(client, Average()).add(float(value))
        for client, value in zip(clients, values, strict=True)
    ]
    return np.array(means)


def _averages(state: State) -> dict[int, Average]:
    return {int(client): Average.of(mapping_in(state, client)) for client in state}


def _wider(n: int) -> float:
    """Deviations of few clients are estimated badly: the limits move out by 1 + 4/n."""
    return 1 + 4 / n


def _range(values: Matrix, flagged: Mask) -> str:
    """The least and the greatest of those who are not flagged."""
    others = values[~flagged] if not flagged.all() else values
    return f"{others.min():.3g} to {others.max():.3g}"
