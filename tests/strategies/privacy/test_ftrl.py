"""DP-FTRL in whole rounds: the noise is that of the matrix, each round takes a row, and a restart pays anew."""

import numpy as np
import pytest
from flwr.app import Error, Message

from strategies.collectors import Plain
from strategies.combiners import Mean
from strategies.contract import ContractError
from strategies.exchange import Exchange
from strategies.pipeline import Pipeline
from strategies.privacy import BudgetSpentError, Central, Ftrl, ParticipationSpentError
from strategies.privacy.accountants import make_accountant
from strategies.privacy.banded import BandedToeplitz
from strategies.privacy.events import GaussianRelease
from strategies.privacy.noise import Seeded, gaussian
from strategies.samplers import Spaced
from strategies.schedulers import Synchronous
from strategies.server_models import SGD, ServerModel
from strategies.stages import Clip
from strategies.update import DELTA, Layout, Section, Update
from tests.support.grids import ScriptedGrid, trellis_node
from tests.support.updates import parameters

SIZE = 2000
APART = {"participations": 3, "separation": 4}


def ftrl(**settings) -> Ftrl:
    return Ftrl(**{"noise_multiplier": 2.0, "population": 12, "rounds": 12, **settings})


def pipeline(privacy: Ftrl, *, clients: int = 12, **parts) -> Pipeline:
    """Three of twelve clients a round, each again after four rounds."""
    sampler = Spaced(**APART, fraction=0.25, population=clients)
    given = {
        "collector": Plain(metrics=False),
        "stages": [Clip(norm=0.5)],
        "combiner": Mean(weighting="uniform", denominator="cohort"),
        "sampler": sampler,
        "privacy": privacy,
    }
    return Pipeline(**{**given, **parts})


def failing(message: Message) -> list[Message]:
    return [Message(Error(2, "out of memory"), reply_to=message)]


def released(line: Pipeline, nodes, rounds: int) -> tuple[np.ndarray, list]:
    """The model after each round, (rounds, SIZE), from zero, and the rounds' views."""
    line.check(frozenset({DELTA}))
    model = ServerModel(parameters(*np.zeros(SIZE)), SGD())
    path, views = [], []
    for view in Synchronous().run(line, model, Exchange(ScriptedGrid(nodes)), rounds, timeout=60.0):
        path.append(model.parameters.copy())
        views.append(view)
    return np.array(path), views


def strategy_matrix(bands: int, rounds: int, momentum: float = 0.0) -> np.ndarray:
    c = BandedToeplitz(bands, momentum).coefficients()
    return sum(np.diag(np.full(rounds - lag, c[lag]), -lag) for lag in range(min(bands, rounds)))


@pytest.mark.parametrize(
    ("bands", "momentum"), [(None, 0.0), (2, 0.0), (1, 0.0), (None, 0.9)], ids=str
)
def test_what_is_released_is_the_sum_plus_rows_of_the_inverse_matrix_times_noise(bands, momentum):
    """Of every other cohort nothing comes: such a round takes a row of the noise like any other."""
    rounds, z, cohort = 9, 2.0, 3
    line = pipeline(ftrl(reproducible_noise=True, seed=5, bands=bands, momentum=momentum))
    vector = np.full(SIZE, 1.0, np.float32)

    def odd(message: Message) -> list[Message]:
        number = message.content.config_records["config"]["server-round"]
        return list(honest(message)) if number % 2 else failing(message)

    honest = trellis_node(lambda client, number, arrays: {DELTA: vector}, stages=line.stages)
    path, views = released(line, dict.fromkeys(range(1, 13), odd), rounds)
    assert [view.failed for view in views] == [0, 3] * 4 + [0]
    assert not any(view.void for view in views)
    entropies = [Seeded(5, f"central noise {number} {DELTA}") for number in range(1, rounds + 1)]
    fresh = np.array([gaussian(SIZE, entropy) for entropy in entropies])
    matrix = strategy_matrix(bands or APART["separation"], rounds, momentum)
    noise = np.linalg.solve(matrix, fresh) * (z * 0.5 / cohort)
    sums = np.array([number % 2 for number in range(1, rounds + 1)])[:, None] * 0.5 / np.sqrt(SIZE)
    np.testing.assert_allclose(path, np.cumsum(sums + noise, axis=0), atol=1e-5)


def test_what_rounds_take_back_leaves_prefix_sums_with_less_noise_than_independent_noise():
    """At the same cost, after twelve rounds of three participations each."""
    deviations = []
    for bands in (4, 1):
        privacy = ftrl(noise_multiplier=None, target_epsilon=3.0, bands=bands)
        line = pipeline(privacy)
        path, _ = released(line, dict.fromkeys(range(1, 13), failing), 12)
        deviations.append(path[-1].std())
        assert 0.95 * 3.0 <= privacy.epsilon <= 3.0
    # A deviation of 2000 normal elements is within 8 % of what is expected but once in 2 million.
    expected = BandedToeplitz(4).errors(12, **APART)[1] / BandedToeplitz(1).errors(12, **APART)[1]
    assert expected < 0.8
    assert deviations[0] / deviations[1] == pytest.approx(expected, rel=0.17)


@pytest.mark.parametrize("accountant", ["pld", "rdp", "prv"])
@pytest.mark.parametrize(("rounds", "limits"), [(12, APART), (10, {**APART, "separation": 5})])
def test_planned_rounds_come_to_the_budget_and_no_round_of_theirs_passes_it(
    accountant, rounds, limits
):
    privacy = ftrl(noise_multiplier=None, target_epsilon=2.0, rounds=rounds, accountant=accountant)
    sampler = Spaced(**limits, fraction=0.1, population=100)
    pipeline(privacy, sampler=sampler).check()
    spent = []
    for number in range(1, rounds + 1):
        privacy.charge(number)
        spent.append(privacy.epsilon)
    assert spent == sorted(spent)
    assert 0.95 * 2.0 <= spent[-1] <= 2.0


def test_what_a_prefix_costs_is_the_gaussian_of_its_sensitivity():
    privacy = ftrl()
    pipeline(privacy).check()
    for number in range(1, 15):
        privacy.charge(number)
        account = make_accountant("pld", "add_or_remove_one")
        sensitivity = BandedToeplitz(4).sensitivity(number, **APART)
        account.step(GaussianRelease(2.0 / sensitivity))
        assert privacy.epsilon == pytest.approx(account.epsilon(privacy.resolved_delta), rel=1e-3)
    # Three participations four rounds apart can be over after twelve rounds: two rounds were free.
    assert privacy.report()["releases"] == 12


def test_when_everybody_took_part_as_often_as_they_may_the_run_ends():
    line = pipeline(ftrl(), clients=12)
    nodes = dict.fromkeys(range(1, 13), failing)
    with pytest.raises(ParticipationSpentError, match="all 12 clients took part"):
        released(line, nodes, 100)


def test_a_resumed_run_begins_a_new_matrix_and_pays_for_it_from_its_first_row():
    """The noise of the first process is gone: what its rows cost is no part of what the second's do."""
    first = ftrl()
    pipeline(first).check()
    for number in range(1, 6):
        first.charge(number)
    second = ftrl()
    pipeline(second).check()
    second.load_state_dict(first.state_dict())
    assert second.epsilon == pytest.approx(first.epsilon)
    for number in range(6, 9):
        second.charge(number)
    account = make_accountant("pld", "add_or_remove_one")
    for rounds in (5, 3):
        account.step(GaussianRelease(2.0 / BandedToeplitz(4).sensitivity(rounds, **APART)))
    assert second.epsilon == pytest.approx(account.epsilon(second.resolved_delta), rel=1e-3)
    unbroken = make_accountant("pld", "add_or_remove_one")
    unbroken.step(GaussianRelease(2.0 / BandedToeplitz(4).sensitivity(8, **APART)))
    assert second.epsilon > 1.1 * unbroken.epsilon(second.resolved_delta)


def test_noise_of_the_seed_goes_on_where_it_was_in_a_resumed_run():
    """Of it nothing is promised: it is for runs that are to be the same, whether or not they were stopped."""
    silent = dict.fromkeys(range(1, 13), failing)
    path, _ = released(pipeline(ftrl(reproducible_noise=True)), silent, 9)
    line = pipeline(ftrl(reproducible_noise=True))
    layout = Layout.of(parameters(*np.zeros(SIZE)))
    aggregate = Update({DELTA: Section(np.zeros(SIZE, np.float32), layout)}, 1.0, (), 0)
    rows = []
    for number in range(1, 10):
        if number == 6:
            line = pipeline(ftrl(reproducible_noise=True))
        line.check()
        line.privacy.charge(number)
        rows.append(line.privacy.privatise(aggregate, line.claim.bounds).delta.vector)
    np.testing.assert_allclose(np.cumsum(rows, axis=0), path, atol=1e-6)


def test_no_state_holds_the_noise():
    line = pipeline(ftrl())
    released(line, dict.fromkeys(range(1, 13), failing), 3)
    assert set(line.privacy.state_dict()) == {"header", "charges"}


def test_a_resumed_run_cannot_finish_its_plan_within_the_budget_and_ends_before_it_is_passed():
    first = ftrl(noise_multiplier=None, target_epsilon=2.0)
    pipeline(first).check()
    for number in range(1, 8):
        first.charge(number)
    second = ftrl(noise_multiplier=None, target_epsilon=2.0)
    pipeline(second).check()
    second.load_state_dict(first.state_dict())
    with pytest.raises(BudgetSpentError, match=r"of 2$"):
        list(map(second.charge, range(8, 13)))
    assert first.epsilon < second.epsilon <= 2.0


def test_the_report_says_what_neighbours_are_and_what_it_rests_on():
    privacy = ftrl()
    line = pipeline(privacy)
    released(line, dict.fromkeys(range(1, 13), failing), 2)
    report = privacy.report()
    assert report["adjacency"] == "zero_out"
    assert report["mechanism"] == "banded matrix factorisation"
    assert (report["participations"], report["separation"]) == (3, 4)
    assert report["sampling"] == "no amplification by sampling"
    assert report["unit"] == "client"
    assert report["epsilon"] == privacy.epsilon > 0
    assert ftrl(reproducible_noise=True).report() is None


def test_the_account_of_independent_noise_is_refused():
    other = Central(noise_multiplier=2.0, population=12)
    pipeline(other).check()
    other.charge(1)
    privacy = ftrl()
    pipeline(privacy).check()
    with pytest.raises(ValueError, match="another mechanism"):
        privacy.load_state_dict(other.state_dict())


def test_more_bands_than_rounds_between_two_participations_are_refused():
    with pytest.raises(ContractError, match=r"5 bands reach over the 4 rounds"):
        pipeline(ftrl(bands=5)).check()
