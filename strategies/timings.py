"""How long clients take: what each one's training requests took on the exchange's clock, and whether they came back.

A moving mean and mean deviation of each client, as TCP keeps them of a connection (Jacobson 1988, "Congestion Avoidance
and Control", appendix A), but that the first replies count alike. Of whoever has failed it is not known whether it is
gone or has become slower: it is given twice as long with each failure, until it answers or is taken for lost (Karn &
Partridge 1987, "Improving Round-Trip Time Estimates in Reliable Transport Protocols"). The server's clock runs from the
sending of a request until its reply is there, so a client can be slow, or quick, and say nothing untrue of it.
Deadlines and fair samplers read this. It knows no scheduler, no sampler and no message; what a failure leads to is its
readers' to decide.

Five numbers a client, in arrays: a checkpoint of 100,000 clients is a copy of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, inf, isfinite
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from strategies.state import State

_LEAST_GAIN = 0.25
"""What the newest reply counts of a client's mean, once there are four of them."""
_AFTER_FAILURE = 0.5
"""What it counts where the client has failed since it last answered."""
_LOST = 3
"""Failures in a row from which on a client is not expected to answer."""
_TRIALS = (4, 8, 16)
"""Failures in a row with which a lost client is given that often its own time, in case it has only become slower."""
_DEVIATIONS = 4
"""Mean deviations beyond its mean within which a client answers, as TCP counts on it."""
_LEAST_MARGIN = 0.25
"""Of a client's mean, that it may always take beyond it."""
_FIRST_ROWS = 64

_Number = TypeVar("_Number", np.int64, np.float64)


class Timings:
    """What is known of each client that was ever asked."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._times = np.zeros((_FIRST_ROWS, 2))  # mean, mean deviation
        self._counts = np.zeros((_FIRST_ROWS, 3), np.int64)  # replies, failures in a row, asked

    def __len__(self) -> int:
        """Clients that anything is known of."""
        return len(self._rows)

    # ---- what happens ----

    def asked(self, clients: Iterable[int]) -> None:
        """These clients (logical ids) have been asked to take part once more."""
        for client in clients:
            row = self._row(client)  # before the array is looked at: it may be another one then
            self._counts[row, 2] += 1

    def observed(self, client: int, seconds: float) -> None:
        """A training request has been answered; failures before it are over.

        Args:
            client: logical id.
            seconds: from its sending until its reply was there.

        Raises:
            ValueError: no time takes so long.
        """
        if not (isfinite(seconds) and seconds >= 0):
            raise ValueError(
                f"client {client} took {seconds!r} s: a finite time of at least 0 is meant"
            )
        row = self._row(client)
        mean, spread = self._times[row]
        replies = self._counts[row, 0] + 1
        gain = max(1 / replies, _AFTER_FAILURE if self._counts[row, 1] else _LEAST_GAIN)
        off = abs(seconds - mean) if replies > 1 else 0.0
        self._times[row] = mean + gain * (seconds - mean), spread + gain * (off - spread)
        self._counts[row, :2] = replies, 0

    def failed(self, client: int) -> None:
        """A client has answered with an error, or not in time."""
        row = self._row(client)
        self._counts[row, 1] += 1

    # ---- what is known ----

    def seconds(self, client: int) -> float | None:
        """What a training request to a client takes on average; None where none was ever answered."""
        row = self._rows.get(client)
        return None if row is None or not self._counts[row, 0] else float(self._times[row, 0])

    def spread(self, client: int) -> float | None:
        """The mean deviation from that; None where `seconds` is."""
        row = self._rows.get(client)
        return None if row is None or not self._counts[row, 0] else float(self._times[row, 1])

    def failures(self, client: int) -> int:
        """How often it has failed since it last answered."""
        row = self._rows.get(client)
        return 0 if row is None else int(self._counts[row, 1])

    def times_asked(self, client: int) -> int:
        """How often it was asked to take part."""
        row = self._rows.get(client)
        return 0 if row is None else int(self._counts[row, 2])

    def means(self, clients: Sequence[int]) -> NDArray[np.float64]:
        """`seconds` of each of these clients, (n,); NaN where that is not known."""
        rows = self._rows_of(clients)
        answered = np.where(rows >= 0, self._counts[rows, 0], 0) > 0
        return np.where(answered, self._times[rows, 0], np.nan)

    def asks(self) -> NDArray[np.int64]:
        """`times_asked` of every client that anything is known of, in no order, (n,)."""
        return self._counts[: len(self._rows), 2].copy()

    def quantile(self, q: float, clients: Sequence[int]) -> float | None:
        """The time within which a share q of these clients is expected to answer; None where that is not known.

        A client is expected within its mean, twice as late for each failure since it last answered. Whoever was never
        heard of counts as slower than all others: the few who have been measured must not speak for the many who have
        not. Whoever has failed and never answered, or three times since it did, is not counted: nothing tells that it
        will.

        Args:
            q: in (0, 1].
            clients: logical ids.

        Raises:
            ValueError: q is outside its range.
        """
        if not 0 < q <= 1:
            raise ValueError(f"q = {q!r}: a share in (0, 1] is meant")
        means, failures = self.means(clients), self._failures_of(clients)
        gone = np.where(np.isnan(means), failures > 0, failures >= _LOST)
        expected = means * 2.0 ** np.minimum(failures, _LOST)
        times = np.sort(np.nan_to_num(expected[~gone], nan=inf))
        found = float(times[ceil(round(q * len(times), 9)) - 1]) if len(times) else inf
        return found if isfinite(found) else None

    def limits(self, clients: Sequence[int]) -> NDArray[np.float64]:
        """Seconds that each of these clients is worth waiting for, (n,); infinite where nothing is known of one.

        Its mean and four mean deviations, as TCP counts on (RFC 6298), but no fewer than twice its mean over the number
        of replies, since a first one says nothing of deviations, and a quarter of it at any time. Twice as long for
        each failure since it last answered, so that one that has become slower is heard of again. After the third it
        counts as gone and has no longer than at first, but when it has failed 4, 8 and 16 times: that often as long.
        """
        means, failures = self.means(clients), self._failures_of(clients)
        rows = self._rows_of(clients)
        replies, spreads = self._counts[rows, 0], self._times[rows, 1]
        least = means * np.maximum(2 / np.maximum(replies, 1), _LEAST_MARGIN)
        times = np.where(failures < _LOST, 2.0 ** np.minimum(failures, _LOST), 1.0)
        times = np.where(np.isin(failures, _TRIALS), failures, times)
        longest = (means + np.maximum(_DEVIATIONS * spreads, least)) * times
        # Whoever answers in no time, as a clock that stands still has it, is known as little as one that never did.
        return np.where(longest > 0, longest, inf)

    def trial(self, clients: Sequence[int]) -> float:
        """The longest that one of these clients is waited for to see whether it has only become slower; 0 for none.

        A share of clients that answers sooner must not cut that short: a group that has become slower than any
        multiple of the others would never be heard of again.
        """
        limits, failures = self.limits(clients), self._failures_of(clients)
        tried = limits[np.isin(failures, _TRIALS) & np.isfinite(limits)]
        return float(tried.max(initial=0.0))

    # ---- through a restart ----

    def state_dict(self) -> State:
        """Three arrays over the clients known: ids (n,) int64, times (n, 2) float64, counts (n, 3) int64."""
        count = len(self._rows)
        return {
            "clients": np.fromiter(self._rows, np.int64, count),
            "times": self._times[:count].copy(),
            "counts": self._counts[:count].copy(),
        }

    def load_state_dict(self, state: State) -> None:
        """Takes up an earlier run's, in place of what was known.

        Raises:
            ValueError: another part's state, or one that no `Timings` can have left.
        """
        clients = _table(state, "clients", np.int64, 0)
        times = _table(state, "times", np.float64, 2)
        counts = _table(state, "counts", np.int64, 3)
        whole = len(clients) == len(times) == len(counts) == len(set(clients.tolist()))
        if not whole or not np.isfinite(times).all() or (times < 0).any() or (counts < 0).any():
            raise ValueError(
                "a state of timings holds times and counts of at least 0 for each of some different clients"
            )
        self._rows = {client: row for row, client in enumerate(clients.tolist())}
        room = max(_FIRST_ROWS, len(clients))
        self._times, self._counts = np.zeros((room, 2)), np.zeros((room, 3), np.int64)
        self._times[: len(times)], self._counts[: len(counts)] = times, counts

    def _failures_of(self, clients: Sequence[int]) -> NDArray[np.int64]:
        """`failures` of each of these clients, (n,)."""
        rows = self._rows_of(clients)
        return np.where(rows >= 0, self._counts[rows, 1], 0)

    def _rows_of(self, clients: Sequence[int]) -> NDArray[np.int64]:
        """Their places in the arrays, (n,); -1 where nothing is known of one."""
        return np.fromiter((self._rows.get(one, -1) for one in clients), np.int64, len(clients))

    def _row(self, client: int) -> int:
        """The client's place in the arrays, which grow by doubling."""
        row = self._rows.get(client)
        if row is None:
            row = self._rows[client] = len(self._rows)
            if row == len(self._times):
                self._times = np.concatenate([self._times, np.zeros_like(self._times)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        return row


def _table(state: State, name: str, kind: type[_Number], columns: int) -> NDArray[_Number]:
    """An array of a state, (n, columns), or (n,) where there are none."""
    value = state.get(name)
    shape: tuple[int, ...] = (columns,) if columns else ()
    if (
        not isinstance(value, np.ndarray)
        or value.dtype != kind
        or value.ndim != 1 + len(shape)
        or value.shape[1:] != shape
    ):
        wanted = ", ".join(map(str, ("n", *shape)))
        raise ValueError(f"the state's {name!r} should be an array of {kind.__name__}, ({wanted})")
    return value.astype(kind)
