"""Rounds of encrypted training without a scheduler: real owners and a real party, messages handed over by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message, RecordDict

from clients.client import NUM_CLIENTS, Client
from clients.encrypted.network import PolynomialNet
from clients.encrypted.party import ComputeParty
from clients.encrypted.party_learner import PartyLearner
from clients.encrypted.plan import Plan, plan_of
from clients.encrypted.sizes import turn_bytes
from clients.encrypted.trainer import EncryptedTrainer
from clients.encrypted.turn import SPEC, spec_of
from clients.resident import arrays_of
from clients.store import ClientStore
from clients.tasks import Digits, FederatedData, Task
from clients.trainers import SGD
from fl_app.engine.flwr_internals import claim_identity
from strategies.collectors import Encrypted
from strategies.collectors.encrypted import EncryptedSession, RelayedSession
from strategies.protocols import ConfigValue, Event, Job, Refusal, Reply, Request
from strategies.server_models.model import sections_of
from strategies.update import Update
from strategies.wire import ARRAYS, pack_model

TASK = Digits()

Spoil = Callable[[int, Request], None]


def network(*hidden: int) -> PolynomialNet:
    """Small, with the same weights each time; without hidden units a logistic regression, in a smaller ring."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return PolynomialNet(
            TASK.input_shape, TASK.num_classes, hidden=hidden, features="pool", number=16,
            hidden_scale=0.5,
        )  # fmt: skip


def plan_for(trainer: EncryptedTrainer, *hidden: int) -> Plan:
    """The plan that a trainer's owners and their party share."""
    return plan_of(spec_of(network(*hidden), trainer.batch_size, trainer.mode))


class Serving:
    """The party as the collector is handed it."""

    def __init__(self, party: ComputeParty, told: str | None = None) -> None:
        self.party, self._told = party, told or party.plan.spec.digest

    def describe(self) -> str:
        return "a test"

    def settings(self) -> dict[str, ConfigValue]:
        return {SPEC: self._told}

    def turn_bytes(self) -> int:
        return turn_bytes(self.party.plan)

    def begin(self, sent: Any) -> Any:
        return PartyLearner(self.party, sent)


@dataclass
class OwnersRun:
    """Owners and what computes for them.

    Attributes:
        folder: where owners keep their files.
        trainer: of the owners.
        serving: the party; None where a client computes.
        hidden: units of the model.
        num_clients: that the data are cut among.
        task: data and loss.
        compute_client: the client that computes.
        fresh_clients: each message is answered by a process that has just been started.
        spoil: changes what an owner is sent, given its turn.
        replies: of the last round, in their order.
    """

    folder: Path
    trainer: SGD
    serving: Serving | None
    hidden: tuple[int, ...] = ()
    num_clients: int = 1
    task: Task = TASK
    compute_client: int | None = None
    fresh_clients: bool = False
    spoil: Spoil = lambda turn, request: None
    replies: list[RecordDict] = field(default_factory=list, init=False)
    _client: Client | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        claim_identity(1)
        self.arrays = arrays_of(network(*self.hidden))

    def data(self, count: int = 0) -> FederatedData:
        return FederatedData(self.task, count or self.num_clients, partition="iid", seed=3)

    def client(self) -> Client:
        if self._client is None or self.fresh_clients:
            store = ClientStore(self.folder)
            self._client = Client(
                self.task,
                network(*self.hidden),
                self.data,
                self.trainer,
                store=store,
                ledgers=self.folder,
            )
        return self._client

    def job(self, number: int) -> Job:
        kinds, layouts = sections_of(self.arrays, [])
        layouts = {name: layout for name, layout in layouts.items() if layout.names}
        config: dict[str, ConfigValue] = {NUM_CLIENTS: self.num_clients}
        records = {ARRAYS: pack_model(self.arrays)}
        return Job(number, 0, records, config, {}, layouts, kinds)

    def session(self, number: int) -> EncryptedSession | RelayedSession:
        mode = getattr(self.trainer, "mode", "ce")
        collector = Encrypted(mode=mode, served=self.serving, compute_client=self.compute_client)
        owners = [one for one in range(self.num_clients) if one != self.compute_client]
        return collector.open(self.job(number), owners)

    def run(self, number: int = 1) -> dict[int, Update | Refusal]:
        """A round to its end; what became of each owner. All turn 0 are answered before any other turn is."""
        session = self.session(number)
        waiting = list(session.start())
        self.replies.clear()
        became: dict[int, Update | Refusal] = {}
        while waiting:
            request = waiting.pop(0)
            for event in session.receive(self._answered(request)):
                if isinstance(event, Request):
                    waiting.append(event)
                else:
                    became |= dict.fromkeys(_clients(event), event)
        assert session.done
        return became

    def _answered(self, request: Request) -> Reply:
        config: Any = request.content["config"]
        self.spoil(int(config["encrypted.turn"]), request)
        (message,) = self.client().answer([Message(request.content, 1, request.kind)])
        if message.has_error():
            return Reply(request, None, str(message.error.reason))
        self.replies.append(message.content)
        return Reply(request, message.content, None)


def _clients(event: Event) -> Iterator[int]:
    if isinstance(event, Refusal):
        yield event.client
    elif isinstance(event, Update):
        yield from event.members
