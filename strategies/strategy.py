"""`PipelineStrategy`: Flower's face of a pipeline.

`start` runs the whole of it. With the plain collector the per-round methods of Flower's `Strategy` work as well, for
code that drives a strategy round by round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from strategies.contract import Claim, name_of
from strategies.exchange import Exchange
from strategies.hooks import Hook, RoundView, Stop
from strategies.metrics import evaluated, scalars
from strategies.one_round import OneRound
from strategies.pipeline import Pipeline
from strategies.privacy.budget import BudgetSpentError
from strategies.profiles import told
from strategies.protocols import ConfigValue, Request
from strategies.schedulers import Synchronous
from strategies.server_models import ServerModel
from strategies.state import State, mapping_in
from strategies.update import MODEL_SECTIONS
from strategies.wire import ARRAYS, CONFIG, pack_model, unpack_model

log = logging.getLogger(__name__)

_MOST_CLIENTS = 1_000_000
"""No sampler is asked for more in search of a cohort that is large enough."""

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
_T = TypeVar("_T")


class PipelineStrategy(Strategy):
    """Runs a checked pipeline on a Flower grid.

    Args:
        pipeline: the parts.
        seed: of everything that may be repeated.
        min_clients: clients to wait for before the first round; more where the rule or the quorum need more.
        population: number of all clients: nodes that give a logical id past it are left out. None takes all.
        travel: shell patterns of the arrays that are sent and trained; the others stay as they are.
        buffers: names of float arrays that are running statistics; told by torch's names when None.
        federated_every: evaluate on the clients' own test parts after every so many rounds; 0 is never, and all that
            goes with sums: each client's figures would come in clear.
        evaluate_every: call `evaluate_fn` after every so many rounds, and after the last.
        hello: settings of the query by which nodes give their logical ids; None numbers nodes in their ids' order.
        hooks: the first hooks.

    Attributes:
        claim: what the contract says of the aggregate.
        model: the server's model, once `start` has built it.
        hooks: called after each round, in order; more may be added before `start`.
        stopped: the hook's wish that ended the run, if one did.

    Raises:
        ContractError: two parts of the pipeline may not be composed.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        seed: int = 0,
        min_clients: int = 2,
        population: int | None = None,
        travel: Sequence[str] = ("*",),
        buffers: Collection[str] | None = None,
        federated_every: int = 1,
        evaluate_every: int = 1,
        hello: Mapping[str, ConfigValue] | None = None,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self.claim: Claim = pipeline.check()
        self.claim.need_no_figures_asked(federated_every)
        self.pipeline = pipeline
        self.model: ServerModel | None = None
        self.stopped: Stop | None = None
        self._seed, self._min_clients, self._population = seed, min_clients, population
        self._travel, self._buffers = travel, buffers
        self._federated_every, self._evaluate_every = federated_every, evaluate_every
        self._hello = hello
        self.hooks = list(hooks)
        self._restored: State | None = None
        self._exchange: Exchange | None = None
        self._round: OneRound | None = None

    # ---- the whole run ----

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Runs until the model has version `num_rounds`.

        Args:
            grid: Flower's grid.
            initial_arrays: the whole initial model.
            num_rounds: the version to reach; rounds that a restored state holds are not run again.
            timeout: seconds that an attempt at a round, or waiting for clients, may take.
            train_config: settings that go with every training request.
            evaluate_config: settings that go with every evaluation request.
            evaluate_fn: central evaluation, given the round and the whole model.

        Returns:
            Flower's result: the final arrays, and metrics by round.

        Raises:
            NoClientsError: `min_clients` clients did not come in time.
            RuntimeError: this object has run before.
            ContractError: the model has buffers that a part of the pipeline can't work with.
        """
        model = self._begin(initial_arrays)
        self._take_up(train_config)
        exchange = self._exchange = self._open(grid)
        needed = self.pipeline.least_clients(_MOST_CLIENTS)
        exchange.wait_for_clients(max(self._min_clients, needed), timeout)
        if exchange.profiles:
            log.info(
                "%d devices tell: %s", len(exchange.profiles), told(exchange.profiles.values())
            )
        result = Result(arrays=initial_arrays)
        if evaluate_fn is not None and model.version == 0:
            _keep(result.evaluate_metrics_serverapp, 0, evaluate_fn(0, initial_arrays))
        views = self.pipeline.scheduler.run(
            self.pipeline, model, exchange, num_rounds, timeout=timeout, seed=self._seed
        )
        for view in self._within_budget(views):
            last = view.round == num_rounds
            evaluation = self._central(view, evaluate_fn, last)
            federated = self._federated(view, exchange, evaluate_config, timeout)
            view = replace(view, evaluation=evaluation, federated=federated)
            _keep(
                result.train_metrics_clientapp, view.round, MetricRecord(dict(view.train_metrics))
            )
            _keep(result.evaluate_metrics_serverapp, view.round, MetricRecord(dict(evaluation)))
            _keep(result.evaluate_metrics_clientapp, view.round, MetricRecord(dict(federated)))
            if self._stop(view):
                break
        result.arrays = pack_model(model.arrays())
        return result

    def summary(self) -> None:
        """Logs the parts."""
        parts = self.pipeline
        stages = ", ".join(stage.name for stage in parts.stages) or "none"
        log.info(
            "pipeline: %r, %r, %r, stages %s, %r, %r, quarantine %s",
            parts.scheduler,
            parts.sampler,
            parts.collector,
            stages,
            parts.combiner,
            parts.optimizer,
            parts.quarantine or "none",
        )

    @property
    def clock(self) -> float:
        """The exchange's clock now, in seconds; 0 before there is one."""
        return 0.0 if self._exchange is None else self._exchange.now()

    def state_dict(self) -> State:
        """Everything that must last through a restart: the model with its optimiser, and the pipeline's state.

        Raises:
            RuntimeError: there is no model yet.
        """
        return {
            "model": self._ready(self.model).state_dict(),
            "pipeline": self.pipeline.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Takes up an earlier run's state; the model follows when `start` has built it."""
        self.pipeline.load_state_dict(mapping_in(state, "pipeline"))
        self._restored = mapping_in(state, "model")

    def _open(self, grid: Grid) -> Exchange:
        lasting = self.claim.participations is not None
        return Exchange(grid, hello=self._hello, population=self._population, lasting=lasting)

    def _begin(self, initial_arrays: ArrayRecord) -> ServerModel:
        if self.model is not None:
            raise RuntimeError("a strategy object runs once: make another for another run")
        self.summary()
        self.model = ServerModel(
            unpack_model(initial_arrays),
            self.pipeline.optimizer,
            travel=self._travel,
            buffers=self._buffers,
        )
        # Only the model tells whether buffers travel, which no clip bounds and no mask hides.
        self.claim = self.pipeline.check(MODEL_SECTIONS & self.model.layouts.keys())
        if self._restored is not None:
            self.model.load_state_dict(self._restored)
        return self.model

    def _take_up(self, train_config: ConfigRecord | None) -> None:
        self.pipeline.train_config = {**self.pipeline.train_config, **(train_config or {})}

    def _central(
        self, view: RoundView, evaluate_fn: EvaluateFn | None, last: bool
    ) -> dict[str, float]:
        due = evaluate_fn is not None and (last or view.round % max(1, self._evaluate_every) == 0)
        if evaluate_fn is None or not due:
            return {}
        record = evaluate_fn(view.round, pack_model(view.model.arrays()))
        return {} if record is None else scalars(record)

    def _federated(
        self, view: RoundView, exchange: Exchange, config: ConfigRecord | None, timeout: float
    ) -> dict[str, float]:
        if not self._federated_every or view.round % self._federated_every:
            return {}
        record = self.pipeline.released(view.model)
        requests = [
            self._evaluation(client, view.round, record, config or ConfigRecord())
            for client in exchange.clients()
        ]
        replies = exchange.ask(requests, timeout)
        contents = (reply.content for reply in replies if reply.content is not None)
        return evaluated(contents, self.pipeline.admission.max_examples)

    def _evaluation(
        self, client: int, round_number: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> Request:
        settings = {
            **self.pipeline.train_config,
            **config,
            "server-round": round_number,
            "client": client,
        }
        return Request(
            client,
            "evaluate",
            RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord(settings)}),
            round_number,
        )

    def _within_budget(self, views: Iterable[RoundView]) -> Iterator[RoundView]:
        """Views until there is no budget for another: the model stays the last one that was paid for."""
        try:
            yield from views
        except BudgetSpentError as error:
            log.warning("the run ends: %s", error)
            self.stopped = Stop(error.reason)

    def _stop(self, view: RoundView) -> bool:
        # Lazily: a hook that ends the run ends this round's hooks as well.
        wishes = (hook(view) for hook in self.hooks)
        self.stopped = next((wish for wish in wishes if wish is not None), None)
        return self.stopped is not None

    # ---- Flower's round-by-round face ----

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One round's requests. The model is the strategy's own: `arrays` only starts it.

        Settings in `config` go with this round's requests and, until they are set again, with those that follow.

        Raises:
            ValueError: the round is not the one that follows the model's version.
            RuntimeError: the scheduler has no such rounds, or the collector several phases: only `start` runs them.
        """
        self._check_by_hand()
        model = self.model if self.model is not None else self._begin(arrays)
        self._take_up(config)
        if server_round != model.version + 1:
            raise ValueError(
                f"round {model.version + 1} comes next, not {server_round}: use `start` to run rounds"
            )
        exchange = self._exchange = self._exchange or self._open(grid)
        self._round = OneRound(self.pipeline, model, exchange, self._seed)
        return self._round.messages()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new model out of one round's replies; (None, None) when fewer than the quorum are good."""
        model, metrics = self._ready(self.model), self._ready(self._round).conclude(replies)
        return (None, None) if metrics is None else (pack_model(model.arrays()), metrics)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Evaluation requests to every client that is there."""
        if not self._federated_every or server_round % self._federated_every:
            return []
        exchange = self._exchange = self._exchange or self._open(grid)
        requests = [
            self._evaluation(client, server_round, arrays, config) for client in exchange.clients()
        ]
        return [
            Message(r.content, exchange.node_of(r.client), r.kind, group_id=str(r.round))
            for r in requests
        ]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Means of the clients' metrics, weighted by examples; None when no reply can be read."""
        contents = (message.content for message in replies if message.has_content())
        means = evaluated(contents, self.pipeline.admission.max_examples)
        return MetricRecord(dict(means)) if means else None

    def _check_by_hand(self) -> None:
        """Refuses what only `start` runs."""
        if not isinstance(self.pipeline.scheduler, Synchronous):
            raise RuntimeError(
                f"{name_of(self.pipeline.scheduler)} has no rounds: it runs by `start` only"
            )
        if self.pipeline.scheduler.cuts:
            raise RuntimeError(
                "over_selection, deadline and enough cut a round short: they run by `start` only"
            )
        if (phases := self.pipeline.collector.phases) > 1:
            raise RuntimeError(
                f"{name_of(self.pipeline.collector)} has {phases} phases a round: a collector of several phases runs"
                f" by `start` only"
            )

    @staticmethod
    def _ready(value: _T | None) -> _T:
        if value is None:
            raise RuntimeError("no round has begun: call `start`, or `configure_train` first")
        return value


def _keep(history: dict[int, MetricRecord], round_number: int, record: MetricRecord | None) -> None:
    if record:
        history[round_number] = record
