import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.collectors import Masked
from strategies.combiners import Mean
from strategies.contract import Claim, Visibility
from strategies.pipeline import Pipeline
from strategies.protocols import ClientOwn
from strategies.stages import Clip, RandomK
from strategies.strategy import PipelineStrategy
from strategies.update import DELTA, Layout, Section, Update
from strategies.wire import pack_model
from tests.support.compression import arrived, encoded, normal, one
from tests.support.grids import ScriptedGrid, trellis_node


def free(**settings) -> RandomK:
    return RandomK(**{"error_feedback": False} | settings)


def chosen(version: int, client: int = 0, ratio: float = 0.1) -> set[int]:
    found, _ = arrived(one(np.ones(400), version=version, client=client), [free(ratio=ratio)])
    return set(np.flatnonzero(found).tolist())


def test_all_clients_of_a_version_send_the_same_coordinates_and_another_version_others():
    assert len(chosen(3)) == 40
    assert chosen(3) == chosen(3, client=7)
    assert chosen(3) != chosen(4)
    other, _ = arrived(one(np.ones(400), version=3), [free(ratio=0.1, seed=1)])
    assert set(np.flatnonzero(other).tolist()) != chosen(3)


def test_a_section_travels_as_so_many_numbers_and_nothing_else():
    stage, layout = free(ratio=0.1), Layout(("w", "b"), ((39, 10), (10,)))
    sent, _ = encoded(one(normal(), layout), [stage])
    assert (
        sent.delta.layout == stage.reshaped({DELTA: layout})[DELTA] == Layout(("kept",), ((40,),))
    )
    assert sent.delta.packed is None
    others = {DELTA: layout, "clip_bit": Layout(("clip_bit",), ((),))}
    assert stage.reshaped(others)["clip_bit"] == others["clip_bit"]
    found, _ = arrived(one(normal(), layout), [stage])
    np.testing.assert_array_equal(found[found != 0], normal()[found != 0])


@given(st.integers(0, 1000))
def test_what_was_sent_and_what_is_remembered_make_up_all_changes(seed):
    total, sent, memory = np.zeros(400), np.zeros(400), {}
    for version in range(12):
        change = normal(seed=seed + version)
        found, memory = arrived(one(change, version=version), [RandomK(ratio=0.1)], memory)
        total += change
        sent += found
    np.testing.assert_allclose(sent + memory["random_k.error"], total, atol=1e-5)


@given(st.integers(0, 1000), st.floats(0.001, 1))
def test_a_vector_never_grows_where_nothing_is_scaled_or_fed_back(seed, ratio):
    sent, proposed = encoded(one(normal(seed=seed)), [free(ratio=ratio)])
    assert np.linalg.norm(sent.delta.vector.astype(float)) <= np.linalg.norm(
        normal(seed=seed).astype(float)
    )
    assert proposed == {}


def test_a_sum_is_put_in_its_places_as_a_client_is():
    """Linear, so that masks and keys may add up: the mean of what two clients sent is the mean of what arrives."""
    stage = free(ratio=0.1)
    layout = one(normal()).delta.layout
    stage.reshaped({DELTA: layout})
    parts = [encoded(one(normal(seed=seed), version=5, client=seed), [stage])[0] for seed in (1, 2)]
    mean = np.mean([part.delta.vector for part in parts], axis=0)
    together = Update({DELTA: Section(mean, parts[0].delta.layout)}, 2.0, (1, 2), 5)
    alone = [stage.decode(part).delta.vector for part in parts]
    np.testing.assert_array_equal(stage.decode(together).delta.vector, np.mean(alone, axis=0))
    assert stage.decode(together).delta.layout == layout


def test_scaled_by_d_over_k_the_mean_over_versions_is_the_vector():
    """4,000 versions: each element's mean has standard deviation |x|·√((d/k − 1) / 4000). Rate of false alarms: 20
    two-sided tails at 6.5 standard deviations, 2·10⁻⁹."""
    values, versions, total = normal(20), 4000, np.zeros(20)
    stage = free(ratio=0.25, unbiased=True)
    for version in range(versions):
        total += arrived(one(values, version=version), [stage])[0]
    deviation = np.abs(values) * math.sqrt((4 - 1) / versions)
    assert (np.abs(total / versions - values) < 6.5 * deviation).all()


def test_what_is_remembered_must_not_be_scaled():
    with pytest.raises(ValueError, match="error_feedback=false"):
        RandomK(unbiased=True)


@pytest.mark.parametrize(
    ("claim", "support"),
    [
        (Claim(), "shared"),
        (Claim(visibility=Visibility.GROUP), "shared"),
        (Claim(staleness=3), "per_version"),
        (Claim(visibility=Visibility.SUM, staleness=3), "shared"),
        (Claim(visibility=Visibility.SUM, staleness=3, sessions=2), "per_version"),
    ],
)
def test_coordinates_are_shared_by_a_version_and_a_session(claim, support):
    assert RandomK().check(claim).support == support


def test_a_bound_from_before_does_not_hold_behind_it():
    assert RandomK().check(Claim(bounds={DELTA: 1.0, "other": 2.0})).bounds == {"other": 2.0}


def test_a_bound_from_behind_holds_at_the_combiner():
    found, _ = arrived(one(normal(scale=10)), [RandomK(ratio=0.5), Clip(norm=1.0)])
    assert 0.999 < np.linalg.norm(found) <= 1


def test_a_masked_round_sums_short_vectors(tmp_path):
    """Three clients send 1/4, 1/2 and 3/4 everywhere under masks: the chosen half of the model moves by 1/2."""
    values = {client: np.full(8, (client + 1) / 4, np.float32) for client in range(3)}
    pipeline = Pipeline(
        collector=Masked(max_weight=None, metrics=()),
        stages=[free(ratio=0.5)],
        combiner=Mean(weighting="uniform"),
    )
    half = pipeline.collector.client_half(ClientOwn(tmp_path, {}, simulated=True))
    node = trellis_node(
        lambda client, number, arrays: {DELTA: values[client]}, stages=pipeline.stages, half=half
    )
    strategy = PipelineStrategy(pipeline, federated_every=0)
    grid = ScriptedGrid(dict.fromkeys(range(1, 4), node))
    strategy.start(grid, pack_model({"w": np.zeros(8, np.float32)}), num_rounds=1)
    moved = strategy.model.parameters
    assert (moved != 0).sum() == 4
    np.testing.assert_allclose(moved[moved != 0], 0.5, rtol=1e-5)
