"""Masked sums of cohorts on versions of their own: exact, one a model and client, and never counted twice."""

import numpy as np
import pytest
from flwr.app import Error, Message

from strategies.collectors import Masked
from strategies.combiners import Mean
from strategies.exchange import Exchange
from strategies.pipeline import Pipeline
from strategies.schedulers import Buffered, Constant
from strategies.secagg.member import MaskedClient
from strategies.secagg.policy import Policy
from strategies.secagg.terms import SECAGG
from strategies.server_models import SGD, ServerModel
from strategies.update import DELTA
from strategies.wire import CONFIG, Refused
from tests.support.buffered import after, silent, watched
from tests.support.grids import ScriptedGrid, trellis_node
from tests.support.masked import folder
from tests.support.updates import parameters

CLIENTS = 12


def vector(client: int) -> list[float]:
    return [client / 64, 1 / 4]


def node(client, path, *, seconds=1.0):
    """A real client over a folder of its own; what it refuses is an error."""
    half = MaskedClient(path / "clients", Policy())
    honest = trellis_node(
        lambda one, number, arrays: {DELTA: vector(client)},
        half=half,
        metrics={"train_loss": 0.5},
    )

    def answer(message):
        try:
            return list(honest(message))
        except Refused as refused:
            return [Message(Error(1, str(refused)), reply_to=message)]

    return after(seconds, answer)


class Server:
    """A pipeline of masked sums of three, as a process would make it."""

    def __init__(self, path, nodes, **settings):
        self.scheduler = Buffered(
            **{"buffer": 2, "cohort": 3, "concurrency": 6, "population": CLIENTS}
            | {"staleness": Constant()}
            | settings
        )
        mean = Mean(weighting="uniform")
        self.buffers = watched(mean)
        collector = Masked(dropouts=0.3, colluders=0.0, journal=path / "journal", limit=1.0)
        self.pipeline = Pipeline(combiner=mean, scheduler=self.scheduler, collector=collector)
        self.pipeline.check(frozenset({DELTA}))
        self.model = ServerModel(parameters(0, 0), self.pipeline.optimizer)
        self.grid = nodes if isinstance(nodes, ScriptedGrid) else ScriptedGrid(nodes)

    def run(self, versions, *, timeout=100.0):
        loop = self.scheduler.run(
            self.pipeline, self.model, Exchange(self.grid), versions, timeout=timeout
        )
        return list(loop)


def assert_exact(buffers) -> None:
    for held in buffers:
        for update in held:
            mean = np.mean([vector(client) for client in update.members], axis=0)
            np.testing.assert_allclose(update.delta.vector, mean, atol=1e-6)


def test_sums_of_cohorts_on_several_versions_are_those_of_their_members():
    with folder() as path:
        speeds = {client: 1.0 + client % 5 for client in range(CLIENTS)}
        nodes = {c + 1: node(c, path, seconds=s) for c, s in speeds.items()}
        server = Server(path, nodes, concurrency=12)
        views = server.run(4)
    assert [len(held) for held in server.buffers] == [2] * 4
    assert_exact(server.buffers)
    for held in server.buffers:
        members = [client for update in held for client in update.members]
        assert len(members) == len(set(members)) == 6
    assert max(age for view in views for age in view.staleness) >= 1
    assert server.pipeline.admission.refusals == {}


def test_a_cohort_that_does_not_fill_by_its_deadline_is_dissolved_and_its_clients_are_free():
    """Three of twelve never answer: a cohort with one of them has no sum, and the others are asked again."""
    with folder() as path:
        nodes = {c + 1: silent if c < 3 else node(c, path) for c in range(CLIENTS)}
        server = Server(path, nodes, deadline=10.0)
        views = server.run(3)
    assert_exact(server.buffers)
    taken = {c for held in server.buffers for update in held for c in update.members}
    assert taken <= set(range(3, CLIENTS))
    assert not views[0].void
    assert server.pipeline.admission.refusals.keys() <= {"timeout"}
    assert len(server.scheduler.flight) <= 6


def test_a_member_that_falls_out_after_its_upload_is_in_no_other_session_before_the_sum():
    """Client 0 uploads and then fails; its cohort takes its time, and the sum has it in it.

    Versions go by meanwhile. Were it in a second sum, two could be opened in one version, which is paid for once.
    """
    with folder() as path:
        asked, its = [], set()

        def falls_out(message):
            said, phase = message.content[SECAGG], message.content[CONFIG]["phase"]
            asked.append((said["session"], phase))
            its.add(asked[0][0])
            if phase == 3 and said["session"] in its:
                return [Message(Error(1, "gone"), reply_to=message)]
            return node(0, path)(message)

        def seconds(message):
            last = message.content[CONFIG]["phase"] == 3
            return 12.0 if last and message.content[SECAGG]["session"] in its else 1.0

        others = {c + 1: node(c, path, seconds=seconds) for c in range(1, CLIENTS)}
        server = Server(path, {1: falls_out, **others}, concurrency=12, cohort=4, buffer=1)
        server.run(16)
    sums = [held[0] for held in server.buffers]
    late = next(number for number, one in enumerate(sums) if 0 in one.members)
    assert late - sums[late].version >= 3
    assert [session for session, _ in asked[:4]] == [asked[0][0]] * 4
    assert all(0 not in one.members for one in sums[:late])
    assert_exact(server.buffers)


def test_a_sum_is_applied_once_though_the_model_that_is_sent_stays_the_same():
    """Steps too small for float32: all versions are one model to clients, and each is in one sum on it."""
    with folder() as path:
        nodes = {c + 1: node(c, path) for c in range(CLIENTS)}
        server = Server(path, nodes, concurrency=3, buffer=1)
        server.pipeline.optimizer = SGD(lr=1e-12)
        server.model = ServerModel(parameters(1, 1), server.pipeline.optimizer)
        server.run(3)
    members = [client for held in server.buffers for update in held for client in update.members]
    assert len(members) == len(set(members)) == 9


def test_nor_is_it_applied_again_by_a_process_that_goes_on():
    with folder() as path:
        nodes = {c + 1: node(c, path) for c in range(CLIENTS)}

        def server():
            made = Server(path, nodes, concurrency=3, buffer=1)
            made.pipeline.optimizer = SGD(lr=1e-12)
            made.model = ServerModel(parameters(1, 1), made.pipeline.optimizer)
            return made

        first, second = server(), server()
        first.run(1)
        second.pipeline.load_state_dict(first.pipeline.state_dict())
        second.model.load_state_dict(first.model.state_dict())
        second.run(2)
    (before,), (after_it,) = first.buffers[0], second.buffers[0]
    assert not set(before.members) & set(after_it.members)


class KilledError(Exception):
    """The server is gone at this moment."""


@pytest.mark.parametrize("opened", [1, 2])
def test_sums_that_were_opened_before_a_kill_are_taken_up_once(opened):
    """Killed as it takes the first or the second of two: the next process takes up what was opened."""
    with folder() as path:
        nodes = {c + 1: node(c, path) for c in range(CLIENTS)}
        first = Server(path, nodes, concurrency=3)
        taken = []

        class Dying(Constant):
            def weight(self, staleness):
                taken.append(staleness)
                if len(taken) == opened:
                    raise KilledError
                return 1.0

        first.scheduler.staleness = Dying()
        state = first.pipeline.state_dict()
        with pytest.raises(KilledError):
            first.run(1)
        before = {update.members for held in first.buffers for update in held}
        assert len(before) == opened - 1
        second = Server(path, nodes, concurrency=3)
        second.pipeline.load_state_dict(state)
        views = second.run(2)
    members = [update.members for update in second.buffers[0]]
    assert before < set(members)
    everybody = [client for one in members for client in one]
    assert len(everybody) == len(set(everybody)) == 6
    assert_exact(second.buffers)
    # Only for the sums that were missing was anybody asked on the first model.
    assert views[0].sampled == 3 * (2 - opened)
    assert [len(held) for held in second.buffers] == [2, 2]
    assert second.pipeline.admission.refusals == {}


def test_two_sessions_on_one_model_go_on_beside_each_other():
    """While both are under way neither is told that the other was void, which would let a client join twice."""
    with folder() as path:
        nodes = {c + 1: node(c, path, seconds=1.0 + (c % 2)) for c in range(CLIENTS)}
        server = Server(path, nodes, concurrency=6)
        server.run(1)
        told = [
            message.content["secagg"]["void"]
            for message in server.grid.sent
            if "secagg" in message.content and "void" in message.content["secagg"]
        ]
    assert len(told) >= 6
    assert set(told) == {b""}
    assert len(server.buffers[0]) == 2
