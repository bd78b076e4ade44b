"""An error is the result of its own job, and says no more than the client says of any failed training."""

import numpy as np
import pytest
import torch

from clients.client import Client
from clients.dp_ledger import ClientLedger
from clients.fitting import Fitting
from clients.micro_batch import FreeMemory
from clients.retrying import Retry, Retrying
from clients.store import ClientStore
from clients.tasks import Digits, Examples, FederatedData
from clients.trainers import SGD, DpSgd, FitJob
from fl_app.engine.flwr_internals import claim_identity
from strategies.stages import Clip
from tests.clients.test_client import CLIENTS, TASK, data, module, request, update_in
from tests.clients.test_retrying import Greedy, client

SECRET = "Target 12 is out of bounds."
CLIP = {"clip.norm": 1.0}
KINDS = {
    "open": {},
    "secretive": {"secretive": True},
    "silent": {"secretive": True, "silent": True},
}


@pytest.fixture(autouse=True)
def _identity():
    claim_identity(1)


class WrongFor(FederatedData):
    """Digits of which one client's have a label that there is none of: torch itself raises, and names it."""

    def __init__(self, who: int) -> None:
        super().__init__(TASK, CLIENTS, partition="iid", seed=3)
        self.who = who

    def train(self, client: int) -> Examples:
        examples = super().train(client)
        if client != self.who:
            return examples
        return Examples(examples.inputs, torch.full_like(examples.targets, 12))


class Short(Digits):
    """Digits for which memory runs out on the label 12."""

    def losses(self, output, targets):
        if (targets == 12).any():
            raise MemoryError
        return super().losses(output, targets)


def with_a_wrong_label(folder, trainer: SGD, task: Digits = TASK, **options) -> Client:
    """Of client 1."""
    store = ClientStore(folder)
    return Client(
        task, module(), lambda _: WrongFor(1), trainer, store=store, seed=11, ledgers=folder, **options
    )  # fmt: skip


def plenty(trainer: SGD) -> FreeMemory:
    return FreeMemory(trainer, free=lambda: 10**12)


def failing_for(who: int, error: Exception):
    """Asks how many fit, and fails for one client."""

    def ask(job, model, task):
        if job.client == who:
            model.module.zero_grad()
            model.flat.fill_(
                np.nan
            )  # a measurement that is broken off leaves the model as it likes
            raise error
        return None

    return ask


@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_runs_out_in_the_measuring_has_one_example_trained_at_a_time(tmp_path, kind):
    trainer, options = SGD(lr=0.1, batch_size=16), {"stages": [Clip(norm=1.0)], **KINDS[kind]}
    task = Greedy(64, MemoryError())
    asked = [request(who=who, **CLIP) for who in range(3)]
    ask = failing_for(1, MemoryError("measuring"))
    replies = client(tmp_path, task, trainer, micro_batch=ask, **options).answer(asked)
    plain = client(tmp_path, trainer=trainer, **options).answer(asked)
    for who, (one, other) in enumerate(zip(replies, plain, strict=True)):
        ours, theirs = (update_in(reply, who).delta.vector for reply in (one, other))
        assert ours.any()
        np.testing.assert_allclose(ours, theirs, atol=1e-6 if who == 1 else 0)
    assert task.sizes.count(1) >= len(data().train(1))


@pytest.mark.parametrize("kind", KINDS)
def test_what_measuring_says_of_an_example_is_told_as_a_training_tells_it(tmp_path, kind):
    """With the real measurement: the same reply as without it, and the other requests' replies to the bit."""
    options = {"stages": [Clip(norm=1.0)], **KINDS[kind]}
    order, trainer = (
        (1, 0, 2),
        SGD(lr=0.1, batch_size=16),
    )  # who is measured first is the one that fails
    with_it, without = (
        with_a_wrong_label(tmp_path, trainer, micro_batch=ask, **options).answer(
            [request(who=who, **CLIP) for who in order]
        )
        for ask in (plenty(trainer), None)
    )
    for who, one, other in list(zip(order, with_it, without, strict=True))[1:]:
        ours, theirs = (update_in(reply, who).delta.vector for reply in (one, other))
        np.testing.assert_array_equal(ours, theirs)
        assert ours.any()
    assert with_it[0].has_error() == without[0].has_error() == (kind != "silent")
    if kind == "silent":
        assert not update_in(with_it[0], 1).delta.vector.any()
    else:
        assert with_it[0].error.reason == without[0].error.reason
        assert (SECRET in with_it[0].error.reason) == (kind == "open")


@pytest.mark.parametrize("error", [MemoryError("measuring"), IndexError(SECRET)], ids=repr)
def test_no_error_of_the_measuring_leaves_the_fitting(error):
    retrying = Retrying(Retry(backoff_seconds=0.0))
    fitting = Fitting(TASK, module(), SGD(), retrying, micro_batch=failing_for(1, error))
    arrays = {name: array.detach().numpy() for name, array in module().state_dict().items()}
    jobs = [FitJob(who, arrays, {}, data().train(who), 1, {}, {}) for who in (0, 1)]
    fits = fitting.fit(jobs)
    assert [np.isfinite(fit.sections["delta"].vector).all() for fit in fits] == [True, True]


def test_under_dp_sgd_what_fails_in_the_measuring_is_charged_as_a_training(tmp_path):
    trainer = DpSgd(noise_multiplier=1.0, batch_size=16, max_physical_batch=16)
    ours = with_a_wrong_label(tmp_path, trainer, micro_batch=plenty(trainer))
    (reply,) = ours.answer([request(who=1)])
    assert reply.has_error()
    assert SECRET not in reply.error.reason
    assert len(ClientLedger(tmp_path, 1).charges()) == 1


class Lost(SGD):
    """Can't say how many examples it takes at a time."""

    def at_once(self, job: FitJob) -> int:
        raise IndexError(SECRET)


def test_what_fails_between_two_attempts_is_that_jobs_error_alone(tmp_path):
    ours = with_a_wrong_label(
        tmp_path, Lost(lr=0.1, batch_size=16), Short(), secretive=True, retry=Retry(backoff_seconds=0.0)
    )  # fmt: skip
    replies = ours.answer([request(who=who) for who in range(3)])
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert SECRET not in replies[1].error.reason


class Careless(SGD):
    """Guards no job."""

    def fit(self, jobs, model, task):
        raise IndexError(SECRET)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_that_guards_no_job_takes_nobodys_reply_away(tmp_path, kind):
    ours = client(tmp_path, trainer=Careless(), stages=[Clip(norm=1.0)], **KINDS[kind])
    replies = ours.answer([request(who=who, **CLIP) for who in range(2)])
    assert len(replies) == 2
    for reply in replies:
        assert reply.has_error() == (kind != "silent")
        assert kind == "open" or not reply.has_error() or SECRET not in reply.error.reason
