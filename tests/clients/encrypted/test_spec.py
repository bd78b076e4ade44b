"""What both ends agree on: its limits, its digest, and how units are shared."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.encrypted.spec import Spec, bias, weight
from tests.support.encrypted import network


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"sizes": (64,)}, "sizes"),
        ({"sizes": (64, 4, 4, 4, 10)}, "at most two hidden layers"),
        ({"sizes": (64, 0, 10)}, "1 to"),
        ({"sizes": (65_537, 10)}, "65536"),
        ({"activation": "relu"}, "square, cubic"),
        ({"loss": "hinge"}, "cross_entropy, squared"),
        ({"batch": 0}, "power of two"),
        ({"batch": 500}, "power of two"),
        ({"batch": 16_384}, "8192"),
    ],
)
def test_a_spec_out_of_range_is_refused_by_name(changed, told):
    with pytest.raises(ValueError, match=told):
        replace(Spec((64, 32, 10)), **changed)


@pytest.mark.parametrize("sizes", [(7, 3), (7, 4, 3), (7, 5, 4, 3)])
@pytest.mark.parametrize("activation", ["square", "cubic"])
def test_shapes_are_the_models_in_its_order(sizes, activation):
    spec = Spec(sizes, activation)
    model = network(spec)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert list(spec.shapes.items()) == list(shapes.items())
    assert (weight(0), bias(0)) == tuple(spec.shapes)[:2]
    assert model.coefficients[spec.power] == 1
    assert sum(model.coefficients) == 1
    assert spec.layers == len(sizes) - 1


def test_digests_tell_specs_apart():
    spec = Spec((64, 32, 10))
    others = [
        Spec((64, 10)), Spec((64, 32, 10), "cubic"), Spec((64, 32, 10), loss="squared"),
        Spec((64, 32, 10), batch=256), Spec((64, 33, 10)), Spec((643, 2, 10)),
    ]  # fmt: skip
    assert len({each.digest for each in (spec, *others)}) == 7
    assert spec.digest == Spec([64, 32, 10]).digest  # type: ignore[arg-type]


@given(units=st.integers(1, 300), workers=st.integers(1, 16))
def test_shares_are_all_units_in_order_in_pairs_and_even(units, workers):
    shares = Spec((4, units, 2)).share(0, workers)
    assert len(shares) == workers
    assert [unit for share in shares for unit in share] == list(range(units))
    assert all(share.start % 2 == 0 or not share for share in shares)
    assert all(left.stop == right.start for left, right in pairwise(shares))
    pairs = [-(-len(share) // 2) for share in shares]
    assert max(pairs) - min(pairs) <= 1
    assert len(shares[0]) >= 1
