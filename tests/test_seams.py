"""Attacks where parts meet: which of them refuses a lie and for what reason, or bears it and within what bound.

Whole rounds on a scripted grid, with real parts. A liar is a node of its own: other code than the honest client's half.
"""

import copy
import logging
import math

import numpy as np
import pytest
from flwr.app import Error, Message

from fl_app.engine.flwr_internals import claim_identity
from strategies import Pipeline, PipelineStrategy
from strategies.admission import Admission
from strategies.collectors import Masked, Plain
from strategies.combiners import Mean, Median, NearestNeighborMixing, TrimmedMean
from strategies.privacy import Distributed, Local
from strategies.privacy.rotation import Rotation
from strategies.protocols import ClientOwn
from strategies.samplers import Poisson, Uniform
from strategies.secagg.fixed_point import LARGEST
from strategies.stages import Clip
from strategies.stages.integer_noise import rotation_seed
from strategies.update import DELTA, Section
from strategies.wire import RECEIPT, UPDATE, Refused, pack, pack_model, unpack
from tests.support.grids import ScriptedGrid, trellis_node
from tests.support.masked import folder, step_of
from tests.support.updates import parameters

SIZE, COHORT, BOUND = 60, 9, 1.0
LIAR = 4
ONES = np.full(SIZE, BOUND / math.sqrt(SIZE), np.float32)
"""What the honest send: all the same, of the clip's own length."""


@pytest.fixture(autouse=True)
def _server_identity() -> None:
    """`Message()` asks for the identity of the process, which Flower's launchers set."""
    claim_identity(run_id=1)


def change(client: int, number: int, arrays: object) -> dict[str, np.ndarray]:
    return {DELTA: ONES}


def run(line: Pipeline, nodes: dict, rounds: int = 1) -> np.ndarray:
    """The model, from zeros, after so many rounds."""
    one = PipelineStrategy(line, federated_every=0)
    one.start(ScriptedGrid(nodes), pack_model(parameters(*np.zeros(SIZE))), num_rounds=rounds)
    return one.model.parameters


def cohort(line: Pipeline, liar=None, half=None, among: int = COHORT) -> dict:
    """Honest nodes by client, and one that is not."""
    nodes = {client: trellis_node(change, stages=line.stages, half=half) for client in range(among)}
    return nodes | ({} if liar is None else {LIAR: liar})


def sending(vector: np.ndarray, stages=(), half=None):
    """A node whose vector goes through these stages only."""
    return trellis_node(lambda *_: {DELTA: vector}, stages=stages, half=half)


def spike(size: float, places: int = 3) -> np.ndarray:
    vector = ONES.copy()
    vector[:places] = size
    return vector


def plain(**parts) -> Pipeline:
    given = {"combiner": Mean(weighting="uniform"), "admission": Admission(on_shortfall="skip")}
    return Pipeline(**{**given, **parts})


def reasons(line: Pipeline) -> dict[str, int]:
    return dict(line.admission.refusals)


# ---- huge values in a few coordinates ----


def test_admission_refuses_a_spike_past_its_limit():
    line = plain()
    model = run(line, cohort(line, sending(spike(1e11))))
    assert reasons(line) == {"too_large": 1}
    np.testing.assert_allclose(model, ONES, rtol=1e-6)


@pytest.mark.parametrize("size", [1e3, 1e9, -1e9])
def test_the_servers_clip_bears_a_spike_that_admission_passes(size):
    """One of nine moves the mean by 2C/9 at most, whatever its own half of the clip did."""
    line = plain(stages=[Clip(norm=BOUND)])
    model = run(line, cohort(line, sending(spike(size))))
    assert reasons(line) == {}
    assert np.linalg.norm(model - ONES) <= 2 * BOUND / COHORT * (1 + 1e-5)


def test_a_rule_bears_a_spike_that_nobody_clips():
    for rule in (Median(f=1), NearestNeighborMixing(f=1, rule=TrimmedMean())):
        line = plain(combiner=rule, sampler=Uniform(population=COHORT))
        model = run(line, cohort(line, sending(spike(1e9))))
        np.testing.assert_allclose(model, ONES, rtol=1e-5)


# ---- NaN ----


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stages", [[], [Clip(norm=BOUND)]], ids=["as it comes", "clipped"])
def test_admission_refuses_what_is_not_finite(value, stages):
    line = plain(stages=stages)
    model = run(line, cohort(line, sending(spike(value), stages)))
    assert reasons(line) == {"not_finite": 1}
    np.testing.assert_allclose(model, ONES, rtol=1e-5)


def test_under_masks_an_honest_half_keeps_nan_at_home():
    line = plain(collector=Masked(metrics=()), sampler=Uniform(population=COHORT))
    with folder() as path:
        half = line.collector.client_half(ClientOwn(path, {}, simulated=True))
        honest, told = sending(spike(np.nan), half=half), []

        def answer(message):
            try:
                return list(honest(message))
            except Refused as refused:
                told.append(refused.reason)
                return [Message(Error(2, refused.told), reply_to=message)]

        model = run(line, cohort(line, answer, half))
    assert told == ["not_finite"]
    assert reasons(line) == {"client_error": 1}  # the server knows no more than that it is gone
    np.testing.assert_allclose(model, ONES, atol=1e-6)


def test_under_shared_noise_nan_counts_as_zeros():
    line = shared(noise_multiplier=1e-4)
    model = noised(line, lambda half: sending(spike(np.nan), line.stages, half))
    np.testing.assert_allclose(model, ONES * (COHORT - 1) / COHORT, atol=1e-3)


# ---- replays ----


def recorder(node, kept: list[Message]):
    """A node that keeps what it answers."""

    def answer(message: Message):
        for reply in node(message):
            kept.append(copy.deepcopy(reply.content))
            yield reply

    return answer


def test_the_same_reply_twice_counts_once():
    line = plain()
    honest = sending(-ONES)

    def twice(message):
        (reply,) = honest(message)
        return [reply, reply, reply]

    model = run(line, cohort(line, twice))
    np.testing.assert_allclose(model, ONES * (COHORT - 2) / COHORT, rtol=1e-5)


@pytest.mark.parametrize(
    ("source", "receipt", "reason"),
    [
        ("its own of round 1", {}, "round"),
        ("its own of round 1", {"round": 2}, "version"),
        ("another's of this round", {}, "impostor"),
    ],
)
def test_the_receipt_tells_a_reply_of_another_round_or_client(source, receipt, reason):
    line, kept = plain(), []
    nodes = cohort(line)
    thief = LIAR if source.startswith("its own") else LIAR - 1
    nodes[thief] = recorder(nodes[thief], kept)
    honest = nodes[LIAR]

    def replay(message):
        (reply,) = honest(message)
        if message.content["config"]["server-round"] == 1:
            return [reply]
        content = kept[0] if thief == LIAR else kept[-1]
        content[RECEIPT].update(receipt)
        return [Message(content, reply_to=message)]

    model = run(line, {**nodes, LIAR: replay}, rounds=2)
    assert reasons(line) == {reason: 1}
    np.testing.assert_allclose(model, 2 * ONES, rtol=1e-5)


def test_a_copied_vector_under_a_receipt_of_ones_own_is_one_more_client_of_that_mind():
    """Nothing tells a copy from an update of the same data: it has one client's weight, and no more."""
    line, kept = plain(), []
    nodes = cohort(line, among=LIAR)
    nodes[0] = recorder(sending(-ONES), kept)
    honest = sending(ONES)

    def copying(message):
        (reply,) = honest(message)
        reply.content[UPDATE][DELTA] = pack(unpack(kept[-1][UPDATE][DELTA]))
        return [reply]

    model = run(line, {**nodes, LIAR: copying})
    assert reasons(line) == {}
    np.testing.assert_allclose(model, ONES * (3 - 2) / 5, rtol=1e-5)


@pytest.mark.parametrize("source", ["its own of round 1", "another's of this round"])
def test_a_replayed_upload_is_under_masks_that_do_not_cancel(source, caplog):
    """The sum's own count is wrong but once in 2³²: that group has no sum, and the rule goes on with the others'."""
    line = plain(
        collector=Masked(metrics=(), groups=3, seed=0),
        combiner=Median(f=0),
        sampler=Uniform(population=COHORT),
    )
    with folder() as path:
        half = line.collector.client_half(ClientOwn(path, {}, simulated=True))
        nodes, kept = cohort(line, half=half), []
        thief = LIAR if source.startswith("its own") else LIAR - 1
        nodes[thief] = recorder(nodes[thief], kept)
        honest = nodes[LIAR]

        def replay(message):
            (reply,) = honest(message)
            uploads = [one for one in kept if "upload" in one]
            if (
                step_of(message.content) == "upload"
                and message.content["config"]["server-round"] == 2
            ):
                reply.content["upload"] = (uploads[0] if thief == LIAR else uploads[-1])["upload"]
            return [reply]

        with caplog.at_level(logging.WARNING):
            model = run(line, {**nodes, LIAR: replay}, rounds=2)
    assert "corrupt: the sum of 3 clients counts" in caplog.text
    np.testing.assert_allclose(model, 2 * ONES, atol=1e-6)


# ---- the ring's limit ----


def test_under_masks_alone_a_full_ring_is_borne_by_the_rule_across_groups():
    """What a modified client adds behind its masks is in its group's sum, past any clip: the median leaves it out."""
    line = plain(
        collector=Masked(metrics=(), groups=3, seed=0, limit=BOUND),
        combiner=Median(f=1),
        sampler=Uniform(population=COHORT),
    )
    with folder() as path:
        half = line.collector.client_half(ClientOwn(path, {}, simulated=True))
        nodes = cohort(line, half=half)
        honest = nodes[LIAR]

        def push(message):
            (reply,) = honest(message)
            if step_of(message.content) == "upload":
                vector = np.array(unpack(reply.content["upload"]["masked"]))
                vector[:SIZE] += np.uint32(2**30)
                reply.content["upload"]["masked"] = pack(vector)
            return [reply]

        model = run(line, {**nodes, LIAR: push})
    np.testing.assert_allclose(model, ONES, atol=1e-6)


class Forged:
    """The client half of shared noise as an attacker has it: whole numbers of its own choice, without clip and noise.

    Args:
        vector: given the settings that came down and the version, in whole numbers.
    """

    name = "integers"

    def __init__(self, vector) -> None:
        self._vector = vector

    def encode(self, update, context):
        vector = self._vector(context.settings, update.version).astype(np.float32)
        return update.with_section(DELTA, Section(vector, update.delta.layout))


def shared(*, groups: int = 1, combiner=None, **settings) -> Pipeline:
    """Nine clients under masks, and shares of integer noise behind a clip."""
    privacy = Distributed(**{"population": COHORT, "size": SIZE, **settings})
    clip = Clip(norm=BOUND)
    return plain(
        collector=Masked(whole=True, metrics=(), groups=groups, seed=0),
        stages=[clip, *privacy.stages(clip.bounds)],
        combiner=combiner or Mean(weighting="uniform", denominator="cohort"),
        sampler=Poisson(fraction=1.0, population=COHORT),
        privacy=privacy,
    )


def noised(line: Pipeline, liar) -> np.ndarray:
    """The model after a round with a liar that is made for the clients' half of the masks."""
    with folder() as path:
        half = line.collector.client_half(ClientOwn(path, {}, simulated=True))
        return run(line, cohort(line, liar(half), half))


def full_ring(settings, version) -> np.ndarray:
    signs = np.where(np.arange(SIZE) % 2, -1, 1)
    return signs * (LARGEST // COHORT)


def pulling(length: float):
    """Away from what all others want, so many times the noise's length in the sum."""

    def vector(settings, version):
        seed = rotation_seed(int(settings["seed"]), version)
        turned = Rotation(seed, SIZE).forward(-ONES)
        noise = math.sqrt(settings["variance"] * 3 * SIZE)
        return np.rint(turned / np.linalg.norm(turned) * length * noise)

    return vector


def test_shared_noise_refuses_a_full_ring_and_the_round_of_one_sum_is_void(caplog):
    line = shared(noise_multiplier=0.5)
    with caplog.at_level(logging.WARNING):
        model = noised(line, lambda half: sending(ONES, [Forged(full_ring)], half))
    assert "too_large" in caplog.text
    assert "one has skipped its clip" in caplog.text
    assert not model.any()


def test_a_rule_across_groups_goes_on_without_the_sum_that_was_refused(caplog):
    """f = 1 of three groups: the refused one was it, and two are left, of whom none lies."""
    line = shared(groups=3, combiner=Median(f=1), noise_multiplier=1e-3)
    with caplog.at_level(logging.WARNING):
        model = noised(line, lambda half: sending(ONES, [Forged(full_ring)], half))
    assert "too_large" in caplog.text
    np.testing.assert_allclose(model, ONES, atol=2e-3)


# ---- noise that hides an attacker ----


def test_a_lie_of_the_noises_length_passes_and_moves_the_model_no_further_than_the_longest_sum(
    caplog,
):
    """Under much noise a lie of several clips is as good as noise: nothing refuses it. It is bounded all the same."""
    line = shared(noise_multiplier=20.0)
    with caplog.at_level(logging.WARNING):
        model = noised(line, lambda half: sending(ONES, [Forged(pulling(0.5))], half))
    assert "too_large" not in caplog.text
    steps = line.privacy._steps()
    longest = steps.longest(COHORT) / steps.norm * BOUND / COHORT
    assert 0 < np.linalg.norm(model) <= longest
    assert (
        np.linalg.norm(model) > 2 * BOUND
    )  # past what all honest clients together would have moved it by


def test_under_little_noise_the_same_lie_has_nowhere_to_hide():
    """It is no longer than the noise, so it is short: 0.5·z·C·√(d/honest shares) in the sum."""
    line = shared(noise_multiplier=0.02)
    calm = (COHORT - 1) / COHORT * ONES
    model = noised(line, lambda half: sending(ONES, [Forged(pulling(0.5))], half))
    noise = 0.02 * BOUND * math.sqrt(SIZE) / COHORT
    assert np.linalg.norm(model - calm) < 3 * noise


def test_under_local_noise_nothing_clips_a_liar_and_a_rule_bears_it():
    """The server's clip does not run behind noise: the median stays among what the honest sent, a mean does not."""
    found = {}
    for combiner in (Median(f=1), Mean(weighting="uniform")):
        privacy = Local(noise_multiplier=0.1, population=COHORT)
        clip = Clip(norm=BOUND)
        line = plain(
            collector=Plain(metrics=False),
            stages=[clip, *privacy.stages(clip.bounds)],
            combiner=combiner,
            sampler=Uniform(population=COHORT),
            privacy=privacy,
        )
        found[type(combiner)] = run(line, cohort(line, sending(spike(1e6, SIZE))))
        assert reasons(line) == {}
    # Of eight honest values of an element, N(x, (0.1·C)²), none is further off than 8σ but once in 10¹².
    assert np.abs(found[Median] - ONES).max() < 0.8 * BOUND
    np.testing.assert_allclose(found[Mean], 1e6 / COHORT, rtol=1e-3)
