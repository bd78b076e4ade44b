"""Local privacy in whole rounds: each client's own noise, what it does not take part in, and what it costs."""

from itertools import combinations

import numpy as np
import pytest
from flwr.app import Error, Message
from scipy import stats

from strategies.collectors import Plain
from strategies.combiners import Krum, Mean, Median
from strategies.contract import ContractError
from strategies.exchange import Exchange
from strategies.pipeline import Pipeline
from strategies.privacy import BudgetSpentError, Local
from strategies.privacy.accountants import make_accountant
from strategies.privacy.events import GaussianRelease
from strategies.protocols import ClientContext
from strategies.samplers import Poisson, Uniform
from strategies.schedulers import Synchronous
from strategies.server_models import SGD, ServerModel
from strategies.stages import AdaptiveClip, Clip, LocalNoise
from strategies.update import BUFFERS, CONTROL, DELTA, Update
from strategies.wire import Refused
from tests.support.grids import ScriptedGrid, trellis_node
from tests.support.updates import parameters, section, update

FALSE_ALARM = 1e-6
SIZE = 2000
CLIENTS = 7


def local(**settings) -> Local:
    return Local(**{"noise_multiplier": 3.0, "population": CLIENTS, "rounds": 5, **settings})


def pipeline(privacy: Local, *, clip=None, **parts) -> Pipeline:
    clip = clip or Clip(norm=0.5)
    given = {
        "collector": Plain(metrics=False),
        "stages": [clip, *privacy.stages(clip.bounds)],
        "combiner": Mean(weighting="uniform"),
        "sampler": Uniform(population=CLIENTS),
        "privacy": privacy,
    }
    return Pipeline(**{**given, **parts})


def run(line: Pipeline, nodes, rounds: int = 1):
    line.check(frozenset({DELTA}))
    model = ServerModel(parameters(*np.zeros(SIZE)), SGD())
    exchange = Exchange(ScriptedGrid(nodes))
    views = list(Synchronous().run(line, model, exchange, rounds, timeout=60.0))
    return views, model.parameters


def honest(stages, value: float = 1.0):
    vector = np.full(SIZE, value, np.float32)
    return trellis_node(lambda client, number, arrays: {DELTA: vector}, stages=stages)


def failing(message: Message) -> list[Message]:
    return [Message(Error(2, "out of memory"), reply_to=message)]


def is_noise(values, deviation: float) -> bool:
    return bool(stats.kstest(values / deviation, "norm").pvalue > FALSE_ALARM)


class Seen(Mean):
    """A mean that remembers what the server saw of each client."""

    def begin(self, plan):
        accumulator = super().begin(plan)
        add = accumulator.add
        self.updates: dict[int, Update] = {}

        def remembering(one: Update) -> None:
            self.updates[one.members[0]] = one
            add(one)

        accumulator.add = remembering
        return accumulator


def test_what_the_server_sees_of_a_client_is_its_clipped_update_under_noise_of_z_times_the_bound():
    seen = Seen(weighting="uniform")
    line = pipeline(local(), combiner=seen)
    _, model = run(line, {n: honest(line.stages) for n in range(1, CLIENTS + 1)})
    each = 0.5 / np.sqrt(SIZE)
    assert len(seen.updates) == CLIENTS
    noises = [one.delta.vector - each for one in seen.updates.values()]
    assert all(is_noise(noise, 3.0 * 0.5) for noise in noises)
    assert is_noise(model - each, 3.0 * 0.5 / np.sqrt(CLIENTS))
    # Products of independent normal numbers: their mean is normal with a deviation of 1/√SIZE.
    most = stats.norm.isf(FALSE_ALARM / CLIENTS**2)
    for one, other in combinations(noises, 2):
        assert abs(one @ other) / (1.5**2 * np.sqrt(SIZE)) < most
    assert {one.weight for one in seen.updates.values()} == {1.0}


def test_a_clients_noise_is_never_twice_the_same():
    line = pipeline(local(), sampler=Uniform(population=1), combiner=Median(f=0))
    first = run(line, {1: honest(line.stages, 0.0)})[1]
    second = run(line, {1: honest(line.stages, 0.0)})[1]
    assert is_noise(first, 1.5)
    assert is_noise(first - second, 1.5 * np.sqrt(2))


def test_a_seed_repeats_noise_by_client_and_round_and_promises_nothing():
    models = []
    for seed in (4, 4, 5):
        privacy = local(reproducible_noise=True, seed=seed)
        line = pipeline(privacy)
        (view, *_), model = run(line, {n: honest(line.stages, 0.0) for n in (1, 2, 3)}, 2)
        models.append(model)
        assert view.epsilon is None
        assert privacy.report() is None
    np.testing.assert_array_equal(models[0], models[1])
    assert is_noise(models[0], 1.5 * np.sqrt(2 / 3))
    assert is_noise(models[0] - models[2], 1.5 * np.sqrt(4 / 3))


def test_clients_that_are_asked_for_less_noise_than_they_add_refuse_and_nothing_is_sent():
    strict = local(noise_multiplier=3.0)
    (noise,) = strict.stages(Clip().bounds)
    lax = local(noise_multiplier=2.9)
    line = pipeline(lax)
    nodes = {n: honest([Clip(norm=0.5), noise]) for n in range(1, 4)}
    with pytest.raises(Refused, match=r"noise of 2\.9 is asked for, 3 is the least here"):
        run(line, nodes)
    for z in (2.99, 0.0, -1.0, float("nan")):
        with pytest.raises(Refused):
            noise.encode(update([1.0]), ClientContext(0, 1, {"multiplier": z}))


def test_noise_is_scaled_to_all_sections_together_and_none_goes_without_a_bound():
    stage = LocalNoise(lambda: 2.0, entropy=lambda context: lambda count: bytes(range(count)))
    context = ClientContext(0, 1, {"multiplier": 2.0})
    zeros = np.zeros(SIZE)
    both = Update(
        {DELTA: section(zeros, bound=3.0), CONTROL: section(zeros, bound=4.0)}, 9.0, (0,), 0
    )
    sent = stage.encode(both, context)
    assert sent.weight == 1.0
    for name in (DELTA, CONTROL):
        assert is_noise(sent.sections[name].vector, 2.0 * 5.0)
        assert sent.sections[name].bound is None
    with pytest.raises(Refused, match="without a bound"):
        stage.encode(update(zeros), context)


@pytest.mark.parametrize("rule", [Median(f=2), Krum(f=2)], ids=lambda rule: rule.label)
def test_a_robust_rule_works_on_what_clients_have_noised(rule):
    """Two liars in seven; what they send is no nearer to the model than the rule lets it be."""
    line = pipeline(local(noise_multiplier=0.01), combiner=rule)
    nodes = {n: honest(line.stages) for n in range(1, 6)}
    nodes |= {n: honest((), -1000.0) for n in (6, 7)}
    (view,), model = run(line, nodes)
    each = 0.5 / np.sqrt(SIZE)
    assert not view.void
    assert np.abs(model - each).max() < 6 * 0.01 * 0.5
    assert line.privacy.epsilon > 0


@pytest.mark.parametrize("sampler", [Uniform(population=CLIENTS), Poisson(0.1, CLIENTS)])
def test_each_round_costs_a_client_that_may_be_in_all_of_them_two_bounds(sampler):
    privacy = local()
    pipeline(privacy, sampler=sampler).check()
    for number in range(1, 6):
        privacy.charge(number)
    account = make_accountant("pld", "replace_one")
    account.step(GaussianRelease(1.5, relation="replace_one"), 5)
    assert privacy.epsilon == pytest.approx(account.epsilon(privacy.resolved_delta))
    report = privacy.report()
    assert (report["unit"], report["adjacency"]) == ("client update", "replace_one")
    assert (report["mechanism"], report["releases"]) == ("local gaussian", 5)


def test_noise_is_found_for_the_planned_rounds_and_clients_are_told_it():
    privacy = local(noise_multiplier=None, target_epsilon=20.0)
    line = pipeline(privacy)
    line.check()
    settings = line.job(ServerModel(parameters(0.0), SGD())).config
    assert settings["noise.multiplier"] == privacy.z
    for number in range(1, 6):
        privacy.charge(number)
    assert 0.95 * 20 <= privacy.epsilon <= 20
    with pytest.raises(BudgetSpentError):
        privacy.charge(6)


def test_a_round_of_too_few_is_void_and_paid_for_once():
    """Whether a client replied is no part of what its noise hides."""
    privacy = local()
    line = pipeline(privacy)
    views, model = run(line, dict.fromkeys(range(1, 4), failing), rounds=2)
    assert [view.void for view in views] == [True, True]
    assert not model.any()
    assert privacy.report()["releases"] == 2


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"stages": []}, "clients add no noise of their own; put its stages behind the clip"),
        ({"stages": [Clip()]}, "clients add no noise of their own"),
        ({"collector": Plain()}, "would travel in clear"),
        ({"collector": Plain(vanilla=True, metrics=False)}, "vanilla client"),
        ({"clip": AdaptiveClip()}, "says nothing; use clip=fixed"),
        ({"stages": local().stages(dict)}, "without a bound is hidden by no noise"),
    ],
    ids=["no stage", "clip alone", "metrics", "vanilla", "adaptive clip", "nothing clipped"],
)
def test_what_a_clients_noise_does_not_hide_is_refused(parts, said):
    with pytest.raises(ContractError, match=said):
        pipeline(local(), **parts).check()


def test_running_statistics_are_refused_with_the_mend():
    with pytest.raises(ContractError, match="use GroupNorm instead of BatchNorm"):
        pipeline(local()).check(frozenset({DELTA, BUFFERS}))


def test_the_plan_says_how_large_the_noise_is():
    privacy = local()
    pipeline(privacy).check()
    said = privacy.describe(10_000)
    assert "noise norm over signal norm at least 113" in said  # 3·√10,000 over √7
