"""Differences in few bytes: exact for any two versions, near the entropy, and safe against hostile bytes."""

import tracemalloc
import zlib
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from strategies.downlink.coding import Packed, pack, unpack
from strategies.downlink.grid import exponent_of, rounded
from strategies.wire import Refused

CODECS = ("zstd", "zlib")
DTYPES = ("f2", "f4", "f8", "i8", "u8", "i4", "u1", "?")


def elements(dtype: str) -> st.SearchStrategy:
    if dtype == "?":
        return st.booleans()
    if dtype[0] == "f":
        return st.floats(-100, 100, width=8 * int(dtype[1]))
    return npst.from_dtype(np.dtype(dtype))


@st.composite
def two_versions(draw):
    """Two models alike in names, shapes and dtypes, and each one's exponents."""
    models: tuple[dict[str, np.ndarray], ...] = ({}, {})
    for number in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(npst.array_shapes(min_dims=0, max_dims=2, max_side=5))
        for model in models:
            model[f"a{number}"] = draw(npst.arrays(dtype, shape, elements=elements(dtype)))
    bits = draw(st.integers(2, 12))
    found = [[exponent_of(array, bits) for array in model.values()] for model in models]
    lattice = [
        {name: rounded(a, e) for (name, a), e in zip(model.items(), its, strict=True)}
        for model, its in zip(models, found, strict=True)
    ]
    return (*lattice, [min(one, two) for one, two in zip(*found, strict=True)])


def same(one, other) -> bool:
    return list(one) == list(other) and all(
        (one[n].dtype, one[n].shape, one[n].tobytes())
        == (other[n].dtype, other[n].shape, other[n].tobytes())
        for n in one
    )


@given(two_versions(), st.sampled_from(CODECS))
def test_any_version_is_made_of_any_other_and_back_bit_for_bit(versions, codec):
    base, target, exponents = versions
    packed = pack(base, target, exponents, codec)
    if packed is None:  # numbers past 32 bits: the whole model travels
        return
    assert same(unpack(base, packed), target)
    assert same(unpack(target, packed, back=True), base)


def test_close_versions_have_a_change_on_the_finest_grid_too():
    base, target, exponents = pair(bits=20)
    assert pack(base, target, exponents) is not None


def pair(size: int = 10_000, bits: int = 10, change: float = 0.1):
    """Two close versions of a model of two arrays and a counter."""
    rng = np.random.default_rng(0)
    first = {
        "w": rng.normal(0, 0.1, (size // 100, 100)).astype(np.float32),
        "b": np.zeros(10, np.float32),
        "steps": np.array(7, np.int64),
    }
    second = {
        "w": first["w"] + rng.normal(0, 0.1 * change, first["w"].shape).astype(np.float32),
        "b": rng.normal(0, 1e-6, 10).astype(np.float32),
        "steps": np.array(9, np.int64),
    }
    found = [[exponent_of(a, bits) for a in model.values()] for model in (first, second)]
    lattice = [
        {name: rounded(a, e) for (name, a), e in zip(model.items(), its, strict=True)}
        for model, its in zip((first, second), found, strict=True)
    ]
    return (*lattice, [min(one, two) for one, two in zip(*found, strict=True)])


def size(packed: Packed) -> int:
    return sum(map(len, packed.planes))


def entropy_bytes(base, target, exponents) -> float:
    """Of the numbers of the largest array, as independent draws from their own frequencies."""
    whole = np.ldexp(target["w"].astype(float), -exponents[0]) - np.ldexp(
        base["w"].astype(float), -exponents[0]
    )
    _, counts = np.unique(whole, return_counts=True)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum() * whole.size / 8)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("change", [0.003, 0.03, 0.3])
def test_a_change_takes_few_bytes_more_than_its_entropy(codec, change):
    base, target, exponents = pair(100_000, change=change)
    packed = pack(base, target, exponents, codec)
    assert size(packed) < 1.15 * entropy_bytes(base, target, exponents) + 200
    assert size(packed) < 4 * 100_000 / 2.5


def test_the_same_version_takes_next_to_nothing():
    base, _, exponents = pair()
    packed = pack(base, base, exponents)
    assert (packed.planes, packed.widths) == ((), (0, 0, 0))
    assert same(unpack(base, packed), base)


def test_what_is_not_on_a_grid_or_too_far_has_no_change():
    base, target, exponents = pair()
    assert pack(base, target, [exponents[0] + 5, *exponents[1:]]) is None
    far = {**target, "steps": np.array(1 << 40)}
    assert pack(base, far, exponents) is None
    assert pack(base, {**target, "w": np.full_like(target["w"], np.nan)}, exponents) is None


# ---- hostile bytes ----


def refused(base, packed: Packed, word: str) -> None:
    with pytest.raises(Refused, match=word) as caught:
        unpack(base, packed)
    assert caught.value.reason == "held"


@pytest.mark.parametrize("codec", CODECS)
def test_a_bomb_is_refused_before_it_inflates(codec):
    base, target, exponents = pair()
    packed = pack(base, target, exponents, codec)
    zeros = bytes(200_000_000)
    bomb = zlib.compress(zeros) if codec == "zlib" else zstandard.ZstdCompressor().compress(zeros)
    lying = zstandard.ZstdCompressor(write_content_size=False).compress(zeros)
    del zeros
    bombs = [bomb[:10_000]] if codec == "zlib" else [bomb[:10_000], lying[:10_000]]
    tracemalloc.start()
    try:
        for data in bombs:
            refused(base, replace(packed, planes=(data, *packed.planes[1:])), "a plane")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda data: data[:-3], "plane"),
        (lambda data: b"", "plane"),
        (lambda data: data + b"more", "plane"),
        (lambda data: b"\0" * len(data), "can't be inflated"),
        (lambda data: data + bytes(20_000), "too many"),
    ],
    ids=["cut off", "empty", "something behind", "no frame", "too long"],
)
def test_a_plane_that_is_none_is_refused(codec, change, word):
    base, target, exponents = pair()
    packed = pack(base, target, exponents, codec)
    refused(base, replace(packed, planes=(change(packed.planes[0]), *packed.planes[1:])), word)


@pytest.mark.parametrize(
    ("altered", "word"),
    [
        ({"codec": "pickle"}, "the codec 'pickle' is unknown"),
        ({"widths": (1, 1)}, "2 arrays came, the held model has 3"),
        ({"exponents": (0,)}, "arrays came"),
        ({"widths": (5, 1, 1)}, "planes are not what the widths ask for"),
        ({"planes": ()}, "planes are not what the widths ask for"),
        ({"exponents": (0, 0, 2_000)}, "out of float64's range"),
        ({"exponents": (5, 0, 0)}, "does not lie on the grid"),
        ({"widths": (1, 2, 1)}, "a plane"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_parts_that_do_not_go_together_are_refused(altered, word):
    base, target, exponents = pair()
    refused(base, replace(pack(base, target, exponents), **altered), word)


def test_more_than_four_planes_are_refused_whatever_the_widths():
    base, target, exponents = pair()
    packed = pack(base, target, exponents)
    plane = packed.planes[0]
    refused(base, replace(packed, widths=(5, 5, 5), planes=(plane,) * 5), "5 planes")


@given(st.binary(max_size=200), st.sampled_from(CODECS), st.integers(-1074, 1023))
def test_bytes_from_anywhere_are_refused_or_give_arrays_of_the_models_shapes(data, codec, exponent):
    base = {"w": np.zeros((2, 3), np.float32), "n": np.zeros(2, np.int64)}
    with suppress(Refused):
        restored = unpack(base, Packed(codec, (exponent, 0), (1, 0), (data,)))
        assert {n: (a.shape, a.dtype) for n, a in restored.items()} == {
            n: (a.shape, a.dtype) for n, a in base.items()
        }
