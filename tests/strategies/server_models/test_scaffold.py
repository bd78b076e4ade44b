import copy

import numpy as np
import pytest

from strategies.contract import Claim, ContractError
from strategies.server_models import SGD, Scaffold
from strategies.update import CONTROL, DELTA, Update
from tests.support.updates import section, update

BOTH = frozenset({DELTA, CONTROL})


def aggregate(delta: object, control: object, members: tuple[int, ...]) -> Update:
    return Update({DELTA: section(delta), CONTROL: section(control)}, 1.0, members, 0)


def test_the_servers_step_is_that_of_karimireddy_et_al():
    """x ← x + η_g·mean Δy and c ← c + |S|/N·mean Δc (Algorithm 1, lines 16–17)."""
    optimizer, x, c = Scaffold(lr=0.5, population=10), [1.0, 1.0], [0.0, 0.0]
    parameters = np.ones(2)
    optimizer.begin(2)
    for delta, control, members in (
        ([2.0, -4.0], [0.5, 1.0], (0, 1, 2, 3, 4)),
        ([1.0, 1.0], [-3.0, 0.25], (7,)),
    ):
        optimizer.step(parameters, aggregate(delta, control, members))
        for i in range(2):
            x[i] += 0.5 * delta[i]
            c[i] += len(members) / 10 * control[i]
    np.testing.assert_allclose(parameters, x, rtol=1e-15)
    np.testing.assert_allclose(optimizer.broadcast()[CONTROL], c, rtol=1e-6)
    assert optimizer.broadcast()[CONTROL].dtype == np.float32


def test_without_a_population_those_who_take_part_are_all_there_are():
    optimizer = Scaffold()
    optimizer.begin(1)
    optimizer.step(np.zeros(1), aggregate([0], [8], (0, 1)))
    assert optimizer.broadcast()[CONTROL] == 8


def test_the_control_variate_begins_at_zero_and_lives_in_the_state():
    first, second = Scaffold(population=2), Scaffold(population=2)
    first.begin(2)
    second.begin(2)
    np.testing.assert_array_equal(first.broadcast()[CONTROL], [0, 0])
    first.step(np.zeros(2), aggregate([0, 0], [1 / 3, 2], (0,)))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.broadcast()[CONTROL].tobytes() == first.broadcast()[CONTROL].tobytes()


def test_another_optimisers_state_is_refused():
    plain, scaffold = SGD(), Scaffold()
    plain.begin(2)
    scaffold.begin(2)
    with pytest.raises(ValueError, match="the state is that of 'server SGD'"):
        scaffold.load_state_dict(plain.state_dict())


def test_it_asks_clients_for_their_control_and_takes_a_uniform_mean():
    claim = Claim(sections=BOTH, weighting="uniform")
    assert Scaffold().check(claim) is claim
    assert Scaffold().sections == (CONTROL,)


@pytest.mark.parametrize(
    ("claim", "first", "why", "instead"),
    [
        (
            Claim(set_by={"sections": "the clients' trainer"}),
            "the clients' trainer",
            "updates have no section control",
            "use client=scaffold",
        ),
        (
            Claim(sections=BOTH, weighting="examples", set_by={"weighting": "Mean"}),
            "Mean",
            "weights by examples bias it",
            "combiner.weighting=uniform",
        ),
        (
            Claim(sections=BOTH, client_half=False, set_by={"client_half": "collector plain"}),
            "collector plain",
            "a vanilla client returns weights",
            "add `strategies.pipeline_mod`",
        ),
    ],
    ids=["no control", "weighted by examples", "vanilla clients"],
)
def test_what_it_cannot_work_with_is_refused(claim, first, why, instead):
    with pytest.raises(ContractError) as caught:
        Scaffold().check(claim)
    error = caught.value
    assert (error.first, error.second) == (first, "SCAFFOLD's server")
    assert why in error.why
    assert instead in error.instead


def test_an_aggregate_is_left_as_it_was():
    one = update([1], **{CONTROL: [2]})
    for item in one.sections.values():
        item.vector.flags.writeable = False
    optimizer = Scaffold()
    optimizer.begin(1)
    optimizer.step(np.zeros(1), one)
    np.testing.assert_array_equal(one.sections[CONTROL].vector, [2])
