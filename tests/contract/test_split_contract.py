"""What split training can be composed with: each refusal names both parts and the mend, and what is allowed holds."""

from __future__ import annotations

import numpy as np
import pytest

from strategies.collectors import Split
from strategies.combiners import Mean
from strategies.contract import Claim, ContractError, Visibility
from strategies.downlink import Downlink
from strategies.pipeline import Pipeline
from strategies.privacy import Central
from strategies.samplers import Poisson
from strategies.schedulers import Buffered
from strategies.stages import Clip, RandomK
from strategies.update import DELTA, Layout, Section, Update


def central() -> Central:
    return Central(noise_multiplier=1.0, population=100, rounds=3, seed=0)


def private(variant: str = "v1", **parts) -> Pipeline:
    given = {
        "collector": Split(variant=variant, metrics=False),
        "stages": [Clip(norm=0.5)],
        "combiner": Mean(weighting="uniform", denominator="cohort"),
        "sampler": Poisson(fraction=0.1, population=100),
        "privacy": central(),
    }
    return Pipeline(**{**given, **parts})


REFUSED = {
    "random_k": (lambda: Pipeline(collector=Split(), stages=[RandomK()]), "leave it out"),
    "downlink": (lambda: Pipeline(collector=Split(), downlink=Downlink()), "leave it out"),
    "v2 and central": (lambda: private("v2"), "collector.variant=v1"),
    "buffered": (
        lambda: Pipeline(collector=Split(), scheduler=Buffered(population=10)),
        "scheduler=synchronous",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_each_refusal_names_both_parts_and_the_mend(kind):
    made, mend = REFUSED[kind]
    with pytest.raises(ContractError) as caught:
        made().check()
    told = str(caught.value)
    assert "collector=split" in told
    assert mend in told


def test_what_the_server_sees_is_said():
    claim = Pipeline(collector=Split(), combiner=Mean()).check()
    assert claim.visibility is Visibility.EACH
    assert claim.served == "each"
    assert claim.clear == {"metrics", "num-examples"}
    assert Pipeline(collector=Split(variant="v2")).check().served == "shared"


def test_figures_of_the_clients_own_examples_can_t_be_asked_for():
    claim = Split().check(Claim())
    claim.need_no_figures_asked(0)
    with pytest.raises(ContractError, match=r"collector=split.*(?s:.)*federated_every=0"):
        claim.need_no_figures_asked(1)


def test_v1_under_central_privacy_clips_both_halves_as_one():
    pipeline = private()
    claim = pipeline.check()
    assert claim.bounds == {DELTA: 0.5}
    assert claim.sensitivity is not None
    layout = Layout(("lower", "upper"), ((3,), (4,)))
    joined = Update(
        {DELTA: Section(np.array([3, 0, 0, 0, 4, 0, 0], np.float32), layout)}, 1.0, (0,), 0
    )
    clipped = pipeline.stages[0].decode(joined).delta.vector
    np.testing.assert_allclose(clipped, [0.3, 0, 0, 0, 0.4, 0, 0], rtol=1e-5)
    assert np.linalg.norm(clipped) <= 0.5


def test_numbers_in_clear_are_none_of_what_noise_covers():
    with pytest.raises(ContractError, match=r"collector=split: metrics, num-examples"):
        private(collector=Split()).check()
