"""DP-SGD is what its analysis is of: independent coins, noise of the right size, an epsilon that others compute too."""

import logging
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from clients.client import Client
from clients.models import Linear, Mlp
from clients.resident import ResidentModel, arrays_of
from clients.store import ClientStore
from clients.tasks import Digits, Examples, evaluate
from clients.trainers import DpSgd, FitJob, TrainingDivergedError
from clients.trainers.dp_account import Round
from clients.trainers.dp_sgd import poisson_batches
from fl_app.engine.flwr_internals import claim_identity
from strategies.privacy.noise import Seeded
from strategies.replies import Expected, read_update
from strategies.update import DELTA
from tests.clients.test_client import data, module, request
from tests.clients.test_dp_sgd_gradients import close, looped, resident

TASK = Digits()
Z = 5.0
"""Standard normal numbers are within ±5 but for 6e-7: the false-alarm rate of each two-sided test here."""


def trainer(**settings) -> DpSgd:
    return DpSgd(**{"batch_size": 32, "lr": 0.1, **settings})


def job(client: int = 1, count: int | None = None, seed: int = 7) -> FitJob:
    examples = data().train(1)
    if count is not None:
        examples = examples.take(range(count))
    return FitJob(client, arrays_of(module()), {}, examples, seed, {}, {})


def fitted(ours: DpSgd, asked: FitJob, network=None):
    """The fit, or its exception, and the model it was made on."""
    model = resident(network or module())
    (fit,) = ours.fit([replace(asked, arrays=arrays_of(model.module))], model, TASK)
    return fit, model


def deltas(ours: DpSgd, asked: FitJob) -> np.ndarray:
    fit, _ = fitted(ours, asked)
    if isinstance(fit, Exception):
        raise fit
    return fit.sections[DELTA].vector


QUIET = {"noise_multiplier": 0.0, "reproducible_noise": True}


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"momentum": 0.9}, {"momentum": 0.5, "weight_decay": 0.1}], ids=str
)
def test_without_noise_it_is_a_loop_over_clipped_examples(settings, ghost):
    ours = trainer(**QUIET, max_grad_norm=0.5, local_epochs=2, ghost=ghost, **settings)
    found = deltas(ours, job())
    asked, model = job(), resident(module())
    examples = asked.examples
    each = Round.of(len(examples), 32, 2)
    optimizer = torch.optim.SGD(model.module.parameters(), 0.1, foreach=False, **settings)
    for rows in poisson_batches(len(examples), each.rate, each.steps, Seeded(7, "dp-sgd")):
        gradients = looped(model, TASK, examples.take(rows))
        factors = (0.5 / gradients.norm(dim=1)).clamp(max=1)
        mean = factors @ gradients / 32
        for parameter, part in zip(
            model.travelling,
            mean.split([p.numel() for p in model.travelling]),
            strict=True,
        ):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
    expected = model.flat - torch.from_numpy(model._sent)
    assert close(torch.from_numpy(found), expected.detach(), 1e-4)


def test_noise_has_the_promised_size_and_is_divided_by_the_expected_batch():
    """Steps without an example are noise alone: each coordinate's change is N(0, T·(lr·z·C/(q·n))²)."""
    count, steps, noise, norm = 400, 50, 3.0, 0.25
    ours = trainer(
        noise_multiplier=noise, max_grad_norm=norm, batch_size=8, reproducible_noise=True
    )
    each = Round.of(count, 8, 1)
    assert (each.rate, each.steps, each.batch) == (0.02, steps, 8)
    flat = Examples(torch.zeros(count, 1, 8, 8), torch.zeros(count, dtype=torch.long))
    asked = replace(job(), examples=flat)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10, bias=False))
    fit, _ = fitted(ours, asked, network)  # zero inputs have zero gradients in every weight
    vector = fit.sections[DELTA].vector.astype(np.float64)
    standard = 0.1 * noise * norm / 8 * math.sqrt(steps)
    size = len(vector)
    assert abs(vector.mean()) < Z * standard / math.sqrt(size)
    assert abs((vector**2).mean() / standard**2 - 1) < Z * math.sqrt(2 / size)


def test_coins_are_independent_and_of_the_promised_rate():
    count, rate, steps = 100, 0.05, 20_000
    member = np.zeros((steps, count), bool)
    for step, rows in enumerate(poisson_batches(count, rate, steps, os.urandom)):
        member[step, rows] = True
    sizes, variance = member.sum(axis=1), rate * (1 - rate)
    assert abs(member.mean() - rate) < Z * math.sqrt(variance / member.size)
    # Sizes vary as a binomial does: a fixed size would not, nor would one coin for several rows.
    expected, fourth = count * variance, count * variance * (1 + 3 * (count - 2) * variance)
    assert abs(sizes.var() - expected) < Z * math.sqrt((fourth - expected**2) / steps)
    empty = (1 - rate) ** count  # 118 of the batches, with nearly a Poisson law: ±6 deviations
    assert abs((sizes == 0).sum() - steps * empty) < 6 * math.sqrt(steps * empty)
    neighbours = (member[:, 1:] & member[:, :-1]).mean()
    assert abs(neighbours - rate**2) < Z * rate / math.sqrt(member.size)
    after = (member[1:] & member[:-1]).mean()
    assert abs(after - rate**2) < Z * rate / math.sqrt(member.size)


@pytest.mark.parametrize(
    ("count", "batch", "epochs", "expected"),
    [
        (1, 32, 3, (1.0, 3, 1.0)),
        (32, 32, 2, (1.0, 2, 32.0)),
        (33, 32, 1, (32 / 33, 2, 32.0)),
        (1000, 10, 2, (0.01, 200, 10.0)),
    ],
)
def test_a_round_has_as_many_steps_as_sgd_has(count, batch, epochs, expected):
    each = Round.of(count, batch, epochs)
    assert (each.rate, each.steps) == expected[:2]
    assert each.batch == pytest.approx(expected[2])


def test_every_row_is_there_where_a_batch_holds_all():
    for rows in poisson_batches(7, 1.0, 3, Seeded(0, "all")):
        assert rows.tolist() == list(range(7))


def test_an_empty_batch_is_a_step_of_noise():
    ours = trainer(noise_multiplier=1.0, batch_size=1, reproducible_noise=True)
    asked = job(count=40)
    each = Round.of(40, 1, 1)
    sizes = [len(r) for r in poisson_batches(40, each.rate, 40, Seeded(7, "dp-sgd"))]
    assert 0 in sizes
    assert np.isfinite(deltas(ours, asked)).all()
    never = list(poisson_batches(40, 1e-19, 3, Seeded(7, "none")))
    assert [len(rows) for rows in never] == [0, 0, 0]


def test_a_client_with_one_example_is_in_every_batch(tmp_path):
    ours = trainer(noise_multiplier=4.0).keeping(tmp_path)
    fit, _ = fitted(ours, job(count=1))
    gaussian, _ = fitted(trainer(noise_multiplier=4.0).keeping(tmp_path / "all"), job(count=32))
    assert fit.metrics == gaussian.metrics  # one release without amplification, of either
    assert fit.num_examples == 1


def test_a_client_without_examples_is_refused(tmp_path):
    fit, _ = fitted(trainer(noise_multiplier=1.0).keeping(tmp_path), job(count=0))
    assert isinstance(fit, ValueError)
    assert "no examples" in str(fit)


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
@pytest.mark.parametrize(("noise", "epochs"), [(0.8, 1), (1.5, 4)])
def test_epsilon_is_what_dp_accounting_says(tmp_path, accountant, noise, epochs):
    import dp_accounting
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    ours = trainer(noise_multiplier=noise, local_epochs=epochs, accountant=accountant)
    fit, _ = fitted(ours.keeping(tmp_path), job())
    count = len(job().examples)
    theirs = {"rdp": RdpAccountant, "pld": PLDAccountant}[accountant]()
    event = dp_accounting.PoissonSampledDpEvent(32 / count, dp_accounting.GaussianDpEvent(noise))
    theirs.compose(event, epochs * math.ceil(count / 32))
    assert fit.metrics["epsilon"] == pytest.approx(theirs.get_epsilon(1e-5), rel=0.01)


def test_nothing_is_told_but_epsilon(tmp_path):
    fit, _ = fitted(trainer(noise_multiplier=1.0).keeping(tmp_path), job())
    assert list(fit.metrics) == ["epsilon"]
    assert fit.num_examples == 1
    assert set(fit.sections) == {DELTA}
    assert not fit.state


def test_two_rounds_differ_though_all_seeds_are_alike(tmp_path):
    ours = trainer(noise_multiplier=1.0).keeping(tmp_path)
    assert not np.array_equal(deltas(ours, job()), deltas(ours, job()))


def test_reproducible_noise_repeats_and_claims_nothing(tmp_path):
    ours = trainer(noise_multiplier=1.0, reproducible_noise=True).keeping(tmp_path)
    fit, _ = fitted(ours, job())
    assert fit.metrics == {}
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_array_equal(fit.sections[DELTA].vector, deltas(ours, job()))
    assert not np.array_equal(fit.sections[DELTA].vector, deltas(ours, job(seed=8)))


def test_without_a_folder_for_its_ledger_nothing_is_trained():
    fit, model = fitted(trainer(noise_multiplier=1.0), job())
    assert "no folder for its clients' ledgers" in str(fit)
    assert model.flat.numpy().tobytes() == model._sent.tobytes()


def test_a_delta_that_would_give_an_example_away_is_refused(tmp_path):
    count = len(job().examples)
    fit, _ = fitted(trainer(noise_multiplier=1.0, delta=1 / count).keeping(tmp_path), job())
    assert f"set it below 1/{count}" in str(fit)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs client.target_epsilon"),
        ({"noise_multiplier": 0.0}, "noise_multiplier=0 has no epsilon"),
        ({"noise_multiplier": 1.0, "amp": True}, "client.amp=false"),
        ({"noise_multiplier": -1.0}, "at least 0"),
        ({"target_epsilon": 0.0}, "greater than 0"),
        ({"noise_multiplier": 1.0, "delta": 1.0}, "less than 1"),
        ({"noise_multiplier": 1.0, "accountant": "moments"}, "choose one of 'pld', 'rdp', 'prv'"),
    ],
    ids=str,
)
def test_settings_that_promise_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DpSgd(**settings)


def test_a_model_that_left_the_finite_numbers_is_an_error_that_names_the_mend():
    fit, _ = fitted(trainer(noise_multiplier=1e3, lr=1e38, reproducible_noise=True), job())
    assert isinstance(fit, TrainingDivergedError)
    assert "lower client.lr" in str(fit)


def test_frozen_parameters_stay_without_noise_too(tmp_path):
    network = Mlp(TASK.input_shape, TASK.num_classes, hidden=(8,))
    model = ResidentModel(network, arrays_of(network))
    network.layers[0].requires_grad_(False)
    ours = trainer(noise_multiplier=1.0).keeping(tmp_path)
    fit = ours.fit_one(replace(job(), arrays=arrays_of(network)), model, TASK)
    section = fit.sections[DELTA]
    changed = {n: bool(v.any()) for n, v in section.layout.views(section.vector).items()}
    assert changed == {
        "layers.0.weight": False,
        "layers.0.bias": False,
        "layers.1.weight": True,
        "layers.1.bias": True,
    }


@pytest.fixture
def _identity():
    claim_identity(1)


def answered(tmp_path, ours: DpSgd, task=TASK, **options):
    return Client(
        task,
        module(),
        data,
        ours,
        store=ClientStore(tmp_path),
        ledgers=tmp_path,
        seed=11,
        **options,
    )


@pytest.mark.usefixtures("_identity")
class TestClient:
    def update(self, reply, number: int = 3):
        layout = resident(module()).layout
        return read_update(reply.content, Expected({DELTA: layout}, 1, number, 2))

    def test_it_answers_with_its_update_and_epsilon_alone(self, tmp_path):
        (reply,) = answered(tmp_path, trainer(noise_multiplier=1.0)).answer([request()])
        update = self.update(reply)
        assert set(update.metrics) == {"epsilon"}
        assert update.weight == 1

    def test_evaluation_after_training_is_that_of_the_model_that_came(self, tmp_path):
        ours = answered(tmp_path, trainer(noise_multiplier=1.0))
        found = evaluate(module(), TASK, data().test(1))
        ours.answer([request()])
        (reply,) = ours.answer([request("evaluate")])
        assert reply.content["metrics"]["loss"] == pytest.approx(found["loss"])

    def test_a_mean_over_rounds_costs_nothing_more(self, tmp_path):
        ours = trainer(noise_multiplier=1.0, worker_momentum=0.5, reproducible_noise=True)
        one = answered(tmp_path / "a", ours)
        first = self.update(one.answer([request(**{"server-round": 1})])[0], 1).delta.vector
        later = request(**{"server-round": 2, "included": 1})
        second = self.update(one.answer([later])[0], 2).delta.vector
        plain = trainer(noise_multiplier=1.0, reproducible_noise=True)
        alone = answered(tmp_path / "c", plain).answer([later])[0]
        expected = 0.5 * first + 0.5 * self.update(alone, 2).delta.vector
        np.testing.assert_allclose(second, expected, atol=1e-6)

    def test_a_server_is_not_told_what_an_example_did_to_the_training(self, tmp_path, caplog):
        class Telling(Digits):
            def losses(self, output, targets):
                if targets.any():
                    raise RuntimeError(f"what shall I do with {targets.tolist()}?")
                return super().losses(output, targets)  # the trial's own targets

        ours = answered(tmp_path, trainer(noise_multiplier=1.0), Telling())
        (reply,) = ours.answer([request()])
        assert "what shall I do" in caplog.text
        assert reply.error.reason == "training: this client takes no part, and its own log says why"

    def test_the_end_of_the_budget_is_told_to_the_server_without_a_trace(self, tmp_path, caplog):
        ours = answered(tmp_path, trainer(noise_multiplier=1.0, target_epsilon=0.5))
        with caplog.at_level(logging.WARNING):
            (reply,) = ours.answer([request()])
        assert "more than client.target_epsilon=0.5" in reply.error.reason
        assert not any(record.exc_info for record in caplog.records)


def test_it_learns(tmp_path):
    """Logistic regression of digits with a small ε: far above the 10% of chance."""
    network = Linear(TASK.input_shape, TASK.num_classes)
    ours = trainer(noise_multiplier=1.5, local_epochs=10, batch_size=128, lr=2.0).keeping(tmp_path)
    fit, model = fitted(ours, replace(job(), examples=data(1).train(0)), network)
    assert fit.metrics["epsilon"] < 6
    assert evaluate(model.module, TASK, TASK.test())["accuracy"] > 0.7
