"""Attacks where compression and asynchrony meet the other parts: which of them refuses a lie, or bears it.

As `test_seams`: whole rounds on a scripted grid, with real parts; a liar is a node of its own.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import zstandard

from strategies import Pipeline
from strategies.admission import STALE
from strategies.collectors import Plain
from strategies.combiners import Mean, NearestNeighborMixing, TrimmedMean
from strategies.compression.entropy import Reader
from strategies.compression.gaps import pack_indices, unpack_indices
from strategies.compression.levels import pack_levels
from strategies.compression.sparse import pack_sparse
from strategies.protocols import ClientContext
from strategies.samplers import Uniform
from strategies.schedulers import Buffered
from strategies.stages import Clip, Quantize, Sign, TopK
from strategies.update import DELTA, Layout, Section, Update
from strategies.wire import Refused
from tests.support.buffered import after
from tests.support.grids import trellis_node
from tests.test_seams import (
    BOUND,
    COHORT,
    LIAR,
    ONES,
    SIZE,
    _server_identity,
    change,
    cohort,
    plain,
    reasons,
    run,
    sending,
    spike,
)

__all__ = ["_server_identity"]

LAYOUT = Layout(("w",), ((SIZE,),))
TOP = TopK(ratio=0.1, error_feedback=False)
BITS = Quantize(bits=8, bucket=SIZE)


@dataclass(frozen=True)
class Forged:
    """A client's last stage that sends these bytes for its change."""

    packed: bytes
    name = "forged"

    def encode(self, update, context):
        return update.with_section(DELTA, replace(update.delta, packed=self.packed))


def compressed(compression, **parts) -> Pipeline:
    first, last = compression.stages()
    return plain(stages=[*first, Clip(norm=BOUND), *last], **parts)


def outcome(line: Pipeline, packed: bytes) -> tuple[dict[str, int], np.ndarray]:
    """Why replies were refused, and the model, where one of nine sends these bytes."""
    model = run(line, cohort(line, sending(ONES, stages=[Forged(packed)])))
    return reasons(line), model


def sparse(vector: np.ndarray, precision="float16") -> bytes:
    return pack_sparse(vector.astype(np.float32), precision, "zstd")


def honest_model(compression) -> np.ndarray:
    line = compressed(compression)
    return run(line, cohort(line))


# ---- false coordinates ----


def test_a_coordinate_past_the_model_is_refused_as_it_is_unpacked():
    far = np.zeros(2 * SIZE, np.float32)
    far[[3, SIZE + 1]] = 1
    refused, model = outcome(compressed(TOP), sparse(far))
    assert refused == {"malformed": 1}
    np.testing.assert_allclose(model, honest_model(TOP), rtol=1e-3)


def test_more_coordinates_than_were_asked_for_are_refused():
    refused, _ = outcome(compressed(TOP), sparse(np.ones(SIZE)))
    assert refused == {"malformed": 1}


def test_a_coordinate_cannot_be_sent_twice():
    """Gaps count from the coordinate before: whatever is written as a gap leads on."""
    rng, taken = np.random.default_rng(0), 0
    good = pack_indices(np.array([0, 11, 22, 33, 44, 55]), SIZE, "none")
    for _ in range(2000):
        forged = bytearray(good)
        forged[rng.integers(len(forged))] = rng.integers(256)
        try:
            indices = unpack_indices(Reader(bytes(forged)), 6, SIZE, "none")
        except Refused:
            continue
        taken += 1
        assert len(indices) == 6
        assert (np.diff(indices) > 0).all()
        assert 0 <= indices[0] <= indices[-1] < SIZE
    assert taken > 50


# ---- what is not a number ----


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_admission_refuses_values_that_are_not_finite_behind_their_code(value):
    vector = np.zeros(SIZE, np.float32)
    vector[7] = value
    refused, model = outcome(compressed(TOP), sparse(vector))
    assert refused == {"not_finite": 1}
    assert np.isfinite(model).all()


def test_a_scale_that_is_no_number_is_refused_as_it_is_unpacked():
    vector = ONES.copy()
    vector[0] = np.nan
    packed = pack_levels(vector, 8, SIZE, lambda out: out.fill(0), "zstd")
    refused, model = outcome(compressed(BITS), packed)
    assert refused == {"not_finite": 1}
    np.testing.assert_allclose(model, ONES, atol=0.01)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 3e38])
def test_a_forged_scale_of_signs_moves_nothing_further_than_the_clip(scale):
    line = compressed(Sign(error_feedback=False))
    update = Update({DELTA: Section(ONES, LAYOUT)}, 1.0, (0,), 0)
    honest = line.stages[-1].encode(update, ClientContext(0, 1, {})).delta.packed
    body = np.float32(scale).tobytes() + honest[4:]
    refused, model = outcome(line, body)
    assert sum(refused.values()) == 1 or np.linalg.norm(model - ONES) <= 2 * BOUND / COHORT + 0.01
    assert np.isfinite(model).all()


# ---- bombs ----


@pytest.mark.parametrize("compression", [TOP, BITS], ids=["top_k", "quantize"])
def test_a_bomb_is_refused_before_it_goes_off(compression):
    """256 MiB of zeros are 12 kB: longer than any honest reply to 60 parameters, so it is not even unpacked."""
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 28))
    refused, model = outcome(compressed(compression), len(bomb).to_bytes(4, "little") + bomb)
    assert refused == {"too_large": 1}
    assert np.isfinite(model).all()


def test_a_small_bomb_is_refused_by_what_its_frame_says():
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 20))
    packed = (1).to_bytes(4, "little") + len(bomb).to_bytes(4, "little") + bomb
    assert len(packed) < TOP.stages()[1][0].most_bytes(LAYOUT)
    refused, _ = outcome(compressed(TOP), packed)
    assert refused == {"malformed": 1}


# ---- huge values in a few coordinates ----


@pytest.mark.parametrize("size", [1e3, 6e4])
def test_the_servers_clip_bears_a_spike_that_came_in_few_coordinates(size):
    line = compressed(TOP)
    model = run(line, cohort(line, sending(spike(size), stages=line.stages[-1:])))
    assert np.linalg.norm(model - honest_model(TOP)) <= 2 * BOUND / COHORT * (1 + 1e-3)


# ---- stale lies ----


def delayed(rule, liar_seconds: float, **settings) -> tuple[np.ndarray, Pipeline]:
    """Nine clients, of whom eight answer in a second each and one lies, late; a step for every two updates."""
    nodes = {client: after(1.0, trellis_node(change)) for client in range(COHORT)}
    nodes[LIAR] = after(liar_seconds, sending(-100 * ONES))
    scheduler = Buffered(buffer=4, concurrency=COHORT, population=COHORT, **settings)
    line = plain(
        collector=Plain(),
        combiner=rule,
        scheduler=scheduler,
        sampler=Uniform(population=COHORT),
    )
    return run(line, nodes, rounds=16), line


def test_a_stale_lie_weighs_as_little_as_any_update_of_its_age_under_a_mean():
    """The lie of −100 in one place of four, nine versions old, pulls by 100 · 10^(−1/2) / 4 ≈ 7.9 and not by 25."""
    honest, _ = delayed(Mean(weighting="uniform"), 1e6)
    model, line = delayed(Mean(weighting="uniform"), 5.1)
    assert reasons(line) == {}
    pull = np.linalg.norm(honest - model)
    assert 100 / 4 * 11**-0.5 < pull < 100 / 4


def test_a_rule_bears_a_stale_lie():
    honest, _ = delayed(NearestNeighborMixing(f=1, rule=TrimmedMean()), 1e6)
    model, _ = delayed(NearestNeighborMixing(f=1, rule=TrimmedMean()), 5.1)
    assert np.linalg.norm(honest - model) < 1


def test_a_lie_that_is_too_old_is_refused_as_stale_and_strikes_nobody():
    model, line = delayed(Mean(weighting="uniform"), 6.1, max_staleness=8)
    honest, _ = delayed(Mean(weighting="uniform"), 1e6, max_staleness=8)
    assert reasons(line)[STALE] >= 1
    assert line.admission.strikes[LIAR] == 0
    np.testing.assert_allclose(model, honest, rtol=1e-6)
