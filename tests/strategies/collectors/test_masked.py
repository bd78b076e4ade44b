"""What is opened is, bit for bit, the sum of the survivors' fixed-point vectors modulo 2³², rightly weighed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.collectors.groups import Grouped
from strategies.collectors.masked import Masked
from strategies.contents import FIXED_POINT_ERROR, SATURATED
from strategies.contract import Claim, ContractError, Visibility
from strategies.protocols import Request
from strategies.secagg.masking import codings
from strategies.update import BUFFERS, COUNTERS, DELTA
from strategies.wire import Refused
from tests.support.masked import Cohort, cohort, folder

MODES = pytest.mark.parametrize("mode", ["semi-honest", "malicious"])


@settings(max_examples=25)
@given(data=st.data())
def test_the_opened_ring_vector_is_the_sum_of_the_survivors_encodings(data):
    members = data.draw(st.integers(3, 8), "members")
    mode = data.draw(st.sampled_from(["semi-honest", "malicious"]), "mode")
    size = data.draw(st.integers(1, 7), "size")
    values = st.lists(st.floats(-3, 3, width=32), min_size=size, max_size=size)
    weights = st.integers(1, 40).map(float)
    options = {
        "vectors": {one: data.draw(values) for one in range(members)},
        "weights": {one: data.draw(weights) for one in range(members)},
        "max_weight": data.draw(st.none() | st.integers(1, 50), "max_weight"),
        "limit": data.draw(st.sampled_from([0.5, 1.0, 4.0]), "limit"),
    }
    # 2t > n, so that fewer than half may go; the malicious quorum is a majority as well.
    most = (members - 1) // 2
    gone = data.draw(st.lists(st.integers(0, members - 1), unique=True, max_size=most), "gone")
    step = data.draw(st.sampled_from(["keys", "shares", "upload"]), "step")
    with cohort(members, mode=mode, dropouts=most / members, **options) as clients:
        outcome = clients.run(lost={step: gone})
        left = sorted(set(range(members)) - set(gone))
        np.testing.assert_array_equal(
            outcome.ring, clients.sum_of(clients.terms(outcome), left), strict=True
        )
        assert outcome.update.members == tuple(left)


@pytest.mark.parametrize("first", range(5))
@pytest.mark.parametrize("step", ["upload", "unmask"])
def test_three_of_five_open_the_sum_whichever_two_are_gone(first, step):
    """Complete graph, threshold 3: any two of five drop out."""
    gone = {first, (first + 1 + first % 2) % 5}
    with cohort(5) as clients:
        outcome = clients.run(lost={step: gone})
        terms = clients.terms(outcome)
        assert (terms.degree, terms.threshold) == (4, 3)
        summed = set(range(5)) - gone if step == "upload" else range(5)
        np.testing.assert_array_equal(outcome.ring, clients.sum_of(terms, summed))


@pytest.mark.parametrize(("mode", "members"), [("semi-honest", 40), ("malicious", 102)])
def test_a_sparse_graph_opens_the_same_sum(mode, members):
    """Each shares with ten; two drop out before their upload, two more after it."""
    with cohort(members, mode=mode, dropouts=0.05) as clients:
        outcome = clients.run(lost={"upload": [3, 17], "unmask": [5, 6]})
        terms = clients.terms(outcome)
        assert 10 <= terms.degree < 20
        survivors = sorted(set(range(members)) - {3, 17})
        np.testing.assert_array_equal(outcome.ring, clients.sum_of(terms, survivors))


@MODES
def test_a_complete_graph_of_twenty_opens_the_same_sum(mode):
    with cohort(20, mode=mode, complete=True, dropouts=0.2) as clients:
        outcome = clients.run(lost={"shares": [0], "upload": [1, 2]})
        terms = clients.terms(outcome)
        assert terms.degree == 19
        np.testing.assert_array_equal(outcome.ring, clients.sum_of(terms, range(3, 20)))


def test_stochastic_rounding_is_off_by_less_than_a_step_a_client():
    with cohort(5, stochastic=True, size=40) as clients:
        outcome = clients.run(lost={"upload": [4]})
        terms = clients.terms(outcome)
        exact = sum(clients.vectors[one].astype(np.float64) for one in range(4))
        steps = exact * codings(terms)[0].scale
        off = outcome.ring[:40].view(np.int32) - steps
        assert np.abs(off).max() < 4
        assert np.abs(off - np.rint(off)).max() > 0.01  # it was not the exact sum by chance


@MODES
def test_the_update_is_the_weighted_mean_with_its_metrics(mode):
    weights = {0: 5.0, 1: 10.0, 2: 25.0, 3: 1.0, 4: 9.0}
    options = {"weights": weights, "max_weight": 20, "metrics": {"train_loss": 2.5, "other": 9.0}}
    with cohort(5, mode=mode, **options) as clients:
        update = clients.run().update
        counted = {one: min(weight, 20.0) for one, weight in weights.items()}
        total = sum(counted.values())
        exact = sum(w * clients.vectors[one].astype(np.float64) for one, w in counted.items())
        np.testing.assert_allclose(update.delta.vector, exact / total, rtol=1e-6, atol=1e-8)
        assert update.weight == pytest.approx(
            total, rel=1e-12
        )  # whole numbers of examples are exact
        assert set(update.metrics) == {"train_loss", SATURATED, FIXED_POINT_ERROR}
        assert update.metrics["train_loss"] == pytest.approx(2.5, rel=1e-5)


def test_the_expected_error_is_the_error_that_rounding_makes():
    """4,000 elements: the length of the error is within 10% of what is expected, more than 8 standard errors."""
    with cohort(5, size=4_000, limit=1e4) as clients:
        outcome = clients.run()
        terms, update = clients.terms(outcome), outcome.update
        exact = np.mean([clients.vectors[one].astype(np.float64) for one in range(5)], axis=0)
        mean = outcome.ring[:4_000].view(np.int32) * codings(terms)[0].step / 5
        found = np.linalg.norm(mean - exact) / np.linalg.norm(mean)
        assert update.metrics[FIXED_POINT_ERROR] == pytest.approx(found, rel=0.1)


def test_what_is_cut_at_the_limit_is_reported_and_cut():
    vectors = {one: [5.0, 0.25, -7.0, 0.5] for one in range(4)}
    with cohort(4, vectors=vectors, limit=1.0, dropouts=0.25) as clients:
        update = clients.run().update
        np.testing.assert_allclose(update.delta.vector, [1, 0.25, -1, 0.5], atol=1e-8)
        assert update.metrics[SATURATED] == pytest.approx(0.5, rel=1e-6)


def test_the_limit_is_the_pipelines_bound_unless_it_is_set():
    with cohort(4, dropouts=0.25) as clients:
        job = clients.job()
        bounded = type(job)(**{**vars(job), "bounds": {DELTA: 0.125}})
        for limit, expected in ((None, 0.125), (2.0, 2.0)):
            collector = Masked(limit=limit, dropouts=0.25)
            session = collector.open(bounded, range(4))
            session.start()
            assert session._terms.limit == expected


def test_groups_are_sums_of_their_own_that_share_no_session():
    with folder() as path:
        collector = Masked(groups=3, dropouts=0.25, colluders=0.0, seed=7)
        clients = Cohort(path, collector, range(13))
        grouped = collector.open(clients.job(), range(13))
        assert isinstance(grouped, Grouped)
        outcomes = [clients.run(session=session) for session in grouped._sessions]
        members = [outcome.update.members for outcome in outcomes]
        assert sorted(one for group in members for one in group) == list(range(13))
        assert [len(group) for group in members] == [4, 4, 5]
        for outcome in outcomes:
            expected = clients.sum_of(clients.terms(outcome), outcome.update.members)
            np.testing.assert_array_equal(outcome.ring, expected)
        assert grouped.done


def test_groups_are_drawn_by_seed_and_round():
    def drawn(round_number: int, seed: int | None = 3):
        with folder() as path:
            collector = Masked(groups=2, dropouts=0.25, seed=seed)
            clients = Cohort(path, collector, range(8))
            clients.round = round_number
            grouped = collector.open(clients.job(), range(8))
            return [session._members for session in grouped._sessions]

    assert drawn(1) == drawn(1) != drawn(2)
    assert sorted(one for group in drawn(1, None) for one in group) == list(range(8))


def test_a_group_waits_for_its_own_clients_only_and_expires_by_itself():
    with folder() as path:
        clients = Cohort(path, Masked(groups=2, dropouts=0.25, colluders=0.0), range(8))
        grouped = clients.collector.open(clients.job(), range(8))
        requests = grouped.start()
        with pytest.raises(Refused, match="in no group"):
            grouped.receive(
                type("R", (), {"request": Request(99, "train", requests[0].content, 1)})
            )
        late = grouped.expire()
        assert len([event for event in late if not isinstance(event, Request)]) == 8 + 2
        assert grouped.done
        assert grouped.expire() == []


# ---- the contract ----


def test_what_is_seen_is_a_sum_and_nothing_travels_in_clear():
    claim = Masked().check(Claim(cohort=10, clear=frozenset({"metrics"})))
    assert (claim.visibility, claim.clear, claim.summed) == (Visibility.SUM, frozenset(), "uniform")
    grouped = Masked(groups=2).check(Claim(cohort=20))
    assert (grouped.visibility, grouped.groups) == (Visibility.GROUP, 2)
    assert Masked(max_weight=9).check(Claim(cohort=10)).summed == "examples"


@pytest.mark.parametrize(
    ("claim", "options", "words"),
    [
        (Claim(client_half=False), {}, "pipeline_mod"),
        (Claim(sections=frozenset({DELTA, BUFFERS, COUNTERS})), {}, "use GroupNorm"),
        (Claim(cohort=2), {}, "ask 3 clients a round or more"),
        (Claim(cohort=5), {"groups": 2}, "or make fewer groups"),
        (Claim(cohort=10), {"malicious": True, "dropouts": 0.6}, "signatures"),
    ],
)  # fmt: skip
def test_what_masks_cannot_hide_is_refused_with_the_mend(claim, options, words):
    with pytest.raises(ContractError, match=words):
        Masked(**options).check(claim)


def test_groups_weighted_by_examples_are_refused():
    with pytest.raises(ValueError, match="leave max_weight out"):
        Masked(groups=2, max_weight=5)


def test_the_numbers_are_described():
    assert Masked().describe(10).startswith("masked: each of 10 clients masks with 9 others")
    assert Masked(groups=2).describe(20).startswith("masked, 2 groups: each of 10")
