"""Parts of a model: what is cut out goes back to where it came from, and nothing else is touched."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.parts import check_part, covered, narrowed, widened
from strategies.update import Layout

WHOLE = Layout(("a.A", "a.B", "head"), ((8, 5), (6, 8), (3,)))


@st.composite
def parts(draw):
    names = draw(st.lists(st.sampled_from(WHOLE.names), unique=True))
    shapes = dict(zip(WHOLE.names, WHOLE.shapes, strict=True))
    return Layout(
        tuple(names), tuple(tuple(draw(st.integers(0, s)) for s in shapes[name]) for name in names)
    )


@given(parts(), st.integers(0, 2**32 - 1))
def test_what_is_cut_out_goes_back_where_it_came_from(part, seed):
    check_part(part, WHOLE)
    vector = np.random.default_rng(seed).normal(size=WHOLE.size).astype(np.float32)
    cut = part.flatten(narrowed(WHOLE.views(vector), part))
    section, mask = widened(cut, part, WHOLE), covered(part, WHOLE)
    assert mask.sum() == part.size
    np.testing.assert_array_equal(section.vector, np.where(mask, vector, 0))


def test_a_part_that_is_the_whole_is_no_part():
    vector = np.ones(WHOLE.size, np.float32)
    assert widened(vector, WHOLE, WHOLE).part is None


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (Layout(("b",), ((1,),)), "no array 'b'"),
        (Layout(("a.A",), ((9, 5),)), r"\(9, 5\) does not fit"),
        (Layout(("a.A",), ((8,),)), r"\(8,\) does not fit"),
    ],
)
def test_what_is_no_part_is_refused_by_name(part, said):
    with pytest.raises(ValueError, match=said):
        check_part(part, WHOLE)
