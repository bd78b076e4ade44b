import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.stages import PowerSgd, Sign
from strategies.update import Layout
from tests.support.compression import arrived, normal, one

LAYOUT = Layout(("w", "b"), ((20, 19), (20,)))


@pytest.mark.parametrize("stage", [PowerSgd(rank=2), Sign()], ids=["power_sgd", "sign"])
@given(seed=st.integers(0, 1000))
def test_what_arrives_and_what_is_remembered_make_up_all_changes(stage, seed):
    total, sent, memory = np.zeros(400), np.zeros(400), {}
    for number in range(8):
        change = normal(seed=seed + number)
        found, memory = arrived(one(change, LAYOUT), [stage], memory)
        total += change
        sent += found
    np.testing.assert_allclose(sent + memory[f"{stage.name}.error"], total, atol=2e-5)


@pytest.mark.parametrize("stage", [PowerSgd(rank=3), Sign()], ids=["power_sgd", "sign"])
def test_what_is_remembered_is_bit_for_bit_what_the_server_lacks(stage):
    memory = {f"{stage.name}.error": normal(seed=1)}
    found, proposed = arrived(one(normal(), LAYOUT), [stage], memory)
    target = normal() + normal(seed=1)
    assert proposed[f"{stage.name}.error"].tobytes() == (target - found).tobytes()


def test_a_client_goes_on_from_its_last_factor():
    change, memory, errors = normal(), {}, []
    for _ in range(30):
        stage = PowerSgd(rank=2, error_feedback=False)
        found, memory = arrived(one(change, LAYOUT), [stage], memory)
        errors.append(np.linalg.norm(found - change))
    assert set(memory) == {"power_sgd.right"}
    assert errors[-1] < 0.98 * errors[0]


def test_signs_without_error_feedback_remember_nothing():
    _, proposed = arrived(one(normal(), LAYOUT), [Sign(error_feedback=False)])
    assert proposed == {}
    assert not Sign(error_feedback=False).remembers
