"""Central privacy in whole rounds: the noise that is released, whoever replies, and what it costs."""

import numpy as np
import pytest
from flwr.app import Error, Message
from scipy import stats

from strategies.admission import Admission
from strategies.collectors import Plain
from strategies.combiners import CenteredClipping, Krum, Mean, NormBounding
from strategies.contract import ContractError
from strategies.detection import Quarantine
from strategies.exchange import Exchange
from strategies.pipeline import Pipeline
from strategies.privacy import BudgetSpentError, Central
from strategies.privacy.accountants import make_accountant
from strategies.privacy.events import GaussianRelease
from strategies.protocols import Job
from strategies.samplers import Poisson, Uniform
from strategies.schedulers import Synchronous
from strategies.server_models import SGD, ServerModel
from strategies.stages import AdaptiveClip, Clip
from strategies.update import BUFFERS, CLIP_BIT, COUNTERS, DELTA
from tests.support.grids import ScriptedGrid, trellis_node
from tests.support.updates import parameters, update

FALSE_ALARM = 1e-6
SIZE = 2000


def central(**settings) -> Central:
    return Central(**{"noise_multiplier": 1.0, "population": 10, **settings})


def pipeline(privacy=None, *, clip=None, sampler=None, **parts) -> Pipeline:
    return Pipeline(
        **{
            "collector": Plain(metrics=False),
            "stages": [clip or Clip(norm=1.0)],
            "combiner": Mean(weighting="uniform", denominator="cohort"),
            "sampler": sampler or Poisson(fraction=1.0, population=10),
            "privacy": privacy or central(),
            **parts,
        }
    )


def sends(value: float, stages):
    vector = np.full(SIZE, value, np.float32)
    return trellis_node(
        lambda client, number, arrays: {DELTA: vector}, stages=stages, metrics={"loss": 3.0}
    )


def failing(message: Message) -> list[Message]:
    return [Message(Error(2, "out of memory"), reply_to=message)]


def run(line: Pipeline, nodes, rounds: int = 1):
    grid = ScriptedGrid(nodes)
    line.check(frozenset({DELTA}))
    model = ServerModel(parameters(*np.zeros(SIZE)), line.optimizer)
    views = list(Synchronous().run(line, model, Exchange(grid), rounds, timeout=60.0))
    return views, grid, model


def is_noise(values, deviation: float) -> bool:
    return bool(stats.kstest(values / deviation, "norm").pvalue > FALSE_ALARM)


def test_what_is_released_is_the_sum_plus_noise_over_the_planned_cohort_whoever_replies():
    """Of ten planned clients seven, two or none reply: the denominator and the noise stay."""
    for replying in (7, 2, 0):
        line = pipeline(central(noise_multiplier=2.0), sampler=Poisson(fraction=1.0, population=10))
        nodes = {n: sends(1.0, line.stages) if n <= replying else failing for n in range(1, 11)}
        (view,), _, model = run(line, nodes)
        assert not view.void
        assert view.failed == 10 - replying
        each = 1 / np.sqrt(SIZE)  # of a client's update, clipped to norm 1
        noise = model.parameters - replying * each / 10
        assert is_noise(noise, 2.0 / 10)


def test_an_empty_cohort_is_released_as_noise_too():
    line = pipeline(sampler=Poisson(fraction=1e-9, population=10))
    (view,), grid, model = run(line, {n: sends(1.0, line.stages) for n in range(1, 4)})
    assert (view.sampled, view.void, grid.sent) == (0, False, [])
    assert is_noise(model.parameters, 1.0)  # a cohort of one was planned


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e30])
def test_a_client_that_sends_nothing_or_nonsense_moves_the_model_by_no_more_than_the_bound(value):
    line = pipeline()
    nodes = {1: sends(value, ()), 2: failing, 3: failing}
    (view,), _, model = run(line, nodes)
    assert not view.void
    assert np.isfinite(model.parameters).all()
    assert is_noise(model.parameters, 1.0 / 10)


def test_one_of_three_failing_and_all_failing_cost_the_same():
    for nodes in ({1: failing, 2: failing, 3: failing}, {1: failing}):
        privacy = central()
        line = pipeline(privacy)
        others = {n: sends(1.0, line.stages) for n in range(2, 4)}
        run(line, {**others, **nodes}, rounds=2)
        account = make_accountant("pld", "add_or_remove_one")
        account.step(GaussianRelease(1.0, 1.0, "poisson"), 2)
        assert privacy.epsilon == pytest.approx(account.epsilon(privacy.resolved_delta))
        assert privacy.report()["releases"] == 2


def test_a_round_below_the_quorum_is_never_tried_again():
    line = pipeline(admission=Admission(max_attempts=5))
    _, grid, _ = run(line, dict.fromkeys(range(1, 4), failing))
    assert len(grid.sent) == 3


def test_nothing_travels_beside_the_vector_and_nothing_is_looked_at():
    line = pipeline()
    honest = sends(1.0, line.stages)

    (view,), *_ = run(line, dict.fromkeys((1, 2, 3), honest))
    assert view.train_metrics == {}
    with pytest.raises(ContractError, match=r"would travel in clear.*collector=bare"):
        pipeline(collector=Plain()).check()


def test_noise_is_the_systems_and_repeats_only_where_nothing_is_promised():
    nodes = dict.fromkeys(range(1, 4), failing)
    first, second = run(pipeline(), nodes)[2], run(pipeline(), nodes)[2]
    assert not np.array_equal(first.parameters, second.parameters)
    privacy = central(reproducible_noise=True, seed=3)
    (view,), _, third = run(pipeline(privacy), nodes)
    again = run(pipeline(central(reproducible_noise=True, seed=3)), nodes)[2]
    np.testing.assert_array_equal(third.parameters, again.parameters)
    assert view.epsilon is None
    assert privacy.report() is None


# ---- rules that bound what one client changes ----


@pytest.mark.parametrize("stages", [[], [Clip(norm=0.25)]], ids=["no clip", "a shorter clip"])
@pytest.mark.parametrize(
    ("rule", "length"),
    [(CenteredClipping, "tau"), (NormBounding, "bound")],
    ids=["centred", "norm"],
)
def test_noise_is_scaled_to_the_length_that_a_rule_allows_not_to_the_clips(rule, length, stages):
    """Clipped round a centre of any length, an update of norm 0.25 still moves the sum by 0.5."""
    bounding = rule(**{length: 0.5}, denominator="cohort")
    line = pipeline(central(noise_multiplier=4.0), combiner=bounding, stages=stages)
    nodes = {n: sends(1.0, line.stages) if n <= 3 else failing for n in range(1, 11)}
    _, _, model = run(line, nodes)
    each = (0.25 if stages else 0.5) / np.sqrt(SIZE)
    assert is_noise(model.parameters - 3 * each / 10, 4.0 * 0.5 / 10)
    assert "noise norm over signal norm" in line.privacy.describe(SIZE)


def test_a_round_of_nobody_releases_where_the_rule_starts_from():
    """Else whether a single client replied would show by the length of the centre, which no noise is scaled to."""
    rule = CenteredClipping(tau=0.5, denominator="cohort")
    line = pipeline(central(noise_multiplier=4.0), combiner=rule, stages=[])
    line.check(frozenset({DELTA}))
    model = ServerModel(parameters(*np.zeros(SIZE)), line.optimizer)
    job = line.job(model)
    rule.learn(update(np.full(SIZE, 7.0)))
    nobody = line.concluded(line.begin(job, 10).result(), 0, job)
    assert is_noise(nobody.delta.vector - 7.0, 4.0 * 0.5 / 10)
    begun = line.begin(job, 10)
    begun.add(update(np.full(SIZE, 7.0)))
    assert is_noise(line.concluded(begun.result(), 1, job).delta.vector - 7.0, 4.0 * 0.5 / 10)


def test_a_rules_own_length_beside_an_adaptive_clip_is_refused():
    rule = NormBounding(bound=0.5, denominator="cohort")
    with pytest.raises(ContractError, match="one client can move"):
        pipeline(combiner=rule, clip=AdaptiveClip()).check()


# ---- the adaptive clip's bit ----


def adaptive_bounds(line: Pipeline) -> Job:
    return line.job(ServerModel(parameters(0, 0), SGD()))


def test_bit_and_update_together_cost_the_noise_multiplier():
    line = pipeline(central(noise_multiplier=1.5, bit_noise=2.0), clip=AdaptiveClip(norm=3.0))
    line.check()
    scales = line.privacy.deviations(adaptive_bounds(line).bounds)
    z_bit = scales[CLIP_BIT] * 10 / 0.5
    z_delta = scales[DELTA] * 10 / 3.0
    assert z_bit**-2 + z_delta**-2 == pytest.approx(1.5**-2, rel=1e-4)
    assert z_bit == pytest.approx(4.0, rel=1e-4)


def test_a_bit_that_alone_costs_more_than_all_is_refused_with_the_mend():
    with pytest.raises(ContractError, match=r"set privacy\.bit_noise above 0\.75"):
        pipeline(central(noise_multiplier=1.5, bit_noise=0.5), clip=AdaptiveClip()).check()


@pytest.mark.parametrize("start", [0.1, pytest.param(1.0, marks=pytest.mark.slow), 10.0])
def test_the_bound_comes_to_the_clients_median_norm_under_noise(start):
    norms = np.random.default_rng(1).lognormal(0.0, 0.4, 60)
    clip = AdaptiveClip(norm=start, quantile=0.5)
    line = pipeline(
        Central(noise_multiplier=1.0, population=60),
        clip=clip,
        sampler=Poisson(fraction=1.0, population=60),
    )
    nodes = {}
    for n, norm in enumerate(norms, 1):
        vector = np.zeros(SIZE, np.float32)
        vector[0] = norm
        nodes[n] = trellis_node(
            lambda client, number, arrays, vector=vector: {DELTA: vector}, stages=line.stages
        )
    run(line, nodes, rounds=40)
    assert clip.present == pytest.approx(float(np.median(norms)), rel=0.35)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"stages": []}, "one client can move the combined vector by any amount"),
        ({"combiner": Mean(weighting="uniform")}, "one client can move"),
        ({"combiner": Krum(f=0)}, "one client can move"),
        ({"sampler": Poisson()}, "one client can move"),
        ({"quarantine": Quarantine()}, "who is left out of later rounds"),
        ({"admission": Admission(quorum=3)}, r"set admission\.quorum=1"),
        ({"stages": [Clip(), *()], "collector": Plain(vanilla=True, metrics=False)}, "vanilla"),
    ],
    ids=["no clip", "over replies", "Krum", "no planned cohort", "quarantine", "quorum", "vanilla"],
)
def test_what_no_noise_hides_is_refused(parts, said):
    with pytest.raises(ContractError, match=said):
        pipeline(**parts).check()


def test_running_statistics_and_counters_are_refused_with_the_mend():
    for section in (BUFFERS, COUNTERS):
        with pytest.raises(ContractError, match="use GroupNorm instead of BatchNorm"):
            pipeline().check(frozenset({DELTA, section}))


def test_clients_are_not_asked_how_the_model_does_on_their_examples():
    line = pipeline()
    with pytest.raises(ContractError, match=r"evaluate\.federated_every=0"):
        line.check().need_no_figures_asked(1)


# ---- sampling ----


@pytest.mark.parametrize(
    ("sampler", "release"),
    [
        (Poisson(fraction=0.1, population=100), GaussianRelease(1.0, 0.1, "poisson")),
        (Uniform(fraction=0.1, population=100), GaussianRelease(0.5, 0.1, "fixed", "replace_one")),
    ],
    ids=["poisson", "fixed"],
)
def test_each_way_of_sampling_gets_its_own_bound(sampler, release):
    privacy = central()
    pipeline(privacy, sampler=sampler).check()
    assert privacy.next_release() == release
    assert privacy.report()["adjacency"] == release.relation


def test_cohorts_that_an_epsilon_rests_on_do_not_follow_from_the_seed():
    """Two draws of 50 of 100 are the same by chance once in 10²⁹."""
    uniform = Uniform(fraction=0.5, population=100)
    drawn = []
    for privacy in (central(), central(), central(reproducible_noise=True), None, None):
        line = pipeline(sampler=uniform)
        line.privacy = privacy
        drawn.append(line.draw(range(100), seed=3, round_number=1, attempt=0))
    assert drawn[0] != drawn[1] != drawn[2] == drawn[3] == drawn[4]
    assert len(drawn[0]) == 50


class Uncontrolled:
    def check(self, claim):
        return claim.given(self, sampling="uncontrolled", cohort=10)


def test_where_sampling_is_not_the_servers_nothing_is_claimed_of_it():
    privacy = central()
    pipeline(privacy, sampler=Uncontrolled()).check()
    assert privacy.next_release() == GaussianRelease(1.0)


# ---- the budget ----


def test_a_round_that_would_exceed_the_budget_does_not_run():
    privacy = central(target_epsilon=3.0, noise_multiplier=2.0, delta=1e-5)
    line = pipeline(privacy)
    grid = ScriptedGrid({n: sends(0.0, line.stages) for n in range(1, 4)})
    line.check()
    model = ServerModel(parameters(*np.zeros(SIZE)), line.optimizer)
    views = []
    rounds = Synchronous().run(line, model, Exchange(grid), 100, timeout=60.0)
    with pytest.raises(BudgetSpentError, match=r"would spend ε = .* of 3"):
        views.extend(rounds)
    assert 1 <= len(views) < 100
    assert views[-1].epsilon <= 3.0
    asked = {message.metadata.group_id for message in grid.sent}
    assert asked == {str(view.round) for view in views}
    account = make_accountant("pld", "add_or_remove_one")
    account.step(GaussianRelease(2.0, 1.0, "poisson"), len(views) + 1)
    assert account.epsilon(1e-5) > 3.0


@pytest.mark.parametrize("sampler", [Poisson(fraction=0.2, population=50), Uniform(0.2, 1, 50)])
def test_noise_is_found_for_the_planned_rounds_and_used_up_by_the_last(sampler):
    privacy = Central(target_epsilon=2.0, population=50, rounds=30)
    pipeline(privacy, sampler=sampler).check()
    for number in range(1, 31):
        privacy.charge(number)
    assert 1.9 <= privacy.epsilon <= 2.0
    with pytest.raises(BudgetSpentError):
        list(map(privacy.charge, range(31, 40)))


def test_neither_a_budget_nor_noise_is_no_promise():
    with pytest.raises(ValueError, match="set target_epsilon"):
        Central()


def test_a_spent_account_is_taken_up_and_another_mechanisms_is_refused():
    privacy = central()
    pipeline(privacy).check()
    for number in (1, 2, 3):
        privacy.charge(number)
    state = privacy.state_dict()
    other = central()
    pipeline(other).check()
    other.load_state_dict(state)
    assert other.epsilon == privacy.epsilon
    assert other.report()["releases"] == 3
    fixed = central()
    pipeline(fixed, sampler=Uniform(population=10)).check()
    with pytest.raises(ValueError, match="another mechanism"):
        fixed.load_state_dict(state)


def test_what_the_ledger_has_beyond_the_checkpoint_counts(tmp_path):
    path = tmp_path / "ledger.jsonl"
    first = central(ledger=path)
    pipeline(first).check()
    first.charge(1)
    state = first.state_dict()
    first.charge(2)  # and the process dies before its next checkpoint
    resumed = central(ledger=path)
    pipeline(resumed).check()
    resumed.load_state_dict(state)
    assert resumed.report()["releases"] == 2
    resumed.charge(2)  # the round is run again, with fresh noise
    assert resumed.report()["releases"] == 3
    unsaved = central(ledger=path)  # nor is anything forgotten where there was no checkpoint at all
    pipeline(unsaved).check()
    unsaved.charge(1)
    assert unsaved.report()["releases"] == 4
