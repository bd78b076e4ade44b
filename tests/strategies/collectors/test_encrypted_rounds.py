"""Rounds of encrypted training without the encryption: real clients and data, and turns that carry batches bare.

What passes and who is counted is the collector's, whatever hides it; so what comes of a round must be the very step
that FedSGD takes on the same mini-batches, whoever computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message

from clients.client import NUM_CLIENTS, Client
from clients.models import Mlp
from clients.resident import ResidentModel, arrays_of
from clients.store import ClientStore
from clients.tasks import Digits, FederatedData, evaluate
from clients.trainers import FedSgd, Fit
from clients.trainers.sgd import FitJob
from fl_app.engine.flwr_internals import claim_identity
from strategies.admission import Admission
from strategies.collectors import Encrypted, Plain
from strategies.collectors.encrypted import COMPUTE, ENCRYPTED, OWNER, REFUSED, ROLE, TURN
from strategies.collectors.turns import LAST, write_turn
from strategies.combiners import Mean
from strategies.contract import ContractError
from strategies.pipeline import Pipeline
from strategies.samplers import Uniform
from strategies.stages import Clip
from strategies.strategy import PipelineStrategy
from strategies.update import DELTA, Section
from strategies.wire import CONFIG, Refused, pack_model, unpack_model
from tests.support.grids import ScriptedGrid

TASK = Digits()
CLIENTS = 4
PARTY = 2


def module() -> Mlp:
    torch.manual_seed(5)
    return Mlp(TASK.input_shape, TASK.num_classes, hidden=(8,))


def data(count: int) -> FederatedData:
    return FederatedData(TASK, count, partition="iid", seed=3)


def gradient(arrays, batch) -> dict[str, np.ndarray]:
    """The mean gradient of the model with these arrays on a batch that came bare."""
    if not batch:
        raise Refused("missing", "a batch")
    model = ResidentModel(module(), arrays)
    model.load(arrays)
    inputs, targets = torch.tensor(batch["inputs"]), torch.tensor(batch["targets"])
    found = model.flattened(model.gradients(TASK.loss(model.module(inputs), targets)))
    return {"gradient": found.numpy().copy()}


class Bare:
    """A computing half that reads everything."""

    def describe(self):
        return "nothing is encrypted"

    def settings(self):
        return {}

    def turn_bytes(self):
        return 10**9

    def begin(self, sent):
        class Learner:
            def answer(self, client, arrays):
                return gradient(sent, arrays)

        return Learner()


@dataclass(frozen=True)
class BareTrainer(FedSgd):
    """An owner that sends its mini-batch bare; or the client that computes for it."""

    own_records: ClassVar[frozenset[str]] = frozenset({ENCRYPTED})

    def turn(self, job: FitJob, resident, task):
        config, sent = job.settings, unpack_model(job.records.get(ENCRYPTED, ArrayRecord()))
        receipt = {"client": job.client, "round": config["server-round"], "turn": config[TURN]}
        if config.get(ROLE) == COMPUTE:
            receipt[OWNER] = config[OWNER]
            try:
                return write_turn(ENCRYPTED, gradient(job.arrays, sent), receipt)
            except Refused as refused:
                return write_turn(ENCRYPTED, {}, {**receipt, REFUSED: refused.reason})
        batch = job.examples.take(self.batch(job))
        arrays = {"inputs": batch.inputs.numpy(), "targets": batch.targets.numpy()}
        return write_turn(ENCRYPTED, self.spoilt(job, arrays), {**receipt, LAST: True})

    def spoilt(self, job: FitJob, arrays):
        return arrays

    def fit_one(self, job: FitJob, model: ResidentModel, task) -> Fit:
        assert job.arrays == {}
        found = unpack_model(job.records[ENCRYPTED])["gradient"]
        return Fit({DELTA: Section(-found, model.layout)}, len(job.examples), {})


class Nothing(BareTrainer):
    """Client 1 of these sends no batch."""

    def spoilt(self, job, arrays):
        return {} if job.client == 1 else arrays


def rounds(
    tmp_path, collector, trainer, *, dead=frozenset(), count=2, stages=(), every=0, one=None, **own
) -> PipelineStrategy:
    """A run over real clients, each message answered as by a process of its own; or all by `one`."""
    claim_identity(1)
    seen: list = []

    def node(client: int):
        def answer(message: Message):
            store = ClientStore(tmp_path / f"{client}")
            mine = one or Client(
                TASK, module(), data, trainer, store=store, stages=stages, seed=1, **own
            )
            seen.append((client, message.content))
            return [] if client in dead else mine.answer([message])

        return answer

    pipeline = Pipeline(
        collector=collector,
        stages=stages,
        sampler=Uniform(population=CLIENTS),
        combiner=Mean(weighting="uniform"),
        train_config={NUM_CLIENTS: CLIENTS},
        admission=Admission(on_shortfall="skip"),
    )
    views: list = []
    run = PipelineStrategy(pipeline, federated_every=every, hooks=[views.append])
    grid = ScriptedGrid({client + 1: node(client) for client in range(CLIENTS)})
    run.start(grid, pack_model(arrays_of(module())), num_rounds=count, timeout=10.0)
    run.seen, run.views = seen, views
    return run


def test_a_round_is_the_step_that_fedsgd_takes(tmp_path):
    trainer = BareTrainer(batch_size=64)
    ours = rounds(tmp_path, Encrypted(served=Bare()), trainer)
    twin = rounds(tmp_path, Plain(), FedSgd(batch_size=64))
    start = np.concatenate([a.ravel() for a in arrays_of(module()).values()])
    assert np.linalg.norm(twin.model.parameters - start) > 0.1
    np.testing.assert_allclose(ours.model.parameters, twin.model.parameters, rtol=0, atol=1e-6)
    assert [(v.sampled, v.failed, v.rejected) for v in ours.views] == [(CLIENTS, 0, 0)] * 2


def test_a_client_that_computes_makes_the_same_step_and_nobody_misses_its_update(tmp_path):
    trainer = BareTrainer(batch_size=64)
    ours = rounds(tmp_path, Encrypted(compute_client=PARTY), trainer)
    assert [(v.sampled, v.failed, v.rejected) for v in ours.views] == [(CLIENTS - 1, 0, 0)] * 2
    assert ours.pipeline.admission.refusals == {}
    assert ours.claim.cohort == CLIENTS - 1
    assert ours.pipeline.included.keys() == {0, 1, 3}
    roles = {(client, content[CONFIG].get(ROLE)) for client, content in ours.seen}
    assert roles == {(0, None), (1, None), (3, None), (PARTY, COMPUTE)}
    # The same step as of the three owners alone: the mean of their gradients at the same models.
    twin = twin_of({0, 1, 3})
    np.testing.assert_allclose(ours.model.parameters, twin, rtol=0, atol=1e-6)


def twin_of(owners: set[int]) -> np.ndarray:
    """Two steps of FedSGD by hand, on these clients' mini-batches."""
    model = ResidentModel(module(), arrays_of(module()))
    arrays, trainer = arrays_of(module()), FedSgd(batch_size=64)
    for number in (1, 2):
        deltas = []
        for client in sorted(owners):
            examples = data(CLIENTS).train(client)
            job = FitJob(client, arrays, {}, examples, 0, {}, {"server-round": number})
            deltas.append(trainer.fit_one(job, model, TASK).sections[DELTA].vector)
        moved = model.layout.flatten(arrays) + np.mean(deltas, axis=0)
        arrays = {n: v.copy() for n, v in model.layout.views(moved.astype(np.float32)).items()}
    return model.layout.flatten(arrays)


def test_a_computing_client_that_dies_leaves_a_void_round_that_names_it(tmp_path, caplog):
    ours = rounds(
        tmp_path, Encrypted(compute_client=PARTY), BareTrainer(), dead={PARTY}, count=1
    )  # fmt: skip
    (view,) = ours.views
    assert (view.void, view.sampled, view.failed, view.rejected) == (True, 3, 3, 0)
    assert f"client {PARTY}, has not computed" in caplog.text
    assert ours.pipeline.admission.refusals == {"timeout": 3}


@pytest.mark.parametrize("collector", [Encrypted(served=Bare()), Encrypted(compute_client=PARTY)])
def test_an_owner_that_is_refused_is_missed_and_no_other(tmp_path, collector):
    ours = rounds(tmp_path, collector, Nothing(batch_size=64), count=1)
    (view,) = ours.views
    assert (view.void, view.failed, view.rejected) == (False, 0, 1)
    assert ours.pipeline.admission.strikes.keys() == {1}


def test_what_an_owner_decrypts_goes_the_way_of_all_updates(tmp_path):
    stages = (Clip(norm=0.01),)
    ours = rounds(tmp_path, Encrypted(served=Bare()), BareTrainer(), count=1, stages=stages)
    start = ours.model.layouts[DELTA].flatten(arrays_of(module()))
    assert 0.001 < np.linalg.norm(ours.model.parameters - start) <= 0.01


def test_a_silent_owner_whose_training_fails_sends_zeros(tmp_path):
    """No model has come, so what zeros look like is of the client's own."""

    class Fails(BareTrainer):
        def fit_one(self, job, model, task):
            raise RuntimeError("no key")

    ours = rounds(tmp_path, Encrypted(served=Bare()), Fails(), silent=True, count=1)
    assert not ours.views[0].void
    start = ours.model.layouts[DELTA].flatten(arrays_of(module()))
    np.testing.assert_array_equal(ours.model.parameters, start)


def test_owners_that_evaluate_are_sent_the_model_for_it(tmp_path):
    """One process trains without a model, and then evaluates one: what it holds for the two must be the same."""
    claim_identity(1)
    one = Client(
        TASK, module(), data, BareTrainer(batch_size=64), store=ClientStore(tmp_path), seed=1
    )
    ours = rounds(tmp_path, Encrypted(served=Bare()), BareTrainer(batch_size=64), every=2, one=one)
    model = Mlp(TASK.input_shape, TASK.num_classes, hidden=(8,))
    arrays = unpack_model(pack_model(ours.model.view()))
    model.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    tested = [data(CLIENTS).test(client) for client in range(CLIENTS)]
    figures = [(len(part), evaluate(model, TASK, part)["loss"]) for part in tested]
    whole = sum(count for count, _ in figures)
    expected = sum(count * loss for count, loss in figures) / whole
    assert ours.views[1].federated["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_trainer_without_turns_takes_no_part(tmp_path):
    ours = rounds(tmp_path, Encrypted(served=Bare()), FedSgd(), count=1)
    assert ours.pipeline.admission.refusals == {"client_error": CLIENTS}


def test_the_one_client_can_t_own_and_compute():
    pipeline = Pipeline(collector=Encrypted(compute_client=0), sampler=Uniform(population=1))
    with pytest.raises(ContractError, match=r"collector=encrypted.*(?s:.)*compute_client=null"):
        pipeline.check()
