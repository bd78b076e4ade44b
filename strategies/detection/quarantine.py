"""Strikes and quarantine: a client that is flagged again and again is not asked for a while, and is then let in again.

Flags are a suspicion, so nothing follows from a single one, and nobody is shut out for good: a quarantine ends, and
only who is flagged anew goes back, for twice as long. Neither the rule's least number of inputs nor the quorum is ever
undercut, and more than a share of the clients is never shut out at once, so that liars can't have the honest removed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge, Gt, Le

from strategies.admission import FAILURES
from strategies.contract import Claim, ContractError, Visibility, name_of
from strategies.detection.detector import LEAST_UPDATES, Detector
from strategies.detection.record import Record
from strategies.detection.scores import grams, score
from strategies.ranges import Ranged
from strategies.state import State, Value, mapping_in
from strategies.update import Update

log = logging.getLogger(__name__)


@dataclass
class Quarantine(Ranged):
    """Judges the clients of each round, and keeps those who are flagged too often from the next ones.

    Attributes:
        strikes: flags among a client's last `window` judged rounds that send it to quarantine.
        window: judged rounds that count.
        rounds: how long the first quarantine lasts; each further one of the same client lasts twice as long.
        max_fraction: of the clients that are there, how many may be shut out at once.
        excess: see `Detector`.
        certain: see `Detector`.
        correlation: see `Detector`.
        records: what is known of each client that was ever judged.

    Raises:
        ValueError: more strikes are needed than rounds count.
    """

    strikes: Annotated[int, Ge(1)] = 3
    window: Annotated[int, Ge(1)] = 5
    rounds: Annotated[int, Ge(1)] = 10
    max_fraction: Annotated[float, Ge(0), Le(1)] = 0.5
    excess: Annotated[float, Gt(0)] = 1.3
    certain: Annotated[float, Gt(0)] = 3.0
    correlation: Annotated[float, Gt(0), Le(1)] = 0.5
    records: dict[int, Record] = field(default_factory=dict, init=False)
    _there: frozenset[int] = field(default=frozenset(), init=False)
    _keep: int = field(default=0, init=False)
    _void: bool = field(default=False, init=False)

    label = "quarantine"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strikes > self.window:
            raise ValueError(
                f"Quarantine.strikes = {self.strikes}: at most {self.window}, the rounds of the window, can come"
            )
        self._detector = Detector(self.excess, self.certain, self.correlation)

    def check(self, claim: Claim) -> Claim:
        """Looks at each client's update, and lets what it sees decide who is asked."""
        claim.need_visibility(
            self,
            Visibility.EACH,
            why="flags name single clients, and a sum of several names nobody",
            instead="use quarantine=none",
        )
        claim.need_comparable(self)
        if claim.cohort is not None and claim.cohort < LEAST_UPDATES:
            raise ContractError(
                claim.source("cohort"),
                name_of(self),
                f"a client is held against at least {LEAST_UPDATES - 1} others and a round asks {claim.cohort} in all",
                "ask more clients a round, or use quarantine=none",
            )
        return claim.given(self, watched=True)

    def allowed(self, there: Sequence[int], round_number: int, keep: int) -> list[int]:
        """Who of the clients that are there may be asked in this round, in their order.

        Args:
            there: logical ids.
            round_number: of the round that begins, from 1. Quarantines that it is past are over.
            keep: clients without whom there is no round: where fewer are left, those come back whose time is up first.

        After a void round everybody is asked: those who were left may have been silent, and liars must not gain by
        having had others shut out that no round succeeds.
        """
        self._there, self._keep = frozenset(there), keep
        if self._void:
            return list(there)
        for client, record in self.records.items():
            if record.until is not None and record.until < round_number:
                record.release()
                self._detector.forget(client)
                log.warning("client %d is out of quarantine, on probation", client)
        shut = [client for client in there if self._shut(client)]
        missing = max(0, keep - (len(there) - len(shut)))
        back = sorted(shut, key=lambda client: (self.records[client].until or 0, client))[:missing]
        if back:
            log.warning(
                "round %d asks %s in spite of quarantine: without them %d clients would be left, and %d are needed",
                round_number, ", ".join(map(str, back)), len(there) - len(shut), keep,
            )  # fmt: skip
        return [client for client in there if client in back or not self._shut(client)]

    def judge(
        self, round_number: int, updates: Sequence[Update], refused: Mapping[int, str]
    ) -> tuple[int, ...]:
        """Judges a round that is over, and decides who of those last known to be there is not asked from the next on.

        Args:
            round_number: from 1.
            updates: decoded and admitted, each of one client, whose aggregate the model holds; empty for a void round.
            refused: for clients whose reply was refused, the reason. What is nobody's fault is passed over.

        Returns:
            The clients that were flagged, sorted.
        """
        self._void = not updates
        updates = sorted(updates, key=lambda update: update.members)
        clients = [update.members[0] for update in updates]
        enough = len(updates) >= LEAST_UPDATES
        flags = self._detector.judge(clients, score(grams(updates))) if enough else {}
        for client, reason in refused.items():
            if reason not in FAILURES:
                flags.setdefault(client, []).append(f"refused at the door: {reason}")
        for client in sorted({*(clients if enough else ()), *flags}):
            record = self.records.setdefault(client, Record(client))
            record.judged(round_number, flags.get(client), self.window)
        for client, reasons in sorted(flags.items()):
            log.info("round %d: client %d is flagged: %s", round_number, client, "; ".join(reasons))
        self._shut_out(round_number, flags)
        return tuple(sorted(flags))

    def summary(self) -> list[dict[str, object]]:
        """A row for each client that was ever flagged, by client."""
        return [
            self.records[client].row()
            for client in sorted(self.records)
            if self.records[client].flags
        ]

    def state_dict(self) -> State:
        """Records and averages."""
        records: dict[str, Value] = {
            str(client): record.state_dict() for client, record in self.records.items()
        }
        return {"records": records, "void": self._void, "detector": self._detector.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Takes up an earlier run's records."""
        records = mapping_in(state, "records")
        self.records = {
            int(client): Record.of(int(client), mapping_in(records, client)) for client in records
        }
        self._void = bool(state.get("void"))
        self._detector.load_state_dict(mapping_in(state, "detector"))

    def _shut(self, client: int) -> bool:
        return client in self.records and self.records[client].until is not None

    def _shut_out(self, round_number: int, flags: Mapping[int, Sequence[str]]) -> None:
        """Quarantines who has enough strikes, the most often flagged first, as far as there is room."""
        due = [client for client in flags if self._due(client)]
        # Ids are the clients' own to choose: with the same strikes those go first who are flagged for more.
        due.sort(
            key=lambda client: (-len(self.records[client].strikes), -len(flags[client]), client)
        )
        known, shut = len(self._there), sum(map(self._shut, self._there))
        room = min(int(self.max_fraction * known), known - self._keep) - shut
        for place, client in enumerate(due):
            record = self.records[client]
            why = (
                f"flagged in {len(record.strikes)} of its last {len(record.recent)} judged rounds, "
                f"since round {record.strikes[0]}: {'; '.join(flags[client])}"
            )
            if place >= room:
                log.warning("client %d stays, or too few clients would be left: %s", client, why)
                continue
            record.shut_out(round_number + 1, self.rounds)
            log.warning(
                "client %d is quarantined from round %d to %d: %s",
                client, record.since, record.until, why,
            )  # fmt: skip

    def _due(self, client: int) -> bool:
        return not self._shut(client) and len(self.records[client].strikes) >= self.strikes
