from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from strategies.update import BUFFERS, DELTA, Layout, Section
from tests.support.updates import flat, section, update

names = st.text(max_size=8)
arrays = npst.arrays(
    np.float32,
    npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    elements=st.floats(width=32, allow_nan=False),
)
models = st.dictionaries(names, arrays, max_size=5)


@given(models)
def test_arrays_come_back_from_their_vector(model):
    layout = Layout.of(model)
    views = layout.views(layout.flatten(model))
    assert list(views) == list(model)
    for name, array in model.items():
        assert views[name].shape == array.shape
        np.testing.assert_array_equal(views[name], array)


@given(models)
def test_a_vector_is_as_long_as_its_arrays_together_and_a_new_one(model):
    layout = Layout.of(model)
    vector = layout.flatten(model)
    assert vector.shape == (layout.size,) == (sum(array.size for array in model.values()),)
    assert vector.dtype == np.float32
    assert vector.flags.c_contiguous
    assert not any(np.shares_memory(vector, array) for array in model.values() if array.size)


def test_what_is_written_to_a_view_is_written_to_the_vector():
    vector = np.zeros(6, np.float32)
    Layout(("a", "b"), ((2,), (2, 2))).views(vector)["b"][1, 0] = 7
    np.testing.assert_array_equal(vector, [0, 0, 0, 0, 7, 0])


def test_a_scalar_takes_one_element_and_an_empty_array_none():
    layout = Layout(("scalar", "empty", "last"), ((), (0, 3), (2,)))
    assert layout.offsets == (0, 1, 1, 3)
    views = layout.views(np.arange(3, dtype=np.float32))
    assert views["scalar"] == 0
    assert views["empty"].shape == (0, 3)


@given(models, models)
def test_digests_are_equal_exactly_when_layouts_are(one, other):
    first, second = Layout.of(one), Layout.of(other)
    assert (first.digest == second.digest) == (first == second)
    assert Layout.of(dict(one)).digest == first.digest


@pytest.mark.parametrize(
    "other",
    [
        Layout(("b", "a"), ((2,), (3,))),
        Layout(("a", "b"), ((3,), (2,))),
        Layout(("a", "b"), ((2,), (3, 1))),
        Layout(("a", "c"), ((2,), (3,))),
        Layout(("a",), ((2,),)),
    ],
    ids=["names swapped", "shapes swapped", "another rank", "another name", "one array less"],
)
def test_a_digest_tells_layouts_of_like_sizes_apart(other):
    assert Layout(("a", "b"), ((2,), (3,))).digest != other.digest


def test_a_digest_stays_the_same_from_release_to_release():
    text = b'[["w","b"],[[2,3],[]]]'
    assert Layout(("w", "b"), ((2, 3), ())).digest == sha256(text).hexdigest()[:16]


def test_a_layout_refuses_names_that_repeat_and_shapes_that_are_missing():
    with pytest.raises(ValueError, match="names repeat"):
        Layout(("a", "a"), ((1,), (1,)))
    with pytest.raises(ValueError, match="2 names has 1 shapes"):
        Layout(("a", "b"), ((1,),))


def test_flatten_names_the_array_that_is_missing_or_has_another_shape():
    layout = Layout(("a",), ((2,),))
    with pytest.raises(ValueError, match="'a' of the layout is missing"):
        layout.flatten({})
    with pytest.raises(ValueError, match=r"'a' has shape \(1, 2\), its layout says \(2,\)"):
        layout.flatten({"a": np.zeros((1, 2))})


@pytest.mark.parametrize(
    "vector",
    [np.zeros(3), np.zeros(2, np.float32), np.zeros((1, 3), np.float32), np.zeros(3, np.float16)],
    ids=["float64", "too short", "a matrix", "float16"],
)
def test_a_section_takes_nothing_but_a_float32_vector_of_its_layouts_length(vector):
    with pytest.raises(ValueError, match="needs a float32 vector of that length"):
        Section(vector, flat(3))


def test_replacing_a_section_leaves_the_update_as_it_was():
    before = update([1, 2], weight=3, client=4, version=5, metrics={"loss": 0.5})
    after = before.with_section(BUFFERS, section([9]))
    assert set(before.sections) == {DELTA}
    assert set(after.sections) == {DELTA, BUFFERS}
    assert after.delta is before.delta
    assert (after.weight, after.members, after.version) == (3, (4,), 5)
    assert after.metrics == {"loss": 0.5}
