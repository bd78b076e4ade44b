"""Server optimisers against the papers' algorithms, written here element by element with Python's own floats."""

import copy
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.contract import Claim
from strategies.server_models import SGD, Adagrad, Adam, ServerOptimizer, Yogi
from tests.support.examples import many
from tests.support.updates import update

OPTIMIZERS = {
    "sgd": lambda: SGD(lr=0.7),
    "momentum": lambda: SGD(lr=0.5, momentum=0.9),
    "adagrad": lambda: Adagrad(lr=0.1, tau=1e-3),
    "adagrad with momentum": lambda: Adagrad(lr=0.1, beta1=0.5, tau=1e-2),
    "adam": lambda: Adam(lr=0.03, beta1=0.9, beta2=0.95, tau=1e-2),
    "yogi": lambda: Yogi(lr=0.03, beta1=0.9, beta2=0.95, tau=1e-2),
    "corrected adam": lambda: Adam(lr=0.03, beta1=0.7, beta2=0.95, tau=1e-2, bias_correction=True),
    "falling sgd": lambda: SGD(lr=0.5, momentum=0.9, total_steps=12),
    "falling adam": lambda: Adam(lr=0.03, beta2=0.95, tau=1e-2, total_steps=12, decay_from=0.2),
}
ADAPTIVE = [name for name in OPTIMIZERS if name not in ("sgd", "momentum", "falling sgd")]
COUNTING = ["corrected adam", "falling sgd", "falling adam"]

Rounds = list[list[float]]
"""For each round the aggregate Δ_t, one number a parameter."""
rounds_of_deltas = st.integers(1, 4).flatmap(
    lambda size: st.lists(
        st.lists(st.floats(-1e3, 1e3, width=32), min_size=size, max_size=size),
        min_size=1,
        max_size=12,
    )
)


def run(optimizer: ServerOptimizer, deltas: Rounds, start: float = 1.0) -> np.ndarray:
    parameters = np.full(len(deltas[0]), start)
    optimizer.begin(len(parameters))
    for delta in deltas:
        optimizer.step(parameters, update(delta))
    return parameters


def reddi(
    name: str, deltas: Rounds, *, lr: float, beta1: float, beta2: float, tau: float
) -> Rounds:
    """Reddi et al. 2021, Algorithm 2: m_{-1} = 0, v_{-1} = τ², no bias correction."""
    x = [1.0] * len(deltas[0])
    m, v = [0.0] * len(x), [tau**2] * len(x)
    path = []
    for delta in deltas:
        for i, d in enumerate(delta):
            m[i] = beta1 * m[i] + (1 - beta1) * d
            if name == "adagrad":
                v[i] = v[i] + d**2
            elif name == "yogi":
                sign = (v[i] > d**2) - (v[i] < d**2)
                v[i] = v[i] - (1 - beta2) * d**2 * sign
            else:
                v[i] = beta2 * v[i] + (1 - beta2) * d**2
            x[i] = x[i] + lr * m[i] / (math.sqrt(v[i]) + tau)
        path.append(list(x))
    return path


def hsu(deltas: Rounds, *, lr: float, momentum: float) -> list[float]:
    """Hsu et al. 2019, §4: v ← βv + Δw, w ← w − γv, with Δw = −Δ as clients' changes are counted here."""
    w = [1.0] * len(deltas[0])
    v = [0.0] * len(w)
    for delta in deltas:
        for i, d in enumerate(delta):
            v[i] = momentum * v[i] + (-d)
            w[i] = w[i] - lr * v[i]
    return w


@given(rounds_of_deltas, st.floats(1e-3, 2), st.floats(0, 0.99))
def test_momentum_is_that_of_hsu_et_al(deltas, lr, momentum):
    found = run(SGD(lr=lr, momentum=momentum), deltas)
    np.testing.assert_allclose(found, hsu(deltas, lr=lr, momentum=momentum), rtol=1e-9, atol=1e-9)


@given(rounds_of_deltas)
def test_plain_sgd_at_rate_one_adds_the_mean_as_fedavg_does(deltas):
    expected = np.ones(len(deltas[0]))
    for delta in deltas:
        expected += np.float32(delta)
    np.testing.assert_array_equal(run(SGD(), deltas), expected)


@settings(max_examples=many(150))
@given(
    st.sampled_from([("adagrad", Adagrad), ("adam", Adam), ("yogi", Yogi)]),
    rounds_of_deltas,
    st.floats(1e-3, 1),
    st.floats(0, 0.99),
    st.floats(0, 0.999),
    st.floats(1e-4, 1),
)
def test_adaptive_steps_are_those_of_reddi_et_al(kind, deltas, lr, beta1, beta2, tau):
    name, optimizer_class = kind
    given_beta2 = {} if name == "adagrad" else {"beta2": beta2}
    found = run(optimizer_class(lr=lr, beta1=beta1, tau=tau, **given_beta2), deltas)
    expected = reddi(name, deltas, lr=lr, beta1=beta1, beta2=beta2, tau=tau)[-1]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_a_first_step_by_hand():
    """Δ = 2, β₁ = 0.9, β₂ = 0.99, τ = 0.5: m = 0.2; √v + τ with v as each variant has it."""
    settings_of_all = {"lr": 1.0, "beta1": 0.9, "tau": 0.5}
    second = {"adagrad": 0.25 + 4, "adam": 0.99 * 0.25 + 0.01 * 4, "yogi": 0.25 + 0.01 * 4}
    for name, optimizer in (
        ("adagrad", Adagrad(**settings_of_all)),
        ("adam", Adam(**settings_of_all, beta2=0.99)),
        ("yogi", Yogi(**settings_of_all, beta2=0.99)),
    ):
        found = run(optimizer, [[2.0]], start=0.0)[0]
        assert found == pytest.approx(0.2 / (math.sqrt(second[name]) + 0.5), rel=1e-12)


def kingma_and_ba(
    deltas: Rounds, *, lr: float, beta1: float, beta2: float, tau: float
) -> list[float]:
    """Kingma and Ba 2015, Algorithm 1, with the gradient g = −Δ and their ε written τ."""
    x, m, v = ([start] * len(deltas[0]) for start in (1.0, 0.0, 0.0))
    for t, delta in enumerate(deltas, 1):
        for i, d in enumerate(delta):
            m[i] = beta1 * m[i] + (1 - beta1) * -d
            v[i] = beta2 * v[i] + (1 - beta2) * d * d
            mean, second = m[i] / (1 - beta1**t), v[i] / (1 - beta2**t)
            x[i] = x[i] - lr * mean / (math.sqrt(second) + tau)
    return x


@settings(max_examples=many(150))
@given(
    rounds_of_deltas,
    st.floats(1e-3, 1),
    st.floats(0, 0.99),
    st.floats(0, 0.999),
    st.floats(1e-4, 1),
)
def test_corrected_adam_is_that_of_kingma_and_ba(deltas, lr, beta1, beta2, tau):
    optimizer = Adam(lr=lr, beta1=beta1, beta2=beta2, tau=tau, bias_correction=True)
    expected = kingma_and_ba(deltas, lr=lr, beta1=beta1, beta2=beta2, tau=tau)
    np.testing.assert_allclose(run(optimizer, deltas), expected, rtol=1e-9, atol=1e-9)


def test_a_corrected_first_step_is_of_the_whole_rate():
    found = run(Adam(lr=0.25, tau=1e-9, bias_correction=True), [[8.0, -0.5]], start=0.0)
    np.testing.assert_allclose(found, [0.25, -0.25], rtol=1e-6)


@given(st.floats(1e-3, 2), st.integers(1, 30), st.floats(0, 1))
def test_a_rate_that_falls_is_held_first_and_then_a_straight_line_to_zero(lr, total, part):
    """Each step of plain SGD on Δ = 1 is the rate itself."""
    optimizer, parameters, rates = SGD(lr=lr, total_steps=total, decay_from=part), np.zeros(1), []
    optimizer.begin(1)
    for _ in range(total + 3):
        before = parameters.copy()
        optimizer.step(parameters, update([1.0]))
        rates.append((parameters - before)[0])
    for done, rate in enumerate(rates):
        left = max(0, total - done)
        expected = 0.0 if not left else lr * min(1.0, left / max(total - part * total, 1e-300))
        assert rate == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", [Adagrad, Adam, Yogi])
def test_all_adaptive_rates_fall_alike(kind):
    held, falling = kind(lr=0.1), kind(lr=0.1, total_steps=4, decay_from=0)
    steps = []
    for optimizer in (held, falling):
        optimizer.begin(1)
        path = [np.zeros(1)]
        for _ in range(4):
            path.append(path[-1].copy())
            optimizer.step(path[-1], update([1.0]))
        steps.append(np.diff(np.concatenate(path)))
    np.testing.assert_allclose(steps[1] / steps[0], [1, 0.75, 0.5, 0.25])


def test_only_an_unchanging_rate_of_one_adds_the_aggregate_as_it_is():
    assert SGD().exact
    assert not SGD(total_steps=5).exact


@pytest.mark.parametrize("name", COUNTING)
def test_who_counts_steps_needs_their_number(name):
    optimizer = OPTIMIZERS[name]()
    optimizer.begin(2)
    optimizer.step(np.zeros(2), update([1, 2]))
    state = optimizer.state_dict()
    assert state["steps"] == 1
    without = {key: value for key, value in state.items() if key != "steps"}
    with pytest.raises(ValueError, match="'steps' should be a whole number"):
        optimizer.load_state_dict(without)


def test_who_counts_none_takes_up_states_of_before_there_was_a_count():
    optimizer = OPTIMIZERS["adam"]()
    optimizer.begin(2)
    assert set(optimizer.state_dict()) == {"kind", "momentum", "second"}


@given(st.floats(-1e3, 1e3, width=32), st.integers(1, 50))
def test_adaptive_steps_go_the_way_of_the_aggregate(delta, count):
    for name in ADAPTIVE:
        moved = run(OPTIMIZERS[name](), [[delta]] * count)[0] - 1.0
        assert math.copysign(1, moved) == math.copysign(1, delta) or abs(delta) < 1e-12


@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_adaptive_step_is_bounded_however_large_the_aggregate(name):
    optimizer = OPTIMIZERS[name]()
    found = run(optimizer, [[1e10, -1e10]], start=0.0)
    assert np.isfinite(found).all()
    uncorrected = optimizer.lr * (1 - optimizer.beta1) * 1e10 / optimizer.tau
    corrected = optimizer.lr
    assert np.abs(found).max() <= (corrected if "corrected" in name else uncorrected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_goes_on_from_its_state_bit_for_bit(name):
    deltas = np.random.default_rng(0).normal(0, 1, (10, 5)).astype(np.float32)
    whole = run(OPTIMIZERS[name](), deltas.tolist())

    first, second = OPTIMIZERS[name](), OPTIMIZERS[name]()
    parameters = np.ones(5)
    first.begin(5)
    for delta in deltas[:4]:
        first.step(parameters, update(delta))
    second.begin(5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for delta in deltas[4:]:
        second.step(parameters, update(delta))
    assert parameters.tobytes() == whole.tobytes()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loaded_state_is_a_copy(name):
    first, second = OPTIMIZERS[name](), OPTIMIZERS[name]()
    first.begin(2)
    first.step(np.zeros(2), update([1, 2]))
    second.begin(2)
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(second.state_dict())
    first.step(np.zeros(2), update([3, 4]))
    np.testing.assert_equal(second.state_dict(), before)


def test_another_optimisers_state_is_refused():
    states = {}
    for name in ("sgd", "adagrad", "adam", "yogi"):
        optimizer = OPTIMIZERS[name]()
        optimizer.begin(3)
        states[name] = optimizer.state_dict()
    for name in states:
        for other in states:
            optimizer = OPTIMIZERS[name]()
            optimizer.begin(3)
            if name == other:
                optimizer.load_state_dict(states[other])
                continue
            with pytest.raises(
                ValueError, match=r"the state is that of 'server .*', the server optim"
            ):
                optimizer.load_state_dict(states[other])


@pytest.mark.parametrize("name", ["momentum", *ADAPTIVE])
def test_a_state_of_another_size_is_refused(name):
    small, large = OPTIMIZERS[name](), OPTIMIZERS[name]()
    small.begin(2)
    large.begin(3)
    with pytest.raises(ValueError, match=r"should be an array of shape \(3,\), not \(2,\)"):
        large.load_state_dict(small.state_dict())


def test_momentum_needs_a_velocity_in_its_state():
    plain, moving = OPTIMIZERS["sgd"](), OPTIMIZERS["momentum"]()
    plain.begin(2)
    moving.begin(2)
    with pytest.raises(ValueError, match="'velocity' should be an array of shape"):
        moving.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_reads_the_aggregate_and_changes_only_the_parameters(name):
    optimizer, aggregate = OPTIMIZERS[name](), update([1, -2])
    aggregate.delta.vector.flags.writeable = False
    optimizer.begin(2)
    optimizer.step(np.zeros(2), aggregate)
    np.testing.assert_array_equal(aggregate.delta.vector, [1, -2])
    assert optimizer.sections == ()
    assert optimizer.broadcast() == {}
    assert optimizer.check(Claim()) == Claim()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_beginning_again_forgets_what_was(name):
    optimizer = OPTIMIZERS[name]()
    deltas = [[1.0, -3.0], [0.5, 0.25]]
    assert run(optimizer, deltas).tobytes() == run(optimizer, deltas).tobytes()


def test_an_adaptive_optimiser_of_ones_own_must_say_how_its_second_moment_grows():
    class Forgetful(Adam.__base__):
        pass

    with pytest.raises(TypeError, match="Forgetful does not say how the second moment grows"):
        run(Forgetful(), [[1.0]])
