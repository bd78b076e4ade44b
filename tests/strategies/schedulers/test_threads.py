"""A thousand clients at once in real threads: no update is lost, none counted twice."""

import random
import threading

import numpy as np
import pytest
from flwr.app import Error, Message

from strategies.combiners import Mean
from strategies.exchange import Exchange
from strategies.pipeline import Pipeline
from strategies.schedulers import Buffered, Constant
from strategies.server_models import ServerModel
from strategies.update import DELTA
from strategies.wire import CONFIG
from tests.support.buffered import watched
from tests.support.grids import trellis_node
from tests.support.threads import ThreadedGrid
from tests.support.updates import parameters

CLIENTS, BUFFER, VERSIONS, SLOTS = 1000, 100, 25, 6000


class Clients:
    """Each request's update is one-hot in a place of its own: the model tells which ones it took, and how often.

    One in ten fails, one in twenty never answers, and one in ten answers twice.
    """

    def __init__(self) -> None:
        self._lock, self._next = threading.Lock(), 0
        self.places: dict[tuple[int, int, int], int] = {}

    def answer(self, message: Message) -> list[tuple[float, Message]]:
        config = message.content[CONFIG]
        rng = random.Random(f"{config['client']} {config['version']} {config['attempt']}")
        fate, seconds = rng.random(), rng.expovariate(1 / 0.004)
        if fate < 0.1:
            return [(seconds, Message(Error(2, "out of memory"), reply_to=message))]
        if fate < 0.15:
            return []
        with self._lock:
            place, self._next = self._next, self._next + 1
            self.places[config["client"], config["version"], config["attempt"]] = place
        vector = np.zeros(SLOTS, np.float32)
        vector[place] = BUFFER  # a step of a mean over K adds 1
        honest = trellis_node(lambda *_: {DELTA: vector})
        (reply,) = honest(message)
        again = [(0.0, reply)] if fate < 0.25 else []
        return [(seconds, reply), *again]


def test_a_thousand_clients_at_once_in_threads_lose_and_double_nothing():
    clients, mean = Clients(), Mean(weighting="uniform")
    buffers = watched(mean)
    scheduler = Buffered(
        buffer=BUFFER,
        concurrency=CLIENTS,
        staleness=Constant(),
        max_staleness=VERSIONS,
        deadline=3.0,
        population=CLIENTS,
    )
    pipeline = Pipeline(combiner=mean, scheduler=scheduler)
    pipeline.check(frozenset({DELTA}))
    model = ServerModel(parameters(*np.zeros(SLOTS)), pipeline.optimizer)
    views = []
    with ThreadedGrid(CLIENTS, clients.answer) as grid:
        exchange = Exchange(grid)
        for view in scheduler.run(pipeline, model, exchange, VERSIONS, timeout=60.0):
            views.append(view)
            assert len(scheduler.flight) <= CLIENTS
    held = model.parameters
    np.testing.assert_allclose(held, np.rint(held), atol=1e-9)
    # Every update that was taken is in the model once, and nothing else is.
    assert set(np.unique(np.rint(held))) == {0, 1}
    taken = [int(np.argmax(update.delta.vector)) for buffer in buffers for update in buffer]
    assert len(taken) == len(set(taken)) == BUFFER * VERSIONS
    np.testing.assert_array_equal(np.flatnonzero(held > 0.5), sorted(taken))
    assert held.sum() == pytest.approx(BUFFER * VERSIONS)
    members = [[update.members[0] for update in buffer] for buffer in buffers]
    assert all(len(set(one)) == BUFFER for one in members)
    # Whoever was asked was taken, has failed, or is still at work.
    sampled, failed = sum(v.sampled for v in views), sum(v.failed for v in views)
    assert sampled == grid.pushed == len(taken) + failed + len(scheduler.flight)
    assert failed > 0
    assert max(age for view in views for age in view.staleness) > 1
    assert sum(v.rejected for v in views) == 0
