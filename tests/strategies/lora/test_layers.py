import numpy as np
import pytest

from strategies.lora import Layer, layers_of, own_factors
from strategies.update import Layout


def of(*pairs: tuple[str, tuple[int, ...]]) -> Layout:
    return Layout(tuple(name for name, _ in pairs), tuple(shape for _, shape in pairs))


ADAPTED = of(
    ("adapters.h_0_q.A.weight", (4, 6)),
    ("adapters.h_0_q.B.weight", (5, 4)),
    ("adapters.h_1_q.B.weight", (5, 3)),
    ("adapters.h_1_q.A.weight", (3, 6)),
    ("heads.topic.weight", (2, 5)),
    ("heads.topic.bias", (2,)),
    ("residual.h_0_q.left", (5, 2)),
    ("residual.h_0_q.right", (2, 6)),
)


def test_layers_are_the_pairs_under_one_stem_with_their_residuals():
    a, b = ("adapters.h_0_q.A.weight", "adapters.h_0_q.B.weight")
    first = Layer("h_0_q", a, b, 4, 5, 6, "residual.h_0_q.left", "residual.h_0_q.right", 2)
    second = Layer("h_1_q", "adapters.h_1_q.A.weight", "adapters.h_1_q.B.weight", 3, 5, 6)
    assert layers_of(ADAPTED) == (first, second)
    assert first.names == (a, b, "residual.h_0_q.left", "residual.h_0_q.right")
    assert second.names == (second.a, second.b)


@pytest.mark.parametrize("prefix", ["", "bottom.", "model.bottom."])
@pytest.mark.parametrize("room", ["adapters.", ""])
def test_prefixes_may_be_anything(prefix, room):
    found = layers_of(
        of(
            (f"{prefix}{room}q.A.weight", (2, 3)),
            (f"{prefix}{room}q.B.weight", (4, 2)),
            (f"{prefix}residual.q.left", (4, 1)),
            (f"{prefix}residual.q.right", (1, 3)),
        )
    )
    assert [(one.name, one.residual_rank) for one in found] == [(f"{prefix}q", 1)]


def test_bare_names_are_a_layer_without_a_name():
    assert layers_of(of(("A.weight", (2, 3)), ("B.weight", (4, 2)))) == (
        Layer("", "A.weight", "B.weight", 2, 4, 3),
    )


def test_a_residual_without_an_adapter_is_of_no_layer():
    assert layers_of(of(("residual.q.left", (4, 1)), ("residual.q.right", (1, 3)))) == ()


def test_one_factor_alone_is_an_array_like_any_other():
    assert layers_of(of(("adapters.q.B.weight", (4, 2)), ("QA.weight", (1, 1)))) == ()


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ([("q.A.weight", (2, 3)), ("q.B.weight", (4, 1))], "no factors of one product"),
        ([("q.A.weight", (2,)), ("q.B.weight", (4, 2))], "no factors of one product"),
        (
            [("q.A.weight", (2, 3)), ("q.B.weight", (4, 2)), ("residual.q.left", (4, 1))],
            "has only residual.q.left",
        ),
        (
            [
                ("q.A.weight", (2, 3)),
                ("q.B.weight", (4, 2)),
                ("residual.q.left", (4, 1)),
                ("residual.q.right", (2, 3)),
            ],
            "do not fit a layer of 4 x 3",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(arrays, told):
    with pytest.raises(ValueError, match=told):
        layers_of(of(*arrays))


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shapes = zip(ADAPTED.names, ADAPTED.shapes, strict=True)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes}


def test_own_factors_are_the_leading_block_that_was_sent_and_the_change(arrays):
    layer = layers_of(ADAPTED)[0]
    delta = {name: 0.5 * array for name, array in arrays.items()}
    part = {layer.a: (2, 6), layer.b: (5, 2)}
    found = own_factors(layer, arrays, delta, part)
    np.testing.assert_allclose(found.left, 1.5 * arrays[layer.b][:, :2].astype(float), rtol=1e-6)
    np.testing.assert_allclose(found.right, 1.5 * arrays[layer.a][:2].astype(float), rtol=1e-6)
    assert found.left.dtype == np.float64
    assert own_factors(layer, arrays, delta, None).rank == 4
    assert own_factors(layer, arrays, delta, {layer.b: (5, 3)}).rank == 3  # A is frozen


@pytest.mark.parametrize("part", [{}, {"adapters.h_0_q.A.weight": (0, 6)}])
def test_no_rank_is_nothing_of_the_layer(arrays, part):
    assert own_factors(layers_of(ADAPTED)[0], arrays, arrays, part) is None


@pytest.mark.parametrize(
    "part",
    [
        {"adapters.h_0_q.A.weight": (2, 6), "adapters.h_0_q.B.weight": (5, 3)},
        {"adapters.h_0_q.A.weight": (2, 5)},
        {"adapters.h_0_q.B.weight": (4, 2)},
    ],
)
def test_a_block_that_is_no_leading_rank_is_refused(arrays, part):
    with pytest.raises(ValueError, match="no leading rank"):
        own_factors(layers_of(ADAPTED)[0], arrays, arrays, part)
