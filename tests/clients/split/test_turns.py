"""What a turn holds is read as it was written, whatever the precision; padding does not travel."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clients.split.turns import Batch, read_batches, read_rows, write_batches, write_rows
from strategies.wire import Refused

HIDDEN, LONGEST = 6, 9
LIMITS = {"hidden": HIDDEN, "longest": LONGEST, "most_tokens": 40, "most_batches": 3}
HALF_STEP = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8, "int8": 0.5 / 127 * 1.01}
"""Of an element, or of a token's largest with int8: how far rounding moves it at most."""


def batch(lengths, seed=0, targets=True) -> Batch:
    kept = torch.tensor(lengths)
    generator = torch.Generator().manual_seed(seed)
    activation = torch.randn(len(lengths), max(lengths), HIDDEN, generator=generator)
    activation[torch.arange(max(lengths)) >= kept.unsqueeze(1)] = 0
    return Batch(activation, kept, torch.arange(len(lengths)) if targets else None)


batches = st.lists(
    st.builds(
        batch, st.lists(st.integers(1, LONGEST), min_size=1, max_size=4), st.integers(0, 99),
        st.booleans(),
    ),
    min_size=1, max_size=3,
)  # fmt: skip


@given(batches, st.sampled_from(sorted(HALF_STEP)))
def test_a_turn_comes_back(made, precision):
    found = read_batches(write_batches(made, precision), precision, **LIMITS)
    for one, came in zip(made, found, strict=True):
        assert torch.equal(came.lengths, one.lengths)
        assert (came.targets is None) == (one.targets is None)
        assert one.targets is None or torch.equal(came.targets, one.targets)
        near = one.activation.abs()
        if precision == "int8":
            near = near.amax(dim=2, keepdim=True)
        if precision == "fp16":  # below a 2⁻³⁰-th of the largest it is denormal
            near = near + near.max() * 2**-28
        assert ((came.activation - one.activation).abs() <= HALF_STEP[precision] * near).all()


@given(batches, st.sampled_from(["states", "gradient"]), st.sampled_from(sorted(HALF_STEP)))
def test_rows_are_written_and_read_by_their_batches_lengths(made, kind, precision):
    tensors, lengths = [b.activation for b in made], [b.lengths for b in made]
    arrays = write_rows(kind, tensors, lengths, precision)
    again = read_rows(kind, arrays, lengths, precision, HIDDEN)
    for one, came in zip(tensors, again, strict=True):
        assert came.shape == one.shape
        assert not came[one == 0].any()
    # What was decoded is encoded to the same.
    twice = write_rows(kind, again, lengths, precision)
    for name, array in arrays.items():
        np.testing.assert_array_equal(twice[name], array)


def test_padding_does_not_travel_whatever_stands_there():
    one = batch([1, 5, 2])
    dirty = one.activation.clone()
    dirty[torch.arange(5) >= one.lengths.unsqueeze(1)] = 1e6
    arrays = write_batches([Batch(dirty, one.lengths, one.targets)], "fp16")
    assert arrays["0.activation.values"].shape == (8, HIDDEN)
    clean = write_batches([one], "fp16")
    assert arrays.keys() == clean.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, clean[name])


def test_labels_that_stay_are_in_no_array():
    assert set(write_batches([batch([2, 3], targets=False)], "int8")) == {
        "0.activation.values",
        "0.activation.steps",
        "0.lengths",
    }


def test_more_batches_than_were_asked_for():
    arrays = write_batches([batch([2])] * 4, "fp32")
    with pytest.raises(Refused, match="too_large: 4 batches"):
        read_batches(arrays, "fp32", **LIMITS)


def test_few_bytes_do_not_unpack_to_many():
    """Thirty texts of one token and one of nine: 39 rows come, and 279 places would be made."""
    arrays = write_batches([batch([1] * 30 + [9])], "fp32")
    with pytest.raises(Refused, match="too_large"):
        read_batches(arrays, "fp32", **LIMITS)


@pytest.mark.parametrize(
    ("rename", "reason"),
    [
        ({"0.states.values": "0.gradient.values"}, "malformed"),
        ({"0.states.values": "1.states.values"}, "missing"),
        ({"0.states.values": "0."}, "malformed"),
        ({"0.states.values": "-1.states.values"}, "malformed"),
        ({"0.states.values": "states.values"}, "malformed"),
        ({"0.states.values": "0.states.value"}, "missing"),
    ],
)
def test_a_server_s_answer_under_other_names(rename, reason):
    one = batch([2, 3])
    arrays = write_rows("states", [one.activation], [one.lengths], "fp32")
    renamed = {rename.get(name, name): array for name, array in arrays.items()}
    with pytest.raises(Refused) as caught:
        read_rows("states", renamed, [one.lengths], "fp32", HIDDEN)
    assert caught.value.reason == reason


def test_a_server_s_answer_to_fewer_or_more_batches():
    one = batch([2, 3])
    for count in (1, 3):
        arrays = write_rows("gradient", [one.activation] * count, [one.lengths] * count, "fp32")
        with pytest.raises(Refused, match="missing"):
            read_rows("gradient", arrays, [one.lengths] * 2, "fp32", HIDDEN)
    with pytest.raises(Refused, match="missing"):
        read_rows("gradient", {}, [one.lengths], "fp32", HIDDEN)


@given(
    st.dictionaries(
        st.one_of(
            st.text(max_size=8),
            st.builds(
                "{}.{}".format,
                st.integers(-1, 3),
                st.sampled_from(
                    ["lengths", "targets", "activation.values", "activation.steps", "x"]
                ),
            ),
        ),
        st.builds(
            lambda shape, dtype, fill: np.full(shape, fill).astype(dtype),
            st.lists(st.integers(0, 6), max_size=3),
            st.sampled_from(["f4", "f2", "i1", "u2", "i4", "i8", "b1"]),
            st.integers(-2, 12),
        ),
        max_size=6,
    ),
    st.sampled_from(sorted(HALF_STEP)),
)
def test_whatever_comes_is_batches_or_refused(arrays, precision):
    with contextlib.suppress(Refused):
        for one in read_batches(arrays, precision, **LIMITS):
            assert one.activation.isfinite().all()
            assert one.activation.shape[:2] == (len(one.lengths), int(one.lengths.max()))
