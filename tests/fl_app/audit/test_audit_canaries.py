"""Canaries through the real engine: without noise every coin is told, and the run itself is not touched."""

import json

import numpy as np
import pytest
from audit_helpers import CLIPPED, contents, made, silent

from fl_app.audit.canaries import Watch, WithCanaries, audit_clients
from fl_app.audit.target import load
from strategies.attacks.canary import Canary, direction
from strategies.hooks import RoundView
from strategies.server_models import SGD, ServerModel
from strategies.update import DELTA, Layout, Section, Update


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return made(tmp_path_factory.mktemp("runs"), *CLIPPED)


def test_without_noise_the_leak_is_clear_and_the_run_stays_as_it_was(plain):
    """32 canaries: of 32 right guesses follows ε ≥ 1.9 at 95%. The odds of a wrong guess are those of a normal number
    beyond 5 deviations: signs of 2,410 parameters."""
    before, told = contents(plain), []
    found = audit_clients(
        load(plain), 32, confidence=0.95, progress=lambda done, total: told.append((done, total))
    )
    assert contents(plain) == before
    assert not (plain / "audit" / "canaries").exists()
    assert told == [(1, 2), (2, 2)]
    assert (found.norm, found.clipped, found.rounds, found.rate) == (1.0, True, 2, 1.0)
    for guessed in (found.versions, found.final):
        assert guessed.correct >= 0.95 * guessed.guesses
        assert guessed.epsilon_bound > 1
    json.dumps(found.to_dict())


def test_the_noise_of_a_private_run_keeps_its_promise_and_a_hundredth_of_it_would_not(tmp_path):
    """The same audit of both at a confidence of 1 − 1e-6: so often is the first assertion a false alarm at most.

    Of 128 canaries those that neither round asked are guessed wrong, one in 16 of those that are in. More than 16 have
    odds under 1e-6, and 112 right guesses bound ε by 0.7. δ is small, since the bound's error holds m·δ.
    """
    dp = ["strategy=dp", "privacy.target_epsilon=null", "privacy.delta=1e-12"]
    dp += ["sampler.fraction=0.75"]
    kept, broken = (
        load(made(tmp_path / z, *dp, f"privacy.noise_multiplier={z}")) for z in ("16", "0.16")
    )
    kept_bound, broken_bound = (
        audit_clients(target, 128, confidence=1 - 1e-6, progress=silent).versions.epsilon_bound
        for target in (kept, broken)
    )
    assert kept_bound <= kept.promise.epsilon < 0.6
    assert broken_bound > 0.6


@pytest.mark.parametrize(
    ("overrides", "norm"),
    [
        (["sampler.fraction=0.5", "rounds=6", *CLIPPED, "clip.norm=0.3"], 0.3),
        (["strategy=secure"], 1.0),
        (["strategy=scaffold", "server=scaffold"], 1.0),
    ],
)
def test_other_strategies_leak_as_much(tmp_path, overrides, norm):
    found = audit_clients(load(made(tmp_path, *overrides)), 16, confidence=0.95, progress=silent)
    assert found.norm == norm
    assert found.versions.epsilon_bound > 0.5


def test_too_few_canaries_are_refused(plain):
    with pytest.raises(ValueError, match="at least 8"):
        audit_clients(load(plain), 7, confidence=0.95, progress=silent)


def test_the_run_s_clients_keep_their_data_and_canaries_hold_one_example(plain):
    target = load(plain)
    canary = Canary(included=(True,) * 8, norm=1.0)
    data = WithCanaries(target.trained_anew("canaries"), canary, 4).data(12)
    real = target.assembly.data(4)
    assert data.num_clients == 12
    np.testing.assert_array_equal(data.sizes[:4], real.sizes)
    for client in range(4):
        assert data.train(client).inputs.equal(real.train(client).inputs)
        assert data.test(client).inputs.equal(real.test(client).inputs)
    assert [len(data.train(client)) for client in range(4, 12)] == [1] * 8
    assert [len(data.test(client)) for client in range(4, 12)] == [0] * 8


SIZE = 2000


def watched(versions: list[np.ndarray]) -> Watch:
    """A watch of 8 canaries that has seen a real server's model move by these vectors, one a version."""
    layout = Layout(("w",), ((SIZE,),))
    model = ServerModel({"w": np.zeros(SIZE, np.float32)}, SGD())
    watch = Watch(model.parameters, 8, 3)
    for number, moved in enumerate(versions, 1):
        section = Section(moved.astype(np.float32), layout)
        model.apply(Update({DELTA: section}, 1.0, (0,), number - 1))
        watch(RoundView(number, model, 0.0, 0.0, 0, 0, 8, 0, 0, void=False))
    return watch


def test_projections_and_ratios_are_those_of_the_definition():
    rng, moved, rate = np.random.default_rng(0), 0.7, 0.25
    noise = [0.1 * rng.standard_normal(SIZE) for _ in range(3)]
    units = np.stack([direction(3, index, SIZE) for index in range(8 + 256)]) / np.sqrt(SIZE)
    sent = [units[0] * moved + noise[0], noise[1], units[0] * moved + noise[2]]
    watch = watched(sent)
    expected = np.stack(sent) @ units.T
    np.testing.assert_allclose(np.stack(watch.rows), expected, atol=1e-6)
    sums = expected[:, :8].sum(axis=0)
    np.testing.assert_allclose(watch.total(), sums - sums.mean(), atol=1e-6)
    total = np.zeros(8)
    for row in expected:
        variance = np.mean(row[8:] ** 2)
        likely = np.exp((row[:8] * moved - moved**2 / 2) / variance)
        total += np.log(1 - rate + rate * likely)
    np.testing.assert_allclose(watch.likelihood_ratios(moved, rate), total, rtol=1e-4)
    ratios = watch.likelihood_ratios(moved, 0.7)
    assert ratios[0] > 0 > ratios[1:].max()
    assert watch.likelihood_ratios(None, rate).argmax() == 0


def test_a_void_round_tells_nothing():
    assert not watched([np.zeros(SIZE)]).likelihood_ratios(0.5, 0.5).any()
