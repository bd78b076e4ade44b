"""Adaptive clipping: the bit, the bound's movement, and the quantile that it comes to."""

from math import exp

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.collectors import Plain
from strategies.combiners import Mean
from strategies.contract import Claim, ContractError
from strategies.pipeline import Pipeline
from strategies.protocols import ClientContext
from strategies.server_models import SGD, ServerModel
from strategies.stages import AdaptiveClip
from strategies.stages.clip import l2_norm
from strategies.update import CLIP_BIT, DELTA, Layout, Section
from strategies.wire import Refused
from tests.support.updates import parameters, update


def encoded(stage, values, norm=None):
    settings = stage.configure() if norm is None else {"norm": norm}
    return stage.encode(update(values), ClientContext(0, 1, settings))


def bit(one) -> float:
    return float(one.sections[CLIP_BIT].vector[0])


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20), st.floats(0.01, 50))
def test_the_bit_says_whether_the_update_lay_within_the_bound_that_came_down(values, norm):
    one = encoded(AdaptiveClip(), values, norm)
    within = l2_norm(np.array(values, np.float32)) <= norm
    assert bit(one) == (0.5 if within else -0.5)
    assert l2_norm(one.delta.vector) <= norm
    assert (one.delta.bound, one.sections[CLIP_BIT].bound) == (norm, 0.5)


def test_the_server_holds_a_client_to_both_bounds_and_leaves_sums_alone():
    stage = AdaptiveClip(norm=1.0)
    one = encoded(stage, [3.0, 4.0])
    liar = one.with_section(DELTA, Section(np.float32([30, 40]), one.delta.layout))
    np.testing.assert_allclose(stage.decode(liar).delta.vector, [0.6, 0.8], rtol=1e-5)
    layout = Layout((CLIP_BIT,), ((),))
    for value in (0.0, 0.4, 7.0, float("nan")):
        bent = one.with_section(CLIP_BIT, Section(np.float32([value]), layout))
        with pytest.raises(Refused, match="a clip bit is"):
            stage.decode(bent)
    from dataclasses import replace

    both = replace(liar, members=(0, 1))
    assert stage.decode(both) is both


def aggregate(mean_bit: float):
    layout = Layout((CLIP_BIT,), ((),))
    return update([0.0]).with_section(CLIP_BIT, Section(np.float32([mean_bit]), layout))


def test_the_bound_moves_geometrically_towards_the_quantile():
    stage = AdaptiveClip(norm=2.0, quantile=0.9, lr=0.2)
    stage.learn(aggregate(0.5))  # all within: the bound falls
    assert stage.present == pytest.approx(2.0 * exp(-0.2 * 0.1))
    stage.learn(aggregate(-0.5))  # none within: it rises
    assert stage.present == pytest.approx(2.0 * exp(-0.2 * 0.1) * exp(0.2 * 0.9))
    assert stage.configure() == {"norm": stage.present}
    assert stage.bounds()[DELTA] == stage.present


@pytest.mark.parametrize("noisy", [1e9, -1e9])
def test_no_noise_moves_it_further_than_all_the_bits_could(noisy):
    stage = AdaptiveClip(norm=1.0, quantile=0.5, lr=0.2)
    stage.learn(aggregate(noisy))
    assert exp(-0.1) - 1e-9 <= stage.present <= exp(0.1) + 1e-9


@pytest.mark.parametrize("start", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_it_comes_to_the_true_quantile_from_either_side(start, quantile):
    norms = np.random.default_rng(0).lognormal(0.0, 0.5, 500)
    stage = AdaptiveClip(norm=start, quantile=quantile)
    for _ in range(120):
        stage.learn(aggregate(float((norms <= stage.present).mean()) - 0.5))
    assert stage.present == pytest.approx(float(np.quantile(norms, quantile)), rel=0.1)


def test_the_section_is_asked_for_bounded_and_read_by_the_stage_itself():
    pipeline = Pipeline(
        collector=Plain(metrics=False), stages=[AdaptiveClip(norm=3.0)], combiner=Mean("uniform")
    )
    claim = pipeline.check()
    assert claim.sections == {DELTA, CLIP_BIT}
    assert claim.adaptive
    job = pipeline.job(ServerModel(parameters(0, 0), SGD()))
    assert job.config["sections"] == [CLIP_BIT, DELTA]
    assert job.layouts[CLIP_BIT].size == 1
    assert job.bounds == {DELTA: 3.0, CLIP_BIT: 0.5}


def test_the_next_job_has_the_bound_that_was_learnt():
    stage = AdaptiveClip(norm=3.0)
    pipeline = Pipeline(collector=Plain(metrics=False), stages=[stage], combiner=Mean("uniform"))
    pipeline.check()
    pipeline.applied(aggregate(-0.5), {}, 1)
    model = ServerModel(parameters(0, 0), SGD())
    assert pipeline.job(model).bounds[DELTA] == stage.present > 3.0
    assert pipeline.job(model).config["clip.norm"] == stage.present


def test_its_state_is_the_bound_and_lasts():
    stage = AdaptiveClip(norm=3.0)
    stage.learn(aggregate(-0.5))
    other = AdaptiveClip(norm=3.0)
    other.load_state_dict(stage.state_dict())
    assert other.present == stage.present
    for wrong in (None, -1.0, float("nan"), "3"):
        with pytest.raises(ValueError, match="the clip's bound"):
            other.load_state_dict({"present": wrong})


def test_vanilla_clients_send_no_bit():
    with pytest.raises(ContractError, match="vanilla"):
        Pipeline(collector=Plain(vanilla=True), stages=[AdaptiveClip()]).check(frozenset())
    assert AdaptiveClip().check(Claim()).bounds[CLIP_BIT] == 0.5
