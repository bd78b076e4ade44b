"""Sums under homomorphic encryption: the server adds ciphertexts under a key that it lacks, and clients open the sum.

Server half of FedAvg under CKKS (Cheon, Kim, Kim & Song 2017) with one key for all clients, as Zhang et al. 2020,
"BatchCrypt", have it with another scheme. The client half is `strategies.ckks.member.CkksClient`. Whoever has the
key opens every upload, so no client may collude with the server: masks (`strategies.collectors.Masked`) don't ask that.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from strategies.ckks import SharedKey
from strategies.ckks.conditions import Conditions
from strategies.ckks.member import CkksClient
from strategies.ckks.settings import CkksSettings
from strategies.collectors.ckks_session import CkksSession, Memory
from strategies.collectors.once import Once, Settled
from strategies.contract import Claim, ContractError, Visibility
from strategies.protocols import ClientOwn, Job, Session, Void
from strategies.seeds import generator
from strategies.state import State

FOLDER = "ckks"
"""Of the clients' ledgers, and of a simulation's key, in the folder of what clients remember."""
KEY_FILE = "shared.key"
KEY_SETTING = "ckks-key"
"""The node config that names a device's key."""


@dataclass(frozen=True)
class Ckks(CkksSettings):
    """Sums under one key of the clients'.

    Attributes:
        key: file of the shared key, where clients are this machine's own (a simulation); by default one that is made in
            the run's own folder of clients. A real client's key never comes with a run: it is in its own node config.
        seed: of the draw of those who open a sum; None for the operating system's entropy.
        journal: folder of the sessions and sums of the last models; None keeps them in memory.
    """

    key: Path | None = None
    seed: int | None = None
    journal: Path | None = None
    _memory: Memory = field(init=False, repr=False, compare=False)

    label = "collector ckks"
    phases: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_memory", Memory(Once(self.journal)))

    def check(self, claim: Claim) -> Claim:
        """The server sees the sum and nothing else; running statistics can't be in it."""
        claim.need_client_half(self)
        try:
            _ = self.parameters.modulus
        except ValueError as error:
            raise ContractError("SEAL", self.label, str(error), "choose another ring") from error
        claim.need_no_statistics(self)
        claim.need_rounds(
            self,
            why="its clients open one sum of one round after the other, and here several are under way",
            instead="use collector=masked with scheduler.cohort, or scheduler=synchronous",
        )
        if claim.cohort is not None and claim.cohort < self.quorum:
            raise ContractError(
                claim.source("cohort"),
                self.label,
                f"{claim.cohort} clients are asked a round, and no sum of fewer than {self.quorum} is opened",
                "ask more clients a round, or lower collector.quorum and collector.decryptors",
            )
        if claim.cohort is not None and claim.cohort > self.members:
            raise ContractError(
                claim.source("cohort"),
                self.label,
                f"{claim.cohort} clients are asked a round, and the scale leaves room for {self.members}",
                f"set collector.members={claim.cohort}, or ask fewer",
            )
        return claim.given(
            self,
            visibility=Visibility.SUM,
            clear=frozenset[str](),
            metrics=frozenset(self.metrics),
            summed="uniform" if self.max_weight is None else "examples",
        )

    def least_clients(self) -> int:
        """Clients without which no round can be had."""
        return self.quorum

    def describe(self, cohort: int) -> str:
        """In a line: what the server sees, and at which error."""
        return (
            f"CKKS, degree {self.degree}: the server sees a sum of up to {cohort}, which {self.decryptors} of them open"
            f" (error below {self.parameters.error:.1g}); one client that colludes with it opens every update"
        )

    def client_half(self, own: ClientOwn) -> CkksClient:
        """The client half, with a key that no server names.

        Raises:
            ValueError: a device's node config names no key, or asks for more than the run offers.
        """
        path = own.folder / FOLDER / KEY_FILE if self.key is None else self.key
        if not own.simulated:
            named = own.settings.get(KEY_SETTING)
            if not isinstance(named, str) or not named:
                raise ValueError(
                    f"a client needs the key that the clients share: make one by `trellis keys ckks FILE`, copy it to"
                    f" each, and start its SuperNode with --node-config '{KEY_SETTING}=\"/path/to/FILE\"'"
                )
            path = Path(named)
            Conditions.of(own.settings).check(self)
        elif self.key is not None and not path.is_file():
            raise ValueError(
                f"collector.key: there is no file {path}; make it by `trellis keys ckks {path}`, or leave the setting"
                " out"
            )

        def key() -> SharedKey:
            if own.simulated and self.key is None:
                return SharedKey.load_or_make(path, self.parameters)
            return SharedKey.load(path)

        return CkksClient(self, key, own.folder / FOLDER, wears=not own.simulated)

    def open(self, job: Job, cohort: Sequence[int]) -> Session:
        """A session over the clients with these logical ids; the sum on this very model, where there is one."""
        model = self._memory.digest.of(job.records)
        if sums := self._memory.once.recall(model, job.wire):
            return Settled(sums)
        if len(cohort) > self.members:
            room = f"{len(cohort)} clients were drawn, and the scale leaves room for {self.members}"
            return Settled([Void(room)])
        return CkksSession(self, self._memory, self._draw(job), job, cohort, model)

    def state_dict(self) -> State:
        """The run's id, and which sessions on the present model came to nothing: clients ask for both."""
        return self._memory.once.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Takes up an earlier run's id, so that clients know the models that they have been in a sum on."""
        self._memory.once.load_state_dict(state)

    def _draw(self, job: Job) -> Callable[[list[int]], None]:
        """Shuffles those who may open the sum."""
        if self.seed is None:
            return secrets.SystemRandom().shuffle
        attempt = job.config.get("attempt", 0)
        rng = generator(self.seed, "openers", job.round, attempt if isinstance(attempt, int) else 0)
        return lambda clients: rng.shuffle(clients)
