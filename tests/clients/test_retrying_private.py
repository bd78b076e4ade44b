"""Under privacy another attempt is another charge, or is not made; and what is told is no more than without retries."""

import numpy as np
import pytest

from clients.client import Client
from clients.dp_ledger import ClientLedger
from clients.retrying import Retry
from clients.store import ClientStore
from clients.tasks import Digits
from clients.trainers import SGD, DpSgd
from fl_app.engine.flwr_internals import claim_identity
from strategies.wire import METRICS, NUM_EXAMPLES
from tests.clients.test_client import data, module, request, update_in
from tests.clients.test_dp_sgd import answered

PATIENT = Retry(attempts=3, backoff_seconds=0.0)
TOLD = "training: this client takes no part, and its own log says why"


@pytest.fixture(autouse=True)
def _identity():
    claim_identity(1)


class Failing(Digits):
    """Digits whose loss on examples, not on the trial's zeros, raises so many times."""

    def __init__(self, times: int, error: Exception) -> None:
        super().__init__()
        self.times, self.error, self.sizes = times, error, []

    def losses(self, output, targets):
        if targets.any():
            self.sizes.append(len(targets))
            if len(self.sizes) <= self.times:
                raise self.error
        return super().losses(output, targets)


def trainer(**settings) -> DpSgd:
    return DpSgd(**{"batch_size": 64, "lr": 0.1, "noise_multiplier": 1.0, "accountant": "rdp", **settings})  # fmt: skip


def epsilon_of(reply) -> float:
    assert not reply.has_error(), reply.error.reason
    return reply.content[METRICS]["epsilon"]


def epsilons(folder, rounds: int) -> list[float]:
    """ε after the first round, the second and so on, of a client that nothing happens to."""
    ours = answered(folder, trainer())
    asked = [request(**{"server-round": number}) for number in range(1, rounds + 1)]
    return [epsilon_of(ours.answer([one])[0]) for one in asked]


def test_each_attempt_is_charged_before_it_looks_at_an_example(tmp_path):
    task = Failing(1, RuntimeError("the device blinked"))
    ours = answered(tmp_path, trainer(), task, retry=PATIENT, secretive=True)
    (reply,) = ours.answer([request()])
    assert len(ClientLedger(tmp_path, 1).charges()) == 2
    assert epsilon_of(reply) == epsilons(tmp_path / "plain", 2)[1]
    assert set(reply.content[METRICS]) == {NUM_EXAMPLES, "epsilon"}


def test_an_attempt_that_the_budget_has_no_room_for_is_not_made(tmp_path):
    one, two = epsilons(tmp_path / "plain", 2)
    task = Failing(1, RuntimeError("the device blinked"))
    limited = trainer(target_epsilon=(one + two) / 2)
    (reply,) = answered(tmp_path, limited, task, retry=PATIENT, secretive=True).answer([request()])
    assert reply.error.reason == TOLD
    assert len(ClientLedger(tmp_path, 1).charges()) == 1
    assert len(task.sizes) == 1


def test_fewer_examples_at_a_time_are_charged_attempts_too(tmp_path):
    task = Failing(100, MemoryError())
    (reply,) = answered(tmp_path, trainer(), task, retry=PATIENT).answer([request()])
    assert reply.error.reason == TOLD
    assert len(ClientLedger(tmp_path, 1).charges()) == len(task.sizes) == PATIENT.attempts
    assert task.sizes[1] <= 32
    assert task.sizes[2] <= 16


def test_the_step_is_the_same_with_fewer_examples_at_a_time(tmp_path):
    """The same coins and noise, from the seed: no promise, and nothing charged."""
    seeded = trainer(reproducible_noise=True)
    task = Failing(1, MemoryError())
    (reply,) = answered(tmp_path, seeded, task, retry=PATIENT).answer([request()])
    (plain,) = answered(tmp_path / "plain", seeded).answer([request()])
    np.testing.assert_allclose(
        update_in(reply).delta.vector, update_in(plain).delta.vector, atol=1e-6
    )


def test_a_silent_client_sends_zeros_after_its_last_attempt(tmp_path):
    task = Failing(10_000, RuntimeError("for good"))
    ours = Client(
        task, module(), data, SGD(batch_size=16), store=ClientStore(tmp_path),
        retry=PATIENT, secretive=True, silent=True,
    )  # fmt: skip
    (reply,) = ours.answer([request()])
    assert not reply.has_error()
    assert not update_in(reply).delta.vector.any()
    assert set(reply.content[METRICS]) == {NUM_EXAMPLES}
    assert len(task.sizes) == PATIENT.attempts
