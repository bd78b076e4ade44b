"""Momentum on the clients: m ← β·m + (1 − β)·Δ over the rounds that the server took."""

import numpy as np
import pytest

from clients.resident import ResidentModel, arrays_of
from clients.trainers import SGD, Proximal
from fl_app.engine.flwr_internals import claim_identity
from strategies.replies import Expected, read_update
from strategies.update import DELTA
from tests.clients.test_client import client, module, request

BETA = 0.75


@pytest.fixture(autouse=True)
def _identity():
    claim_identity(1)


def sent(tmp_path, trainer: SGD, number: int, included: int = 0) -> np.ndarray:
    one = client(tmp_path, trainer)
    (reply,) = one.answer([request(**{"server-round": number, "included": included})])
    return _delta(reply, number)


def _delta(reply, number: int) -> np.ndarray:
    layout = ResidentModel(module(), arrays_of(module())).layout
    return read_update(reply.content, Expected({DELTA: layout}, 1, number, 2)).delta.vector


@pytest.mark.parametrize("kind", [SGD, Proximal])
def test_a_client_sends_the_mean_over_the_rounds_that_were_taken(tmp_path, kind):
    plain, slow = kind(lr=0.1), kind(lr=0.1, worker_momentum=BETA)
    changes = {number: sent(tmp_path / "plain", plain, number) for number in (1, 2, 3)}
    first = sent(tmp_path / "slow", slow, 1)
    assert first.tobytes() == changes[1].tobytes()
    second = sent(tmp_path / "slow", slow, 2, included=1)
    assert np.allclose(second, BETA * changes[1] + (1 - BETA) * changes[2], atol=1e-7)
    # The second round's update was lost: the third goes on from the first.
    third = sent(tmp_path / "slow", slow, 3, included=1)
    assert np.allclose(third, BETA * changes[1] + (1 - BETA) * changes[3], atol=1e-7)


def test_without_momentum_nothing_is_kept(tmp_path):
    sent(tmp_path, SGD(lr=0.1), 1)
    assert list(tmp_path.iterdir()) == []
    assert not SGD().remembers
    assert SGD(worker_momentum=0.9).remembers


def test_clients_trained_together_send_the_same(tmp_path):
    trainer = SGD(lr=0.1, worker_momentum=BETA)
    for number, included in ((1, 0), (2, 1)):
        requests = [
            request(who=who, **{"server-round": number, "included": included}) for who in (0, 1)
        ]
        alone = client(tmp_path / "alone", trainer).answer(requests)
        together = client(tmp_path / "together", trainer, together=True).answer(requests)
        assert np.allclose(_delta(alone[1], number), _delta(together[1], number), atol=1e-5)
