import copy

import numpy as np
import pytest

from strategies.server_models import SGD, Adam, Scaffold, ServerModel
from strategies.update import BUFFERS, CONTROL, COUNTERS, DELTA, Section, Update

MODEL = {
    "backbone.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "norm.running_mean": np.array([0.5, 0.25], np.float32),
    "norm.num_batches_tracked": np.array(5, np.int64),
    "head.weight": np.array([[1.0], [2.0]], np.float16),
    "head.bias": np.array([3.0]),
}


def aggregate(model: ServerModel, **vectors: object) -> Update:
    """Zeros for every section that is not given."""
    sections = {
        name: Section(
            np.asarray(vectors.get(name, np.zeros(layout.size)), np.float32).reshape(layout.size),
            layout,
        )
        for name, layout in model.layouts.items()
    }
    return Update(sections, 1.0, (0,), model.version)


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert isinstance(found[name], np.ndarray)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)


def test_clients_are_sent_the_arrays_in_their_own_order_shape_and_dtype():
    model = ServerModel(MODEL, SGD())
    assert_same(model.view(), MODEL)
    assert_same(model.arrays(), MODEL)


def test_arrays_fall_into_sections_by_their_dtype_and_name():
    model = ServerModel(MODEL, SGD())
    assert model.layouts[DELTA].names == ("backbone.weight", "head.weight", "head.bias")
    assert model.layouts[BUFFERS].names == ("norm.running_mean",)
    assert model.layouts[COUNTERS].names == ("norm.num_batches_tracked",)
    assert model.kinds["norm.num_batches_tracked"] == COUNTERS
    assert list(model.kinds) == list(MODEL)


def test_buffers_may_be_named_instead_of_guessed():
    model = ServerModel(MODEL, SGD(), buffers=["head.bias"])
    assert model.layouts[BUFFERS].names == ("head.bias",)
    assert "norm.running_mean" in model.layouts[DELTA].names
    assert BUFFERS not in ServerModel(MODEL, SGD(), buffers=[]).layouts


def test_an_aggregate_moves_parameters_by_the_optimiser_and_buffers_by_themselves():
    model = ServerModel(MODEL, SGD(lr=0.5))
    model.apply(aggregate(model, delta=[2] * 9, buffers=[1, -1], counters=[7]))
    view = model.view()
    np.testing.assert_array_equal(view["backbone.weight"], MODEL["backbone.weight"] + 1)
    np.testing.assert_array_equal(view["head.bias"], [4])
    np.testing.assert_array_equal(view["norm.running_mean"], [1.5, -0.75])
    assert view["norm.num_batches_tracked"] == 12
    assert model.version == 1


def test_what_does_not_travel_is_neither_sent_nor_trained_nor_lost():
    model = ServerModel(MODEL, SGD(), travel=("head.*",))
    assert list(model.view()) == ["head.weight", "head.bias"]
    assert set(model.layouts) == {DELTA}
    model.apply(aggregate(model, delta=[1, 1, 1]))
    expected = {
        name: array + 1 if name.startswith("head") else array for name, array in MODEL.items()
    }
    assert_same(model.arrays(), {n: np.asarray(a, MODEL[n].dtype) for n, a in expected.items()})


def test_travel_takes_several_patterns():
    model = ServerModel(MODEL, SGD(), travel=("*.bias", "norm.*"))
    assert list(model.view()) == ["norm.running_mean", "norm.num_batches_tracked", "head.bias"]


def test_a_model_of_which_no_parameter_travels_is_refused():
    with pytest.raises(
        ValueError, match=r"no parameter travels: of 5 arrays none matches tail\.\*"
    ):
        ServerModel(MODEL, SGD(), travel=("tail.*",))
    with pytest.raises(ValueError, match="no parameter travels"):
        ServerModel(MODEL, SGD(), travel=("norm.*",))


@pytest.mark.parametrize("dtype", ["c8", "U3", "M8[s]"])
def test_an_array_that_is_no_number_is_refused_by_name(dtype):
    with pytest.raises(
        ValueError, match=r"array 'odd' holds .*: a model is made of floats and integ"
    ):
        ServerModel({"w": np.zeros(2), "odd": np.zeros(2, dtype)}, SGD())


def test_many_small_steps_are_not_lost_to_the_clients_dtype():
    model = ServerModel({"w": np.ones(1, np.float16)}, SGD())
    for _ in range(1000):
        model.apply(aggregate(model, delta=[2.0**-14]))
    assert model.view()["w"] == np.float16(1 + 1000 * 2.0**-14)
    assert np.float16(1) + np.float16(2.0**-14) == np.float16(1)


@pytest.mark.parametrize(
    ("dtype", "start", "increase", "expected"),
    [
        (np.int8, 100, 1e10, 127),
        (np.uint8, 250, 10, 255),
        (np.int32, 5, 1e10, 2**31 - 1),
        (np.int64, 2**53, 2, 2**53 + 2),
        (np.bool_, False, 1, True),
        (np.bool_, True, 0, True),
    ],
)
def test_a_counter_stops_at_the_end_of_its_type(dtype, start, increase, expected):
    model = ServerModel({"w": np.zeros(1), "n": np.array([start], dtype)}, SGD())
    model.apply(aggregate(model, counters=[increase]))
    assert model.view()["n"].dtype == dtype
    assert model.view()["n"][0] == expected


def test_the_largest_64_bit_integers_are_sent_as_the_nearest_that_fit():
    arrays = {
        "w": np.zeros(1),
        "largest": np.array([2**63 - 1], np.int64),
        "unsigned": np.array([2**64 - 1], np.uint64),
        "smallest": np.array([-(2**63)], np.int64),
    }
    view = ServerModel(arrays, SGD()).view()
    assert view["largest"][0] == 2**63 - 1024
    assert view["unsigned"][0] == 2**64 - 2048
    assert view["smallest"][0] == -(2**63)


def test_a_void_round_counts_and_leaves_the_model():
    model = ServerModel(MODEL, Adam())
    model.skip()
    assert model.version == 1
    assert_same(model.arrays(), MODEL)


def test_the_initial_arrays_are_not_changed():
    arrays = copy.deepcopy(MODEL)
    model = ServerModel(arrays, SGD(), travel=("head.*",))
    model.apply(aggregate(model, delta=[1, 1, 1]))
    model.view()["head.bias"][:] = 99
    model.arrays()["head.bias"][:] = 99
    assert_same(arrays, MODEL)
    assert model.view()["head.bias"] == 4


def test_an_optimiser_may_ask_for_sections_and_send_vectors():
    model = ServerModel(MODEL, Scaffold(population=1))
    assert model.layouts[CONTROL] == model.layouts[DELTA]
    model.apply(aggregate(model, control=np.arange(9)))
    np.testing.assert_array_equal(model.broadcast()[CONTROL], np.arange(9))


STATEFUL = {"travel": ("head.*", "norm.*")}


def test_a_model_goes_on_from_its_state_bit_for_bit():
    def step(model: ServerModel, number: int) -> None:
        rng = np.random.default_rng(number)
        model.apply(
            aggregate(model, delta=rng.normal(0, 1, 3), buffers=rng.normal(0, 1, 2), counters=[1])
        )

    whole, resumed = ServerModel(MODEL, Adam(), **STATEFUL), ServerModel(MODEL, Adam(), **STATEFUL)
    for number in range(3):
        step(whole, number)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert resumed.version == 3
    for number in range(3, 6):
        step(whole, number)
        step(resumed, number)
    assert resumed.parameters.tobytes() == whole.parameters.tobytes()
    assert_same(resumed.arrays(), whole.arrays())


def test_what_stays_at_home_survives_a_restart_to_the_last_bit():
    home = {"w": np.zeros(1), "ids": np.array([2**63 - 1, 2**53 + 1], np.int64)}
    before = ServerModel(home, SGD(), travel=("w",))
    after = ServerModel({**home, "ids": np.zeros(2, np.int64)}, SGD(), travel=("w",))
    after.load_state_dict(before.state_dict())
    np.testing.assert_array_equal(after.arrays()["ids"], home["ids"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("vectors"), "'vectors' should be a mapping"),
        (lambda s: s["vectors"].pop(DELTA), "'delta' should be an array of shape"),
        (lambda s: s["vectors"].update(delta=np.zeros(2)), r"of shape \(3,\), not \(2,\)"),
        (
            lambda s: s["home"].pop("backbone.weight"),
            "'backbone.weight' should be an array of float32",
        ),
        (
            lambda s: s["home"].update({"backbone.weight": np.zeros((2, 3))}),
            "'backbone.weight' should be an array of float32",
        ),
        (lambda s: s.update(version=1.0), "'version' should be a whole number, not 1.0"),
        (lambda s: s.update(version=True), "'version' should be a whole number, not True"),
        (lambda s: s.update(optimizer={"kind": "server SGD"}), "the state is that of 'server SGD'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_leaves_the_model_alone(change, message):
    source, model = ServerModel(MODEL, Adam(), **STATEFUL), ServerModel(MODEL, Adam(), **STATEFUL)
    source.apply(aggregate(source, delta=[1, 2, 3]))
    state = copy.deepcopy(source.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(state)
    assert model.version == 0
    assert_same(model.arrays(), MODEL)
