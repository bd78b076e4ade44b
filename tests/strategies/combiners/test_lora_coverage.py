import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.combiners.lora_coverage import CoverageMean
from strategies.parts import covered, widened
from strategies.update import Layout

LAYOUT = Layout(("w", "a", "b"), ((3, 4), (5,), (2,)))
PARTS = [
    LAYOUT,
    Layout(("w", "a"), ((2, 4), (5,))),
    Layout(("w",), ((3, 2),)),
    Layout(("b", "a"), ((2,), (5,))),
    Layout((), ()),
]

clients = st.lists(
    st.tuples(st.sampled_from(PARTS), st.floats(1, 1e6), st.integers(0, 2**32)),
    min_size=1,
    max_size=8,
)


def sections(drawn):
    return [
        (
            widened(
                np.random.default_rng(seed).standard_normal(part.size).astype(np.float32),
                part,
                LAYOUT,
            ),
            weight,
            part,
        )
        for part, weight, seed in drawn
    ]


@given(clients)
def test_each_element_is_the_mean_over_those_who_have_it(drawn):
    mean, given_ = CoverageMean(LAYOUT), sections(drawn)
    for section, weight, _ in given_:
        mean.add(section, weight)
    found = mean.mean()
    for element in range(LAYOUT.size):
        mine = [
            (float(s.vector[element]), w) for s, w, part in given_ if covered(part, LAYOUT)[element]
        ]
        wanted = sum(x * w for x, w in mine) / sum(w for _, w in mine) if mine else 0.0
        assert found[element] == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@given(clients)
def test_by_group_each_group_weighs_as_much(drawn):
    mean, given_ = CoverageMean(LAYOUT, by_group=True), sections(drawn)
    groups = [part.names for _, _, part in given_]
    total = {
        g: sum(w for (_, w, _), h in zip(given_, groups, strict=True) if h == g) for g in groups
    }
    for (section, weight, _), group in zip(given_, groups, strict=True):
        mean.add(section, weight, group=group)
    plain = CoverageMean(LAYOUT)
    for (section, weight, _), group in zip(given_, groups, strict=True):
        plain.add(section, weight / total[group])
    np.testing.assert_allclose(mean.mean(), plain.mean(), rtol=1e-9, atol=1e-12)


@given(clients, st.randoms(use_true_random=False), st.booleans())
def test_the_order_never_shows_in_a_bit_of_float32(drawn, random, by_group):
    given_ = [(section, weight, part.names) for section, weight, part in sections(drawn)]
    found = []
    for _ in range(2):
        mean = CoverageMean(LAYOUT, by_group=by_group)
        for section, weight, group in given_:
            mean.add(section, weight, group=group)
        found.append(mean.mean().astype(np.float32).tobytes())
        random.shuffle(given_)
    assert found[0] == found[1]


def test_a_divisor_is_that_of_all_elements():
    mean = CoverageMean(LAYOUT)
    for section, weight, _ in sections([(PARTS[1], 2.0, 0), (PARTS[2], 3.0, 1)]):
        mean.add(section, weight)
    scale = CoverageMean(LAYOUT)
    for section, weight, _ in sections([(LAYOUT, 1.0, 0)]):
        scale.add(section, weight)
    whole = mean.mean(10.0)
    assert whole.shape == (LAYOUT.size,)
    np.testing.assert_array_equal(whole[~covered(PARTS[1], LAYOUT) & ~covered(PARTS[2], LAYOUT)], 0)
    np.testing.assert_allclose(mean.mean(5.0), 2 * whole)
