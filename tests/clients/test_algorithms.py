"""Each named algorithm against its paper, on least squares, through the real client, engine and strategy."""

import numpy as np
import pytest

from clients.trainers import SGD, Proximal, Scaffold
from strategies import server_models
from strategies.combiners import Mean
from strategies.pipeline import Pipeline
from strategies.samplers import Uniform
from strategies.update import CONTROL, DELTA
from tests.support.quadratic import heterogeneous, train

ALL_ROWS = 1_000
SCAFFOLD_SECTIONS = frozenset({DELTA, CONTROL})


def scaffold_pipeline(population: int, fraction: float = 1.0) -> Pipeline:
    return Pipeline(
        sampler=Uniform(fraction=fraction),
        combiner=Mean(weighting="uniform"),
        optimizer=server_models.Scaffold(population=population),
        client_sections=SCAFFOLD_SECTIONS,
    )


def test_fedavg_with_one_full_batch_step_is_gradient_descent_on_the_pooled_loss(tmp_path):
    rows = heterogeneous()
    sizes = np.array([len(b) for b in rows.b])
    path = train(rows, SGD(lr=0.1, batch_size=ALL_ROWS), Pipeline(), 20, tmp_path)
    x = np.zeros(4)
    for found in path:
        x = x - 0.1 * sum(n * rows.gradient(i, x) for i, n in enumerate(sizes)) / sizes.sum()
        np.testing.assert_allclose(found, x, rtol=2e-5, atol=2e-6)


def test_fedavg_follows_its_algorithm_for_many_local_epochs(tmp_path):
    rows = heterogeneous()
    sizes = np.array([len(b) for b in rows.b])
    path = train(rows, SGD(lr=0.1, batch_size=ALL_ROWS, local_epochs=7), Pipeline(), 5, tmp_path)
    x = np.zeros(4)
    for found in path:
        ends = []
        for client in range(5):
            y = x.copy()
            for _ in range(7):
                y -= 0.1 * rows.gradient(client, y)
            ends.append(y)
        x = np.average(ends, axis=0, weights=sizes)
        np.testing.assert_allclose(found, x, rtol=2e-5, atol=2e-6)


def test_scaffold_follows_its_algorithm_with_partial_participation(tmp_path):
    rows = heterogeneous()
    lr, steps, rounds = 0.05, 6, 8
    pipeline = scaffold_pipeline(5, fraction=0.6)
    path = train(
        rows, Scaffold(lr=lr, batch_size=ALL_ROWS, local_epochs=steps), pipeline, rounds, tmp_path
    )
    sampler = Uniform(fraction=0.6)
    x, c, own = np.zeros(4), np.zeros(4), np.zeros((5, 4))
    for number, found in enumerate(path, 1):
        cohort = sampler.draw(range(5), seed=0, round_number=number, attempt=0)
        assert len(cohort) == 3
        moves, changes = [], []
        for client in cohort:
            y = x.copy()
            for _ in range(steps):
                y -= lr * (rows.gradient(client, y) - own[client] + c)
            new = own[client] - c + (x - y) / (steps * lr)
            moves.append(y - x)
            changes.append(new - own[client])
            own[client] = new
        x = x + np.mean(moves, axis=0)
        c = c + 3 / 5 * np.mean(changes, axis=0)
        np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-5)


def test_scaffold_reaches_the_optimum_that_fedavg_misses_under_heterogeneity(tmp_path):
    rows = heterogeneous()
    optimum = rows.optimum([1 / 5] * 5)
    settings = {"lr": 0.05, "batch_size": ALL_ROWS, "local_epochs": 15}
    plain = Pipeline(combiner=Mean(weighting="uniform"))
    fedavg = train(rows, SGD(**settings), plain, 60, tmp_path / "fedavg")[-1]
    scaffold = train(rows, Scaffold(**settings), scaffold_pipeline(5), 60, tmp_path / "scaffold")[
        -1
    ]
    missed, reached = np.linalg.norm(fedavg - optimum), np.linalg.norm(scaffold - optimum)
    assert missed > 0.05
    assert reached < missed / 20


@pytest.mark.parametrize("mu", [0.0, 0.5, 5.0])
def test_the_proximal_step_solves_the_papers_local_problem(tmp_path, mu):
    """After many local steps client i stands at argmin fᵢ(w) + μ/2·‖w − w_t‖² (eq. 2); here w_t = 0."""
    rows = heterogeneous(clients=1)
    rows.a[0] = 3 * np.linalg.qr(rows.a[0])[0]  # well conditioned, so that 200 steps arrive
    found = train(
        rows,
        Proximal(lr=0.05, batch_size=ALL_ROWS, local_epochs=200, mu=mu),
        Pipeline(),
        1,
        tmp_path,
        min_clients=1,
    )[0]
    a, b = rows.a[0], rows.b[0]
    exact = np.linalg.solve(a.T @ a / len(b) + mu * np.eye(4), a.T @ b / len(b))
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-4)


def test_a_larger_proximal_term_keeps_clients_closer_to_the_model(tmp_path):
    rows = heterogeneous()
    lengths = []
    for mu in (0.0, 0.1, 1.0, 10.0):
        trainer = Proximal(lr=0.02, batch_size=ALL_ROWS, local_epochs=50, mu=mu)
        lengths.append(np.linalg.norm(train(rows, trainer, Pipeline(), 1, tmp_path / str(mu))[0]))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < lengths[0] / 4


def test_the_strategys_mu_reaches_clients_and_wins_over_their_own(tmp_path):
    rows = heterogeneous()
    trainer = {"lr": 0.02, "batch_size": ALL_ROWS, "local_epochs": 50}
    own = train(rows, Proximal(mu=5.0, **trainer), Pipeline(), 1, tmp_path / "own")[0]
    told = train(
        rows,
        Proximal(mu=0.1, **trainer),
        Pipeline(train_config={"proximal-mu": 5.0}),
        1,
        tmp_path / "told",
    )[0]
    np.testing.assert_array_equal(own, told)


@pytest.mark.parametrize(
    "optimizer",
    [
        server_models.SGD(lr=0.8, momentum=0.6),
        server_models.Adam(lr=0.2, tau=1e-3),
        server_models.Yogi(lr=0.2, tau=1e-3),
        server_models.Adagrad(lr=0.7, tau=1e-3),
    ],
    ids=["momentum", "adam", "yogi", "adagrad"],
)
def test_adaptive_servers_reach_the_pooled_optimum_when_clients_take_one_step(tmp_path, optimizer):
    rows = heterogeneous()
    optimum = rows.optimum([len(b) for b in rows.b])
    path = train(
        rows, SGD(lr=0.2, batch_size=ALL_ROWS), Pipeline(optimizer=optimizer), 150, tmp_path
    )
    assert np.linalg.norm(path[-1] - optimum) < 0.02 * np.linalg.norm(optimum)
