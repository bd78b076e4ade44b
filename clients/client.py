"""A client process: answers Flower messages for the logical clients that it is asked to be.

A deployed ClientApp passes one message, the engine a sequence; both go the same way. The reply to a request that can't
be served is an error with its reason, never an exception that would take other requests with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from numpy.typing import NDArray
from torch import nn

from clients.fitting import Fitting, MicroBatch, shapes_of
from clients.half_done import HalfDoneFits
from clients.poisoning import DataPoisoning
from clients.resident import Arrays, ModuleMaker, arrays_of
from clients.retrying import ONCE, Retry, Retrying
from clients.split.trainer import Turns
from clients.store import ClientStore
from clients.tasks import Examples, FederatedData, Task, evaluate
from clients.trainers import SGD, Fit, FitJob
from clients.trainers.course import STRAIGHT, Course, Pause
from strategies.attacks import LIE, Attack, Attacker, Omniscient
from strategies.collectors import PlainClient
from strategies.configuration import kept_in
from strategies.downlink import HeldModels
from strategies.encoding import encode
from strategies.profiles import DEVICE, pack_profile
from strategies.protocols import ClientHalf, Stage
from strategies.records import record_in, records_in
from strategies.seeds import generator, integer
from strategies.update import Update
from strategies.wire import (
    ARRAYS,
    CONFIG,
    METRICS,
    NUM_EXAMPLES,
    PAUSED,
    TRAINS,
    Refused,
    config_of,
    integer_in,
    unpack,
    unpack_model,
)

log = logging.getLogger(__name__)

_NO_SECRET = frozenset({"key", "missing", PAUSED, "phase", "terms", "worn"})
"""Refusals that depend on no example: also silent clients tell them, or a run would end in noise without a word."""

CODE_HASH = "code-hash"
CONFIG_HASH = "config-hash"
NUM_CLIENTS = "num-clients"
_AT_ONCE = 512
"""Examples that are evaluated at a time, where memory allows."""
_STAGES = "stages/"
"""Before the names of what stages remember, beside what the trainer does."""


class MismatchError(ValueError):
    """The server runs other code or another configuration than this client."""


@runtime_checkable
class Keeping(Protocol):
    """A trainer that writes down what must outlast a message."""

    def keeping(self, folder: Path) -> SGD:
        """The same trainer, which writes into a folder."""
        ...


class Client:
    """Trains, evaluates and introduces itself.

    Args:
        task: loss and metrics.
        module: the architecture; its weights come with each request. Or what makes it for arrays of given names and
            shapes and a request's settings, where clients have parts of a model.
        data: the task's data cut among so many clients.
        trainer: how a client fits.
        stages: client halves, in order.
        half: the collector's: what becomes of an encoded update; the plain collector's by default.
        held: the models that clients hold; None where requests come with the whole of theirs.
        store: what clients remember.
        ledgers: where clients write down what must outlast a message: what their privacy has been charged, what they
            are in the middle of; only trainers that do look at it.
        seed: the run's.
        hashes: of this end's code and configuration, held against those of each request.
        attack: what lying clients send, in experiments.
        together: whether the clients of one call are trained at once (`clients.trainers.together`).
        only: the one logical client that this process may be, on a device; None on a machine that plays them all.
        secretive: nothing of this client's examples may travel but by `half`: it does not say how a model does on them,
            nor why a training failed.
        silent: not even that a training failed: an update of zeros goes the way of all updates, clip, noise and mask.
        retry: how often a training or an evaluation is tried.
        pause: asked before and during training; while it gives a reason, requests are refused as `paused`.
        half_done: where local training goes on after this process has died, or was paused; None for nowhere.
        micro_batch: says how many examples of a batch fit in memory at a time.
    """

    def __init__(
        self,
        task: Task,
        module: nn.Module | ModuleMaker,
        data: Callable[[int], FederatedData],
        trainer: SGD,
        *,
        stages: Sequence[Stage] = (),
        half: ClientHalf | None = None,
        held: HeldModels | None = None,
        store: ClientStore,
        ledgers: Path | None = None,
        seed: int = 0,
        hashes: Mapping[str, str] | None = None,
        attack: Attack | None = None,
        together: bool = False,
        only: int | None = None,
        secretive: bool = False,
        silent: bool = False,
        retry: Retry = ONCE,
        pause: Pause | None = None,
        half_done: HalfDoneFits | None = None,
        micro_batch: MicroBatch | None = None,
    ) -> None:
        if ledgers is not None and isinstance(trainer, Keeping):
            trainer = trainer.keeping(ledgers)
        self._task, self._trainer = task, trainer
        self._make_data = data
        self._data: dict[int, FederatedData] = {}
        self._stages, self._store = tuple(stages), store
        self._half: ClientHalf = half or PlainClient()
        self._held = held
        self._seed, self._hashes = seed, dict(hashes or {})
        self._attack = attack
        self._liars: dict[int, frozenset[int]] = {}
        self._only, self._secretive, self._silent = only, secretive, silent
        self._pause, self._half_done = pause, half_done
        self._retrying = Retrying(retry, tells=not secretive)
        self._fitting = Fitting(
            task, module, trainer, self._retrying, together=together, micro_batch=micro_batch
        )

    def answer(self, messages: Sequence[Message]) -> list[Message]:
        """One reply per request, in order; each request's config says which client is meant."""
        replies: dict[int, Message] = {}
        jobs: list[tuple[int, FitJob]] = []
        models: dict[int, Arrays] = {}
        messages = list(messages)
        for index, message in enumerate(messages):
            try:
                if self._held is not None:
                    message = messages[index] = self._held.whole(message)
                config = config_of(message.content)
                self._compare(config)
                self._is_meant(config)
                ready = self._without_training(message, config)
                if ready is None:
                    jobs.append((index, self._job(message, config, models)))
                else:
                    replies[index] = Message(ready, reply_to=message)
            except Exception as error:  # a full disk, say: this client's misfortune alone
                replies[index] = self._failed(message, error)
        for (index, job), fit in zip(
            jobs, self._fitting.fit([job for _, job in jobs]), strict=True
        ):
            try:
                replies[index] = self._reply(messages[index], job, fit)
            except Exception as error:  # as above
                replies[index] = self._failed(messages[index], error)
        return [replies[index] for index in range(len(messages))]

    def _without_training(self, message: Message, config: ConfigRecord) -> RecordDict | None:
        """The reply to a request for which nothing has to be trained; None where something has."""
        if not message.metadata.message_type.startswith("train"):
            return self._evaluate(message)
        if config.get(TRAINS, True):
            return self._half.prepare(message.content)
        if isinstance(self._trainer, Turns):
            job = self._job(message, config, {})
            return self._trainer.turn(job, self._fitting.resident, self._task)
        return self._half.answer(message.content)

    def hello(
        self, message: Message, client: int, profile: Mapping[str, str] | None = None
    ) -> Message:
        """The reply to the query by which the server learns which logical client a node is.

        Args:
            message: the query.
            client: the logical client.
            profile: what the device tells of itself, in the words of `strategies.profiles`; None for nothing.
        """
        try:
            self._compare(config_of(message.content))
        except (MismatchError, Refused) as error:
            return _failure(message, error)
        content = RecordDict({CONFIG: ConfigRecord({"client": client})})
        if profile is not None:
            content[DEVICE] = pack_profile(profile)
        return Message(content, reply_to=message)

    def _compare(self, config: ConfigRecord) -> None:
        for key, name in ((CODE_HASH, "code"), (CONFIG_HASH, "configuration")):
            theirs, ours = config.get(key), self._hashes.get(key)
            if theirs is not None and ours is not None and theirs != ours:
                raise MismatchError(
                    f"the server's {name} ({str(theirs)[:12]}) differs from this client's ({ours[:12]}): "
                    f"install the same version on both, and start the SuperLink from this checkout"
                )

    def _is_meant(self, config: ConfigRecord) -> None:
        """Refuses to be another client than the device's own: one that is many passes for a quorum of its own."""
        if self._only is not None and integer_in(config, "client") != self._only:
            raise Refused("client", f"this device is client {self._only}, and no other")

    def _federated(self, config: ConfigRecord) -> FederatedData:
        count = integer_in(config, NUM_CLIENTS)
        if count not in self._data:
            self._data[count] = self._make_data(count)
        return self._data[count]

    def _job(self, message: Message, config: ConfigRecord, models: dict[int, Arrays]) -> FitJob:
        """What a request asks for; requests that share a model's record share its arrays in `models`.

        Raises:
            Refused: `paused`, or as the request deserves.
        """
        if self._pause is not None and (reason := self._pause()) is not None:
            raise Refused(PAUSED, reason)
        client = integer_in(config, "client")
        records = records_in(message.content, ArrayRecord)
        model = records.get(ARRAYS)
        arrays = {} if model is None else models.get(id(model))
        if arrays is None:
            arrays = models[id(model)] = unpack_model(records[ARRAYS])
        examples = self._retrying.call(lambda: self._examples(self._federated(config), client))
        job = FitJob(
            client=client,
            arrays=arrays,
            broadcast={
                name: _flat(record, name)
                for name, record in records.items()
                if name not in self._not_broadcast
            },
            examples=examples,
            seed=integer(self._seed, "train", integer_in(config, "server-round"), client),
            state=self._store.load(client, integer_in(config, "included"))
            if self._remembers
            else {},
            settings=dict(config.items()),
            records={name: r for name, r in records.items() if name in self._trainer.own_records},
        )
        return replace(job, course=self._course(job))

    def _course(self, job: FitJob) -> Course:
        """How a job is gone through: as it comes, where it is a turn of a session."""
        if isinstance(self._trainer, Turns):
            return STRAIGHT
        return Course(
            pause=self._pause,
            keeper=None if self._half_done is None else self._half_done.of(job),
            careful=self._retrying.tries_again,
        )

    @property
    def _not_broadcast(self) -> set[str]:
        """Records that hold something else than one vector for the trainer; only liars look for a lie."""
        lies = {LIE} if isinstance(self._attack, Omniscient) else set[str]()
        return {ARRAYS, *lies, *self._trainer.own_records}

    def _examples(self, data: FederatedData, client: int) -> Examples:
        examples = data.train(client)
        if isinstance(self._attack, DataPoisoning) and self._is_liar(client, data.num_clients):
            rng = generator(self._seed, "poisoned examples", client)
            examples = self._attack.corrupt(examples, self._task, rng)
        return examples

    def _is_liar(self, client: int, num_clients: int) -> bool:
        if self._attack is None:
            return False
        if num_clients not in self._liars:
            self._liars[num_clients] = self._attack.attackers(num_clients, self._seed)
        return client in self._liars[num_clients]

    def _lie(self, update: Update, message: Message, round_number: int) -> Update:
        """What is sent in place of an update: itself, unless the client has been told to lie."""
        (client,), count = update.members, integer_in(config_of(message.content), NUM_CLIENTS)
        if self._attack is None or not self._is_liar(client, count):
            return update
        told = record_in(message.content, LIE, ArrayRecord)
        lies = {} if told is None else {name: _flat(told, name) for name in told}
        return self._attack.tell(update, Attacker(client, round_number, count, self._seed, lies))

    @property
    def _remembers(self) -> bool:
        """Whether the trainer or a stage keeps state: only then is the disk touched."""
        return any(getattr(part, "remembers", False) for part in (self._trainer, *self._stages))

    def _reply(self, message: Message, job: FitJob, fit: Fit | Exception) -> Message:
        if isinstance(fit, Exception):
            if not self._silent or (isinstance(fit, Refused) and fit.reason in _NO_SECRET):
                return self._failed(message, fit)
            log.warning("client %d sends zeros, as its training failed: %s", job.client, fit)
            fit = self._nothing(job)
        config = config_of(message.content)
        round_number = integer_in(config, "server-round")
        update = Update(
            fit.sections,
            float(fit.num_examples),
            (job.client,),
            integer_in(config, "version"),
            fit.metrics,
        )
        lie = self._lie(update, message, round_number)
        remembered: dict[str, NDArray[np.float32]] = {}
        memory = _of_stages(job.state)
        encoded = encode(lie, self._stages, config, job.client, memory, remembered)
        if state := {**fit.state, **{_STAGES + key: v for key, v in remembered.items()}}:
            included = integer_in(config, "included")
            self._store.propose(job.client, included, round_number, state, kept_in(config))
        reply = self._half.reply(encoded, message.content)
        if self._half_done is not None:
            self._half_done.drop(job.client)
        return Message(reply, reply_to=message)

    def _nothing(self, job: FitJob) -> Fit:
        """What training on no examples comes to."""
        model = self._fitting.resident(shapes_of(job.arrays), job.settings)
        model.load(job.arrays or arrays_of(model.module))
        return Fit(model.sections(), 1, {})

    def _failed(self, message: Message, error: Exception) -> Message:
        """The reply that something failed; of secretive clients without what it was, which may tell of an example."""
        if self._secretive and not isinstance(error, Refused | MismatchError):
            log.warning("a training failed, which the server is not told", exc_info=error)
            error = Refused("training", "the client took no part")
        return _failure(message, error)

    def _evaluate(self, message: Message) -> RecordDict:
        if self._secretive:
            raise Refused(
                "clear", "this device sends no metrics in clear: set evaluate.federated_every=0"
            )
        config, retrying = config_of(message.content), self._retrying
        client = integer_in(config, "client")
        examples = retrying.call(lambda: self._federated(config).test(client))
        arrays = unpack_model(records_in(message.content, ArrayRecord)[ARRAYS])
        metrics: dict[str, float] = {"num_examples": 0.0}
        if len(examples):
            metrics = retrying.measured(
                lambda size: self._measured(config, arrays, examples, size), _AT_ONCE
            )
        count = metrics.pop("num_examples")
        return RecordDict({METRICS: MetricRecord({NUM_EXAMPLES: count, **metrics})})

    def _measured(
        self, config: ConfigRecord, arrays: Arrays, examples: Examples, batch_size: int
    ) -> dict[str, float]:
        """Loss and metrics of a model that was sent."""
        model = self._fitting.resident(shapes_of(arrays), dict(config.items()))
        model.load(arrays)
        device = self._trainer.torch_device
        return evaluate(model.module, self._task, examples, device=device, batch_size=batch_size)


def _failure(message: Message, error: Exception) -> Message:
    # With its traceback, which goes to the run's log alone: the fault may lie in a part of the user's own. A refusal is
    # no fault.
    trace = None if isinstance(error, Refused) else error
    log.warning("a %s request failed: %s", message.metadata.message_type, error, exc_info=trace)
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, Refused):
        said = error.told
    elif isinstance(error, OSError):  # whose text names a path of the client's
        said = f"{type(error).__name__}: {error.strerror}"
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, said), reply_to=message)


def _of_stages(state: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """What a client's stages remember, of all that it does."""
    return {key[len(_STAGES) :]: v for key, v in state.items() if key.startswith(_STAGES)}


def _flat(record: ArrayRecord, name: str) -> NDArray[np.float32]:
    """The one vector of a record that was broadcast beside the model."""
    return unpack(record[name], f"vector {name!r}").astype(np.float32, copy=False)
