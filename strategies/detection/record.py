"""What is known of one client: its flags, its latest judged rounds, its quarantines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from strategies.state import State, integer_in, mapping_in


@dataclass
class Record:
    """One client's.

    Attributes:
        client: logical id.
        flags: rounds in which it was flagged.
        recent: whether it was flagged, by number of round, for its latest judged rounds.
        reasons: of its last flag.
        first: round of its first flag; 0 where there is none.
        last: round of its last flag.
        times: quarantines so far.
        since: first round of the present or last quarantine; None where there was none.
        until: last round of the present quarantine; None while there is none.
        ended: last round of the last quarantine that is over.
    """

    client: int
    flags: int = 0
    recent: dict[int, bool] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    first: int = 0
    last: int = 0
    times: int = 0
    since: int | None = None
    until: int | None = None
    ended: int | None = None

    def judged(self, round_number: int, reasons: Sequence[str] | None, window: int) -> None:
        """A round more; `reasons` where the client was flagged."""
        self.recent[round_number] = reasons is not None
        self.recent = dict(list(self.recent.items())[-window:])
        if reasons is not None:
            self.flags += 1
            self.first, self.last = self.first or round_number, round_number
            self.reasons = list(reasons)

    @property
    def strikes(self) -> list[int]:
        """Which of the latest judged rounds it was flagged in."""
        return [number for number, flagged in self.recent.items() if flagged]

    def shut_out(self, begin: int, rounds: int) -> None:
        """Quarantine from round `begin`, for `rounds` the first time and twice as long each time after."""
        self.since, self.until = begin, begin + rounds * 2**self.times - 1
        self.times += 1

    def release(self) -> None:
        """The quarantine is over, and what led to it with it."""
        self.ended, self.until = self.until, None
        self.recent = {}

    def row(self) -> dict[str, object]:
        """As summary.json has it; `until` is the last round of the present or last quarantine."""
        return {
            "client": self.client,
            "flags": self.flags,
            "first_flagged": self.first,
            "last_flagged": self.last,
            "last_reasons": self.reasons,
            "since": self.since,
            "until": self.ended if self.until is None else self.until,
            "quarantined": self.until is not None,
            "times": self.times,
        }

    def state_dict(self) -> State:
        """All of it."""
        return {
            "flags": self.flags,
            "recent": {str(number): flagged for number, flagged in self.recent.items()},
            "reasons": dict(zip(map(str, range(len(self.reasons))), self.reasons, strict=True)),
            "first": self.first,
            "last": self.last,
            "times": self.times,
            "since": self.since,
            "until": self.until,
            "ended": self.ended,
        }

    @classmethod
    def of(cls, client: int, state: State) -> Record:
        """The record that `state_dict` was of.

        Raises:
            ValueError: it is no such state.
        """
        recent, reasons = mapping_in(state, "recent"), mapping_in(state, "reasons")
        return cls(
            client,
            recent={int(number): flagged is True for number, flagged in recent.items()},
            reasons=[str(reason) for reason in reasons.values()],
            flags=integer_in(state, "flags"),
            first=integer_in(state, "first"),
            last=integer_in(state, "last"),
            times=integer_in(state, "times"),
            since=_maybe(state, "since"),
            until=_maybe(state, "until"),
            ended=_maybe(state, "ended"),
        )


def _maybe(state: State, key: str) -> int | None:
    return None if state.get(key) is None else integer_in(state, key)
