"""Ways in which a promise could be broken without any part being wrong by itself."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from strategies.collectors import Masked, Plain, PlainClient
from strategies.combiners import Mean
from strategies.contract import Claim, Visibility
from strategies.exchange import Exchange
from strategies.pipeline import Pipeline
from strategies.privacy import Central, Distributed, OwnAccounts
from strategies.privacy.events import GaussianRelease
from strategies.privacy.noise import Seeded
from strategies.privacy.steps import Steps
from strategies.protocols import ClientContext, Job
from strategies.samplers import Poisson, Uniform
from strategies.server_models import SGD, ServerModel
from strategies.stages import Clip, LocalNoise
from strategies.stages.integer_noise import IntegerNoise
from strategies.update import DELTA, EPSILON
from strategies.wire import CONFIG, METRICS, Refused
from tests.support.grids import ScriptedGrid, hello_node
from tests.support.updates import parameters, update


@pytest.mark.parametrize(
    "sampler", [Poisson(fraction=0.5, population=20), Uniform(fraction=0.5, population=20)]
)
def test_where_sums_are_seen_nothing_is_claimed_of_sampling(sampler):
    """A quorum uncovers the whole sum: with one client more or less it is there, or is not."""
    privacy = Central(noise_multiplier=1.0, population=20)
    Pipeline(
        collector=Masked(metrics=()),
        stages=[Clip(norm=1.0)],
        sampler=sampler,
        combiner=Mean(weighting="uniform", denominator="cohort"),
        privacy=privacy,
    ).check()
    assert privacy.next_release() == GaussianRelease(1.0)
    assert privacy.report()["adjacency"] == "zero_out"


@given(st.integers(1, 300), st.integers(0, 300), st.floats(0.01, 1.0), st.integers(1, 50))
def test_no_larger_share_is_asked_than_was_claimed_whoever_is_gone(
    population, there, fraction, least
):
    sampler = Uniform(fraction=fraction, minimum=least, population=population, reproducible=False)
    there = min(there, population)
    asked = sampler.draw(list(range(there)), seed=0, round_number=1, attempt=0)
    assert len(asked) <= sampler.check(Claim()).rate * there + 1e-9


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_of_a_vector_without_a_length_noise_is_all_that_leaves(bad):
    """NaN passes every comparison that asks for too much, and would take its neighbours along."""
    stage = LocalNoise(lambda: 1.0, entropy=lambda context: Seeded(0, "test"))

    def sent(values):
        clipped = Clip(norm=1.0).encode(update(values), ClientContext(0, 1, {"norm": 1.0}))
        return stage.encode(clipped, ClientContext(0, 1, {"multiplier": 1.0})).delta.vector

    np.testing.assert_array_equal(sent([bad, 1e6, -3e6]), sent([0.0, 0.0, 0.0]))
    integers = _integers()
    clipped = Clip(norm=1.0).encode(update([bad, 1e6, -3e6]), ClientContext(0, 1, {"norm": 1.0}))
    out = integers.encode(clipped, ClientContext(0, 1, integers.configure())).delta.vector
    assert np.isfinite(out).all()


def _integers() -> IntegerNoise:
    steps = Steps("discrete_gaussian", 1.0, 5, 10, {DELTA: 3})
    return IntegerNoise(lambda: steps, lambda: {DELTA: 1.0})


@pytest.mark.parametrize("norm", [0.0, -1.0, 1e-43, float("inf"), float("nan")])
def test_a_bound_that_float32_cannot_hold_to_is_refused(norm):
    with pytest.raises(Refused, match="a clip to"):
        Clip(norm=1.0).encode(update([1.0]), ClientContext(0, 1, {"norm": norm}))


def test_a_noised_update_takes_no_metric_along():
    stage = LocalNoise(lambda: 1.0, entropy=lambda context: Seeded(0, "test"))
    clipped = Clip(norm=1.0).encode(
        update([3.0], weight=417, metrics={"train_loss": 0.1}), ClientContext(0, 1, {"norm": 1.0})
    )
    sent = stage.encode(clipped, ClientContext(0, 1, {"multiplier": 1.0}))
    assert (sent.weight, dict(sent.metrics)) == (1.0, {})


def test_a_client_of_a_foreign_app_is_asked_for_its_vector_alone():
    pipeline = Pipeline(
        collector=Plain(metrics=False), combiner=Mean(weighting="uniform"), sampler=Uniform()
    )
    pipeline.check()
    job: Job = pipeline.job(ServerModel(parameters(0, 0), SGD()))
    (request,) = pipeline.collector.open(job, [0]).start()
    asked = RecordDict({CONFIG: request.content.config_records[CONFIG]})
    one = update([1.0, 2.0], weight=417, metrics={"train_loss": 0.1, EPSILON: 0.5})
    told = PlainClient().reply(one, asked).metric_records[METRICS]
    assert dict(told) == {"num-examples": 1.0, EPSILON: 0.5}
    told = PlainClient().reply(one, RecordDict({CONFIG: ConfigRecord({"server-round": 1})}))
    assert told.metric_records[METRICS]["num-examples"] == 417


def test_one_client_does_not_set_the_runs_epsilon():
    accounts = OwnAccounts(1e-5, "pld", budget=3.0)
    accounts.told(update(client=0, metrics={EPSILON: 2.0}))
    for lie in (1e300, float("nan"), -1.0, float("inf")):
        accounts.told(update(client=1, metrics={EPSILON: lie}))
    assert accounts.epsilon == 2.0


def test_a_node_keeps_its_number_where_participation_is_counted():
    grid = ScriptedGrid(dict.fromkeys((14, 15, 16), hello_node(None)))
    exchange = Exchange(grid, lasting=True)
    assert exchange.clients() == [0, 1, 2]
    gone = grid.nodes.pop(14)
    assert exchange.clients() == [1, 2]
    grid.nodes[99] = gone
    assert exchange.clients() == [1, 2, 3]  # a stranger is nobody who was there
    grid.nodes[14] = gone
    assert exchange.clients() == [0, 1, 2, 3]
    assert exchange.node_of(0) == 14


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("order", [1.5, 2, 5, 16])
def test_the_epsilon_of_those_who_see_models_bounds_a_mixture_of_unequal_noises(rate, order):
    """Gaussians for lattice sums: with probability q the member's vector and share are in, else neither."""
    x = np.linspace(-25, 25, 200_001)

    def law(mean, deviation):
        return np.exp(-((x - mean) ** 2) / (2 * deviation**2)) / deviation

    without = law(0.0, 1.0)  # one share less
    p = (1 - rate) * without + rate * law(1.0, 1.3)
    q = (1 - rate) * without + rate * law(0.0, 1.3)
    exact = np.log((q * (p / q) ** order).sum() / q.sum()) / (order - 1)
    apart = order / (2 * 1.3**2)
    bound = np.log1p(rate * np.expm1((order - 1) * apart)) / (order - 1)
    assert exact <= bound * (1 + 1e-6)
    assert bound <= apart


def test_models_tell_no_more_than_sums():
    claim = Claim(
        visibility=Visibility.SUM, cohort=100, sampling="poisson", rate=0.1, members=150, honest=60,
        whole=True, private="distributed noise", bounds={}, summed="uniform",
    )  # fmt: skip
    privacy = Distributed(noise_multiplier=10.0, population=1000, size=10_000, delta=1e-5)
    privacy.check(claim)
    for number in range(1, 31):
        privacy.charge(number)
    assert 0 < privacy.epsilon_models() < 0.6 * privacy.epsilon
    assert privacy.report()["adjacency"] == "zero_out"
