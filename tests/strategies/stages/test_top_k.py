import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.admission import Admission
from strategies.compression.selection import largest
from strategies.compression.values import as_sent
from strategies.contract import Claim, ContractError, Visibility
from strategies.pipeline import Pipeline
from strategies.replies import write_update
from strategies.sizes import count_bytes
from strategies.stages import Clip, Sparse, TopK
from strategies.update import DELTA
from strategies.wire import Refused
from tests.support.compression import arrived, encoded, normal, one, received


def stages(**settings) -> list:
    before, behind = TopK(**settings).stages()
    return [*before, *behind]


@given(st.integers(0, 1000), st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_the_largest_elements_arrive_and_the_rest_is_remembered(seed, ratio):
    values = normal(seed=seed)
    found, proposed = arrived(one(values), stages(ratio=ratio))
    chosen = largest(values, round(ratio * 400))
    expected = np.zeros(400, np.float32)
    expected[chosen] = as_sent(values[chosen], "float16")
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(proposed["top_k.error"], values - expected)


@given(st.integers(0, 1000), st.sampled_from(["float16", "float32"]))
def test_what_was_sent_and_what_is_remembered_make_up_all_changes(seed, values):
    """Karimireddy et al. 2019: Σ sent + e = Σ δ after any number of rounds, and each round sends top_k(δ + e)."""
    total, sent, memory = np.zeros(400), np.zeros(400), {}
    for number in range(12):
        change = normal(seed=seed + number)
        found, memory = arrived(one(change), stages(ratio=0.05, values=values), memory)
        total += change
        sent += found
    np.testing.assert_allclose(sent + memory["top_k.error"], total, atol=1e-5)


def test_the_memory_of_a_refused_update_is_not_used():
    """The client half never changes what it is given: a lost round leaves the state that it began with."""
    memory = {"top_k.error": normal(seed=1)}
    before = memory["top_k.error"].copy()
    first, _ = arrived(one(normal()), stages(), memory)
    again, _ = arrived(one(normal()), stages(), memory)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(memory["top_k.error"], before)


def test_without_error_feedback_nothing_is_remembered():
    _, proposed = arrived(one(normal()), stages(error_feedback=False))
    assert proposed == {}
    assert not TopK(error_feedback=False).remembers
    assert TopK().remembers


def test_small_elements_travel_in_time_only_where_they_are_fed_back():
    change = np.full(100, 0.01, np.float32)
    change[0] = 1.0
    for error_feedback in (True, False):
        total, memory = np.zeros(100), {}
        for _ in range(300):
            settings = {"ratio": 0.01, "error_feedback": error_feedback}
            found, memory = arrived(one(change), stages(**settings), memory)
            total += found
        assert (total[1:] > 0).all() == error_feedback


def test_what_a_clip_behind_cuts_is_lost():
    before, behind = TopK(ratio=0.1).stages()
    clipped, memory = arrived(one(normal(scale=10)), [*before, Clip(norm=1.0), *behind])
    free, expected = arrived(one(normal(scale=10)), [*before, *behind])
    assert np.linalg.norm(clipped) <= 1.0
    np.testing.assert_allclose(clipped, free / np.linalg.norm(free), rtol=1e-3)
    np.testing.assert_array_equal(memory["top_k.error"], expected["top_k.error"])


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_diverged_update_is_refused_for_what_it_is(wrong):
    values = normal()
    values[123] = wrong
    sent, _ = encoded(one(values), stages())
    with pytest.raises(Refused) as refused:
        Admission().admit(received(sent, stages(), one(values).delta.layout))
    assert refused.value.reason == "not_finite"


def test_a_client_that_sends_more_than_its_share_is_refused():
    greedy, _ = encoded(one(normal()), stages(ratio=0.5))
    for reason, ratio in (("malformed", 0.4), ("too_large", 0.01)):
        with pytest.raises(Refused) as refused:
            received(greedy, stages(ratio=ratio), one(normal()).delta.layout)
        assert refused.value.reason == reason


@pytest.mark.parametrize(("values", "times"), [("float16", 100), ("float32", 70)])
@pytest.mark.parametrize("law", ["normal", "laplace"])
def test_one_percent_makes_a_whole_reply_so_many_times_smaller(values, times, law):
    """All that travels: vectors with their headers, receipt and metrics, of a model of 100,000 parameters."""
    size = 100_000
    vector = getattr(np.random.default_rng(0), law)(0, 1e-3, size).astype(np.float32)
    update, dense = one(vector), write_update(one(vector), client=0, round_number=1)
    sent, _ = encoded(update, stages(ratio=0.01, values=values))
    assert times * count_bytes(write_update(sent, client=0, round_number=1)) < count_bytes(dense)


def test_clients_speak_of_coordinates_of_their_own():
    claim = TopK().check(Claim(bounds={DELTA: 1.0}))
    assert claim.support == "per_client"
    assert claim.bounds == {}  # what is fed back may lengthen it


@pytest.mark.parametrize(
    ("claim", "why"),
    [
        (Claim(visibility=Visibility.SUM), "travel as all of them"),
        (Claim(visibility=Visibility.GROUP), "travel as all of them"),
        (Claim(private="local gaussian"), "mostly the noise"),
        (Claim(client_half=False), "does not run a part's client half"),
    ],
)
def test_what_top_k_cannot_stand_behind(claim, why):
    with pytest.raises(ContractError, match=why):
        TopK().check(claim)


@pytest.mark.parametrize(
    ("claim", "why"),
    [
        (Claim(), "nothing before it leaves most elements 0"),
        (Claim(support="per_client", private="local gaussian"), "noise leaves no zeros"),
        (Claim(support="per_client", packed="sign"), "no stage behind it can change"),
    ],
)
def test_what_the_packing_of_zeros_cannot_stand_behind(claim, why):
    with pytest.raises(ContractError, match=why):
        Sparse().check(claim)


def test_nothing_stands_behind_what_packs():
    before, behind = TopK().stages()
    with pytest.raises(ContractError, match="no stage behind it can change"):
        Pipeline(stages=[*before, *behind, Clip()]).check()


@pytest.mark.parametrize("ratio", [0, -0.1, 1.1])
def test_a_share_is_a_share(ratio):
    with pytest.raises(ValueError, match="ratio"):
        TopK(ratio=ratio)
