"""Shared noise through real masks: the model has what was promised of it whoever drops out, or nothing is revealed."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from flwr.app import Message

from strategies.collectors import Masked
from strategies.combiners import Mean, Median
from strategies.contract import ContractError
from strategies.exchange import Exchange
from strategies.pipeline import Pipeline
from strategies.privacy import BudgetSpentError, Central, Distributed
from strategies.privacy.accountants import make_accountant
from strategies.protocols import ClientOwn
from strategies.samplers import Poisson, Uniform
from strategies.schedulers import Synchronous
from strategies.server_models import SGD, ServerModel
from strategies.stages import AdaptiveClip, Clip
from strategies.update import DELTA
from tests.support.grids import ScriptedGrid, trellis_node
from tests.support.masked import folder, step_of
from tests.support.updates import parameters

SIZE = 3000
COHORT = 10
BOUND = 0.5
FIVE = 5 / math.sqrt(2 * SIZE)
"""Five standard errors of a standard deviation, relative: a false alarm in 1.7 million."""


def distributed(**settings) -> Distributed:
    given = {"noise_multiplier": 2.0, "population": COHORT, "rounds": 4, "size": SIZE}
    return Distributed(**{**given, **settings})


def pipeline(privacy: Distributed, *, clip=None, groups: int = 1, **parts) -> Pipeline:
    """Ten clients are planned; six open a sum, one of whom may collude: five shares are sure to be there."""
    clip = clip or Clip(norm=BOUND)
    given = {
        "collector": Masked(whole=True, metrics=(), groups=groups),
        "stages": [clip, *privacy.stages(clip.bounds)],
        "combiner": Mean(weighting="uniform", denominator="cohort"),
        "sampler": Poisson(fraction=1.0, population=COHORT),
        "privacy": privacy,
    }
    return Pipeline(**{**given, **parts})


class Tap:
    """The last stage: what each client gives to the masks, and what comes out of them."""

    name = "tap"

    def __init__(self) -> None:
        self.given: dict[int, np.ndarray] = {}
        self.sums: list[tuple[tuple[int, ...], np.ndarray]] = []

    def check(self, claim):
        return claim

    def configure(self):
        return {}

    def encode(self, update, context):
        self.given[context.client] = update.delta.vector.astype(np.int64)
        return update

    def decode(self, update):
        self.sums.append((update.members, update.delta.vector))
        return update


class Run:
    """A model of zeros on a grid of real members of masked sums.

    Attributes:
        steps: of the protocol, which were asked for.
    """

    def __init__(self, line: Pipeline, nodes: int, path, lost=None, value=1.0) -> None:
        self.line, self.lost, self.steps = line, lost or {}, set()
        half = line.collector.client_half(ClientOwn(path, {}, simulated=True))
        vector = np.full(SIZE, value, np.float32)
        self._honest = trellis_node(
            lambda client, number, arrays: {DELTA: vector}, stages=line.stages, half=half
        )
        self.grid = ScriptedGrid({n: self._node(n) for n in range(1, nodes + 1)})
        line.check(frozenset({DELTA}))
        self.model = ServerModel(parameters(*np.zeros(SIZE)), SGD())

    def _node(self, number: int):
        def answer(message: Message) -> Iterable[Message]:
            step = step_of(message.content)
            self.steps.add(step)
            gone = [one for one, numbers in self.lost.items() if number in numbers]
            if any(PHASES.index(step) >= PHASES.index(one) for one in gone):
                return []
            return list(self._honest(message))

        return answer

    def rounds(self, until: int = 1) -> list:
        exchange = Exchange(self.grid)
        return list(Synchronous().run(self.line, self.model, exchange, until, timeout=60.0))


PHASES = ("keys", "shares", "upload", "unmask")


@contextmanager
def begun(line: Pipeline, nodes: int = COHORT, **settings) -> Iterator[Run]:
    with folder() as path:
        yield Run(line, nodes, path, **settings)


# ---- the noise ----


@pytest.mark.parametrize("noise", ["discrete_gaussian", "skellam"])
@pytest.mark.parametrize(
    ("lost", "uploaded"),
    [
        ({}, 10),
        ({"keys": [3, 7, 9]}, 7),
        ({"shares": [3, 7, 9]}, 7),
        ({"upload": [3, 7, 9]}, 7),
        ({"unmask": [3, 7, 9]}, 10),
        ({"keys": [1], "upload": [5], "unmask": [8]}, 8),
    ],
    ids=["nobody", "keys", "shares", "upload", "unmask", "each"],
)
def test_the_model_has_the_noise_of_its_members_whoever_drops_out_in_which_phase(
    noise, lost, uploaded
):
    """Each of m members adds σ with √5·σ = z·C: what five of them are sure to add is what is accounted for."""
    privacy = distributed(noise=noise)
    with begun(pipeline(privacy), lost=lost) as run:
        (view,) = run.rounds()
    assert not view.void
    each = BOUND / math.sqrt(SIZE)
    error = run.model.parameters * COHORT - uploaded * each
    promised = 2.0 * BOUND
    assert error.std() == pytest.approx(promised * math.sqrt(uploaded / 5), rel=FIVE + 1e-3)
    assert error.std() >= promised * (1 - FIVE)
    assert abs(error.mean()) < 5 * error.std() / math.sqrt(SIZE)


def test_sums_of_groups_carry_the_noise_each_and_a_rule_may_compare_them():
    """Three groups of three or four of ten: of the smallest two open the sum, and their shares are sure."""
    privacy = distributed(noise_multiplier=0.02)
    line = pipeline(privacy, groups=3, combiner=Median(f=0), sampler=Uniform(population=COHORT))
    tap = Tap()
    line.stages = [*line.stages, tap]
    with begun(line) as run:
        (view,) = run.rounds()
    assert not view.void
    assert sorted(len(members) for members, _ in tap.sums) == [3, 3, 4]
    assert line.claim.honest == 2
    each = BOUND / math.sqrt(SIZE)
    assert run.model.parameters.mean() == pytest.approx(each, rel=0.2)
    assert privacy.report()["releases"] == 1


# ---- void before anything is revealed ----


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (4, "too few to hold 5 honest shares"),
        (11, "the noise is for 10 at most"),
    ],
)
def test_a_cohort_that_the_noise_was_not_made_for_is_void_before_anybody_is_asked(nodes, said):
    privacy = distributed()
    line = pipeline(privacy)
    with begun(line, nodes) as run:
        (view,) = run.rounds()
        assert view.void
        assert said in view.void_reason
        assert (run.steps, view.sampled) == (set(), 0)
    assert not run.model.parameters.any()
    assert privacy.report()["releases"] == 1  # paid for all the same


@pytest.mark.parametrize("phase", ["keys", "shares", "upload"])
def test_a_sum_of_fewer_than_are_counted_on_is_never_opened(phase):
    """Six must be left, one of whom may collude: with five nobody is asked for what would open the sum."""
    privacy = distributed()
    tap = Tap()
    line = pipeline(privacy)
    line.stages = [*line.stages, tap]
    with begun(line, lost={phase: [1, 2, 3, 4, 5]}) as run:
        (view,) = run.rounds()
    assert view.void
    assert "unmask" not in run.steps
    assert tap.sums == []
    assert not run.model.parameters.any()


def test_a_smaller_cohort_may_lose_nobody_that_the_noise_counts_on():
    """Of seven clients two may go; three lost leave four shares, where five are counted on."""
    for lost, void in (([1, 2], False), ([1, 2, 3], True)):
        with begun(pipeline(distributed()), 7, lost={"upload": lost}) as run:
            (view,) = run.rounds()
        assert view.void is void


# ---- the ring ----


@pytest.mark.parametrize("nodes", [7, 8, 10])
def test_sums_are_of_the_very_integers_for_cohorts_smaller_than_planned_too(nodes):
    privacy, tap = distributed(), Tap()
    line = pipeline(privacy)
    line.stages = [*line.stages, tap]
    with begun(line, nodes) as run:
        (view,) = run.rounds()
    assert not view.void
    ((members, mean),) = tap.sums
    total = np.sum([tap.given[client] for client in members], axis=0)
    assert len(members) == nodes
    np.testing.assert_array_equal(mean, (total / nodes).astype(np.float32))
    # Steps are fine: the largest integer takes up much of what float32 holds.
    assert 2**16 < max(np.abs(given).max() for given in tap.given.values()) < 2**24


@pytest.mark.parametrize(("value", "grows"), [(0.0, False), (1.0, True)])
def test_the_rings_scale_follows_an_adaptive_clip_and_what_is_accounted_does_not(value, grows):
    clip = AdaptiveClip(norm=0.2, lr=1.0)
    privacy = distributed(noise_multiplier=0.05)
    with begun(pipeline(privacy, clip=clip), value=value) as run:
        before = run.line.job(run.model).config
        views = run.rounds(1)
        second_bound = clip.present
        views += run.rounds(2)
        after = run.line.job(run.model).config
    assert not any(view.void for view in views)
    assert (clip.present > 0.2) is grows
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"clip.norm", "integers.scale.delta"}
    ratio = after["integers.scale.delta"] / before["integers.scale.delta"]
    assert ratio == pytest.approx(0.2 / clip.present)
    first, second = (charge for charge, _ in privacy._accounts()[1].charges)
    assert first == second
    if grows:  # two rounds of clipped updates, the second one longer, are what the model has
        expected = (0.2 + second_bound) / math.sqrt(SIZE)
        assert run.model.parameters.mean() == pytest.approx(expected, rel=0.02)


# ---- the account ----


def test_the_budget_is_against_a_server_who_knows_the_cohorts():
    privacy = distributed(population=50, noise_multiplier=1.0)
    line = pipeline(privacy, sampler=Poisson(fraction=0.4, population=50))
    line.check()
    for number in range(1, 4):
        privacy.charge(number)
    account = make_accountant("rdp", "add_or_remove_one")
    account.step(privacy.next_release(), 3)
    assert privacy.next_release().sampling == "none"
    assert privacy.epsilon == pytest.approx(account.epsilon(privacy.resolved_delta))
    report = privacy.report()
    assert (report["unit"], report["adjacency"]) == ("client", "zero_out")
    assert (report["noise"], report["releases"]) == ("discrete_gaussian", 3)


@pytest.mark.parametrize(
    ("sampler", "amplified"),
    [
        (Poisson(fraction=0.2, population=100), True),
        (Poisson(fraction=1.0, population=100), False),
        (Uniform(fraction=0.2, population=100), False),
    ],
    ids=["coins", "everybody", "fixed"],
)
def test_who_sees_models_alone_learns_less_where_cohorts_come_of_coins(sampler, amplified):
    privacy = distributed(population=100)
    pipeline(privacy, sampler=sampler).check()
    assert privacy.epsilon_models() == 0.0
    for number in range(1, 5):
        privacy.charge(number)
        against_models = privacy.report()["epsilon_models"]
        assert 0 < against_models <= privacy.epsilon
        assert (against_models < 0.95 * privacy.epsilon) is amplified


@pytest.mark.parametrize("noise", ["discrete_gaussian", "skellam"])
@pytest.mark.parametrize("sampler", [Poisson(0.5, 40), Uniform(0.5, 1, 40)], ids=["coins", "fixed"])
def test_noise_is_found_for_the_planned_rounds_and_used_up_by_the_last(noise, sampler):
    privacy = distributed(noise_multiplier=None, target_epsilon=8.0, population=40, noise=noise)
    pipeline(privacy, sampler=sampler).check()
    for number in range(1, 5):
        privacy.charge(number)
    assert 0.95 * 8 <= privacy.epsilon <= 8
    with pytest.raises(BudgetSpentError):
        privacy.charge(5)


def test_a_spent_account_is_taken_up_and_another_mechanisms_is_refused(tmp_path):
    path = tmp_path / "privacy" / "ledger.jsonl"
    first = distributed(ledger=path)
    pipeline(first).check()
    first.charge(1)
    state = first.state_dict()
    first.charge(2)  # and the process dies before its next checkpoint
    second = distributed(ledger=path)
    pipeline(second).check()
    second.load_state_dict(state)
    assert second.epsilon == pytest.approx(first.epsilon)
    assert second.epsilon_models() == pytest.approx(first.epsilon_models())
    second.charge(2)
    assert second.report()["releases"] == 3
    central = Central(noise_multiplier=2.0, accountant="rdp", ledger=path)
    with pytest.raises(ValueError, match="another mechanism"):
        central.load_state_dict(state)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"stages": [Clip()]}, "clients share no noise; put its stages behind the clip"),
        ({"collector": Masked(metrics=())}, "set collector.whole=true"),
        ({"sampler": Uniform()}, "use collector=masked with a sampler that plans a cohort"),
        (
            {"size": 10**12, "sampler": Uniform(population=5000)},
            "leave too few steps in 32 bits",
        ),
    ],
    ids=["no stage", "rounded apart", "no cohort", "no room"],
)
def test_what_shared_noise_cannot_work_with_is_refused(parts, said):
    others = {name: part for name, part in parts.items() if name != "size"}
    with pytest.raises(ContractError, match=said):
        pipeline(distributed(size=parts.get("size", SIZE)), **others).check()


def test_the_plan_says_what_is_sure_and_how_large_the_noise_is():
    privacy = distributed()
    pipeline(privacy).check()
    said = privacy.describe(SIZE)
    assert "5 of 10 members are sure to add their share" in said
    # Five shares of z·C/√5 an element on the mean of ten updates of norm C.
    assert f"noise norm over signal norm at least {2.0 * math.sqrt(SIZE) / 10:.3g}" in said
