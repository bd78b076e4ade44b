"""Local steps by measured speed, so that replies of fast and slow clients arrive together.

Li, Chaturvedi, Du, Kim, Ramachandran, Ravi, Chard & Madduri 2024, "FedCompass: Efficient Cross-Silo Federated Learning
on Heterogeneous Client Devices using a Computing Power Aware Scheduler", Algorithm 1: a client joins the arrival group
in which it can take the most steps within [Q_min, Q_max], or begins one of its own. The buffer stays what it is; only
how much work each client gets, and so when its reply comes, is decided here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import floor
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt

from strategies.ranges import Ranged
from strategies.state import State

_SMOOTHING = 0.5
"""Of a client's measured seconds a step: what the newest measurement counts."""


@dataclass
class Compass(Ranged):
    """How many local steps a client is given.

    Attributes:
        least_steps: Q_min.
        most_steps: Q_max, given to a client whose speed is not known.
        slack: seconds that a group's arrival may be missed by without being a straggler's.
    """

    least_steps: Annotated[int, Ge(1)] = 5
    most_steps: Annotated[int, Ge(1)] = 50
    slack: Annotated[float, Gt(0)] = 0.1
    _seconds: dict[int, float] = field(default_factory=dict, init=False)
    _arrivals: dict[int, tuple[float, int]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least_steps > self.most_steps:
            raise ValueError(
                f"least_steps = {self.least_steps} is above most_steps = {self.most_steps}"
            )

    def steps(self, client: int, now: float) -> int:
        """Local steps for a client that begins now; it is expected with its group from then on.

        Args:
            client: logical id.
            now: seconds of the exchange's clock.
        """
        pace = self._seconds.get(client)
        if pace is None:
            return self.most_steps
        steps, arrival = self._joined(pace, now)
        self._arrivals[client] = arrival, steps
        return steps

    def measured(self, client: int, seconds: float, steps: int) -> None:
        """A client has taken so many steps in so many seconds, the way there and back included."""
        pace = seconds / max(1, steps)
        before = self._seconds.get(client, pace)
        self._seconds[client] = _SMOOTHING * pace + (1 - _SMOOTHING) * before
        self._arrivals.pop(client, None)

    def _joined(self, pace: float, now: float) -> tuple[int, float]:
        """Steps and arrival: of the group with which most steps are possible, else of one that follows another."""
        arrivals = sorted({arrival for arrival, _ in self._arrivals.values() if arrival > now})
        fitting = [(self._within(arrival - now, pace), arrival) for arrival in arrivals]
        possible = [one for one in fitting if self.least_steps <= one[0] <= self.most_steps]
        if possible:
            return max(possible)
        # A group that comes when the fastest of another one comes again (Algorithm 1, CREATEGROUP).
        following = [
            arrival + self.most_steps * min(self._paces_of(arrival), default=pace)
            for arrival in arrivals
        ]
        fitting = [(self._within(arrival - now, pace), arrival) for arrival in following]
        possible = [one for one in fitting if self.least_steps <= one[0] <= self.most_steps]
        if possible:
            return max(possible)
        return self.most_steps, now + self.most_steps * pace

    def _within(self, seconds: float, pace: float) -> int:
        return floor((seconds + self.slack) / pace) if pace > 0 else self.most_steps

    def _paces_of(self, arrival: float) -> list[float]:
        return [self._seconds[one] for one, (its, _) in self._arrivals.items() if its == arrival]

    def state_dict(self) -> State:
        """Measured seconds a step, and when who is expected."""
        known = sorted(self._seconds)
        expected = sorted(self._arrivals)
        return {
            "clients": np.array(known, np.int64),
            "seconds": np.array([self._seconds[one] for one in known], np.float64),
            "expected": np.array(expected, np.int64),
            "arrivals": np.array([self._arrivals[one] for one in expected]).reshape(-1, 2),
        }

    def load_state_dict(self, state: State) -> None:
        """Takes up an earlier process's measurements; raises `ValueError` for another part's state."""
        columns = [state.get(name) for name in ("clients", "seconds", "expected", "arrivals")]
        if not all(isinstance(column, np.ndarray) for column in columns):
            raise ValueError("a compass's state holds arrays of clients, seconds and arrivals")
        clients, seconds, expected, arrivals = (np.asarray(column) for column in columns)
        self._seconds = dict(zip(clients.tolist(), seconds.tolist(), strict=True))
        self._arrivals = {
            int(one): (float(arrival), int(steps))
            for one, (arrival, steps) in zip(expected, arrivals, strict=True)
        }
