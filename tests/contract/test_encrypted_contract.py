"""What encrypted training can be composed with: as vectors alone can, but for what an owner lacks.

Each refusal names both parts and the mend.
"""

from __future__ import annotations

import pytest

from strategies.admission import Admission
from strategies.collectors import Encrypted, Plain
from strategies.combiners import Mean
from strategies.contract import Claim, ContractError, Visibility, check
from strategies.downlink import Downlink
from strategies.pipeline import Pipeline
from strategies.privacy import Central, Local, OwnAccounts
from strategies.samplers import Poisson, Uniform
from strategies.schedulers import Buffered, Synchronous
from strategies.stages import Clip
from strategies.update import BUFFERS, CONTROL, DELTA
from tests.contract.test_matrix import COMPRESSED, PRIVATE

BARE = "`collector=bare`"
DP_SGD = "`none` with `client=dp_sgd`"
VECTORS = [
    one
    for one in (*PRIVATE, *COMPRESSED)
    if one.collector == BARE and getattr(one, "privacy", None) != DP_SGD
]
IDS = ["|".join(map(str, vars(one).values())).replace("`", "") for one in VECTORS]


def answer(combination, collector) -> Claim | ContractError:
    """What the contract says of a combination of the tables with another collector in its place."""
    pipeline = combination.pipeline()
    pipeline.collector = collector
    try:
        return pipeline.check()
    except ContractError as error:
        return error


@pytest.mark.parametrize("combination", VECTORS, ids=IDS)
def test_it_composes_as_vectors_alone_do(combination):
    """Compression, privacy, means and robust rules, in every combination of the tables."""
    ours = answer(combination, Encrypted(metrics=False))
    theirs = answer(combination, Plain(metrics=False))
    assert type(ours) is type(theirs)
    if isinstance(ours, ContractError):
        assert isinstance(theirs, ContractError)
        assert (ours.second, ours.why) == (theirs.second, theirs.why)
        return
    for item in ("visibility", "clear", "bounds", "sensitivity", "private", "packed", "cohort"):
        assert getattr(ours, item) == getattr(theirs, item)


def uniform(**settings) -> Mean:
    return Mean(weighting="uniform", **settings)


def refused(pipeline: Pipeline, *told: str, sections: frozenset[str] = frozenset()) -> None:
    with pytest.raises(ContractError) as caught:
        pipeline.check(sections)
    for one in ("collector=encrypted", *told):
        assert one in str(caught.value)


def test_a_buffer_is_refused():
    buffered = Buffered(population=10)
    pipeline = Pipeline(collector=Encrypted(), scheduler=buffered)
    refused(pipeline, "scheduler=buffered", "use scheduler=synchronous")


def test_a_change_to_a_model_that_nobody_holds_is_refused():
    pipeline = Pipeline(collector=Encrypted(), downlink=Downlink())
    refused(pipeline, "downlink=delta", "set downlink=none")


@pytest.mark.parametrize("metrics", [True, False])
def test_clipping_of_single_examples_is_refused(metrics):
    own = OwnAccounts(1e-5, "pld", budget=8.0)
    pipeline = Pipeline(collector=Encrypted(metrics=metrics), combiner=uniform(), privacy=own)
    refused(pipeline, "client=dp_sgd", "use privacy=local or privacy=central", "collector=bare")


def test_numbers_in_clear_under_a_promise_are_refused_with_their_own_mend():
    clip, promise = Clip(norm=0.5), Local(noise_multiplier=1.0, population=9, rounds=3)
    stages = [clip, *promise.stages(clip.bounds)]
    pipeline = Pipeline(collector=Encrypted(), stages=stages, combiner=uniform(), privacy=promise)
    refused(pipeline, "privacy=local", "metrics, num-examples", "set collector.metrics=false")


def test_parts_of_the_model_are_refused():
    claim = Claim(parts=True, set_by={"parts": "the clients' ranks and heads"})
    with pytest.raises(ContractError, match=r"encrypted.*ranks and heads.*(?s:.)*ranks=none"):
        check([Encrypted()], claim)


def test_sections_beside_the_gradient_are_refused():
    scaffold = Pipeline(collector=Encrypted(), client_sections=frozenset({DELTA, CONTROL}))
    refused(scaffold, "the clients' trainer", "no control", "use client=encrypted")
    statistics = Pipeline(collector=Encrypted())
    refused(statistics, "no buffers", "without running statistics", sections=frozenset({BUFFERS}))


@pytest.mark.parametrize("quorum", [3, 4])
def test_a_quorum_counts_owners_and_not_who_computes(quorum):
    pipeline = Pipeline(
        collector=Encrypted(compute_client=0),
        sampler=Uniform(population=4),
        admission=Admission(quorum=quorum),
    )
    if quorum == 4:
        refused(pipeline, "admission", "a cohort of 3", "lower admission.quorum")
    else:
        assert pipeline.check().cohort == 3


def test_what_is_seen_and_what_is_in_clear_is_said():
    claim = Pipeline(collector=Encrypted()).check()
    assert claim.visibility is Visibility.EACH
    assert claim.clear == {"metrics", "num-examples"}
    assert Pipeline(collector=Encrypted(metrics=False), combiner=uniform()).check().clear == set()
    told = Encrypted(mode="ce").describe(3)
    assert "the server holds the model" in told
    assert "the logits of their own examples" in told
    told = Encrypted(mode="strict", compute_client=5).describe(3)
    assert "client 5 holds the model" in told
    assert "logits" not in told


@pytest.mark.parametrize(("party", "cohort"), [(None, 9), (4, 8)])
def test_central_noise_is_of_the_owners_cohort(party, cohort):
    """Whoever computes is drawn and left out: the mean is over the others, and so is what one of them can change."""
    pipeline = Pipeline(
        collector=Encrypted(metrics=False, compute_client=party),
        stages=[Clip(norm=0.5)],
        combiner=uniform(denominator="cohort"),
        sampler=Poisson(fraction=1.0, population=9),
        privacy=Central(noise_multiplier=1.0, population=9, rounds=3),
    )
    claim = pipeline.check()
    assert claim.bounds == {DELTA: 0.5}
    assert claim.cohort == cohort
    assert claim.sensitivity == pytest.approx(0.5 / cohort)
    assert pipeline.privacy.report()["unit"] == "client"


def test_local_noise_is_the_owner_s_own():
    clip, promise = Clip(norm=0.5), Local(noise_multiplier=1.0, population=9, rounds=3)
    pipeline = Pipeline(
        collector=Encrypted(metrics=False),
        stages=[clip, *promise.stages(clip.bounds)],
        combiner=uniform(),
        sampler=Uniform(population=9),
        privacy=promise,
    )
    assert pipeline.check().private == "local gaussian"


def test_a_share_of_the_clients_is_drawn_as_the_sampler_has_claimed():
    """What an account claims of sampling must hold for each owner, whoever computes."""
    sampler = Uniform(fraction=0.5, population=6)
    drawn, others = [], 0
    for number in range(1, 400):
        ours = Pipeline(collector=Encrypted(compute_client=2), sampler=sampler)
        theirs = Pipeline(sampler=sampler)
        ours.check()
        draw = ours.draw(range(6), seed=1, round_number=number, attempt=0)
        whole = theirs.draw(range(6), seed=1, round_number=number, attempt=0)
        assert draw == [client for client in whole if client != 2]
        others += len(whole) > len(draw)
        drawn.append(draw)
    assert ours.claim.cohort == 3  # of which one may be the one that computes
    assert others > 0
    assert {client for draw in drawn for client in draw} == {0, 1, 3, 4, 5}


def test_who_computes_is_not_asked_beyond_a_cohort_either():
    pipeline = Pipeline(
        collector=Encrypted(compute_client=2),
        sampler=Uniform(fraction=0.25, population=4),
        scheduler=Synchronous(over_selection=1.0),
    )
    pipeline.check()
    for number in range(20):
        chosen = pipeline.pick([1, 2, 3], 3, seed=number, round_number=1, number=2)
        assert chosen == [1, 3]


def test_two_clients_are_the_least_where_one_computes():
    collector = Encrypted(compute_client=1)
    assert (collector.least_clients(), Encrypted().least_clients()) == (2, 1)
    assert Pipeline(collector=collector).least_clients(100) == 2
