"""Arrays to bytes and back, and bytes that a hostile peer made."""

import struct
from io import BytesIO

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from strategies.sizes import count_bytes
from strategies.wire import Refused, pack, pack_model, unpack, unpack_model
from tests.support.examples import many

DTYPES = [
    *(np.dtype(f"f{size}") for size in (2, 4, 8)),
    *(np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)),
    np.dtype(bool),
]
plain_arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, max_dims=4, min_side=0))
)


def of_bytes(data: bytes, dtype: str = "float32", shape: tuple[int, ...] = (1,)) -> Array:
    """An `Array` whose words beside the bytes say what the sender likes."""
    return Array(dtype=dtype, shape=shape, stype="numpy.ndarray", data=data)


def npy(header: str | bytes, body: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1") if isinstance(header, str) else header
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + body


def saved(array: np.ndarray) -> bytes:
    stream = BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def refusal(data: bytes) -> str:
    with pytest.raises(Refused) as caught:
        unpack(of_bytes(data))
    return caught.value.reason


@given(plain_arrays)
def test_an_array_comes_back_as_it_was(array):
    packed = pack(array)
    assert (packed.dtype, packed.shape) == (str(array.dtype), array.shape)
    back = unpack(packed)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(back, array)


@given(plain_arrays)
def test_numpy_and_flower_read_what_is_packed_and_the_other_way_round(array):
    packed = pack(array)
    for read in (np.load(BytesIO(packed.data), allow_pickle=False), packed.numpy()):
        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(read, array)
    np.testing.assert_array_equal(unpack(Array(array)), array)


def test_the_bytes_are_those_that_numpy_writes():
    for array in (np.arange(6.0).reshape(2, 3), np.array(1, np.int64), np.zeros((0, 2), bool)):
        assert pack(array).data == saved(array)


@pytest.mark.parametrize("order", ["transposed", "strided", "Fortran"])
def test_any_memory_order_is_packed_in_c_order(order):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    array = {"transposed": array.T, "strided": array[::2, 1:], "Fortran": np.asfortranarray(array)}[
        order
    ]
    np.testing.assert_array_equal(unpack(pack(array)), array)


def test_unpacking_copies_nothing_and_gives_nothing_to_write_to():
    packed = pack(np.arange(1000, dtype=np.float32))
    view = unpack(packed)
    assert np.shares_memory(view, np.frombuffer(packed.data, np.uint8))
    assert not view.flags.writeable


@given(plain_arrays)
def test_fortran_order_is_read_as_numpy_reads_it_without_a_copy(array):
    packed = Array(np.array(array, order="F"))
    view = unpack(packed)
    np.testing.assert_array_equal(view, array)
    assert view.shape == array.shape
    assert not array.size or np.shares_memory(view, np.frombuffer(packed.data, np.uint8))


def test_a_model_comes_back_in_order_with_every_dtype_and_shape():
    model = {
        f"{dtype}-{len(shape)}": np.ones(shape, dtype)
        for dtype in DTYPES
        for shape in [(), (0,), (2, 3)]
    }
    back = unpack_model(pack_model(model))
    assert list(back) == list(model)
    for name, array in model.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)


def test_only_the_bytes_are_believed_not_what_stands_beside_them():
    data = pack(np.arange(6, dtype=np.float32).reshape(2, 3)).data
    array = unpack(of_bytes(data, dtype="object", shape=(10**9, -4)))
    assert (array.dtype, array.shape) == (np.float32, (2, 3))


def header(descr: object = "<f4", fortran: object = False, shape: object = (1,)) -> str:
    return str({"descr": descr, "fortran_order": fortran, "shape": shape}) + "\n"


FOUR = b"\0" * 4
MALFORMED = {
    "nothing at all": b"",
    "no magic": b"\x00" * 200,
    "a pickle": b"cos\nsystem\n(S'true'\ntR.",
    "half a magic": b"\x93NUM",
    "a header's length alone": b"\x93NUMPY\x01\x00\xff\xff",
    "format 2.0": npy(header(), FOUR, b"\x02\x00"),
    "format 9.9": npy(header(), FOUR, b"\x09\x09"),
    "an empty header": npy("", FOUR),
    "a header without an end": npy("{'descr': '<f4', 'shape': (", FOUR),
    "an open string": npy("'''", FOUR),
    "a header of Python 2": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1L,)}", FOUR),
    "a call": npy("__import__('os').getpid()", FOUR),
    "a list": npy("[1, 2]", FOUR),
    "a header that is not ASCII": npy(b"{'descr': '\xff'}", FOUR),
    "a null byte": npy("{'descr': '\0'}", FOUR),
    "deep nesting": npy("(" * 2000, FOUR),
    "a key too many": npy("{'descr':'<f4','fortran_order':False,'shape':(1,),'x':0}", FOUR),
    "a key too few": npy("{'descr':'<f4','fortran_order':False}", FOUR),
    "keys of other types": npy("{1: 2, 'descr': 3, (): 4}", FOUR),
    "a header beyond its limit": npy(header() + " " * 5000, FOUR),
    "no shape": npy(header(shape=4), FOUR),
    "a shape of floats": npy(header(shape=(1.0,)), FOUR),
    "a shape of bools": npy(header(shape=(True,)), FOUR),
    "a negative shape": npy(header(shape=(-1,)), FOUR),
    "two negative lengths": npy(header(shape=(-1, -1)), FOUR),
    "a shape of 10**30": npy(header(shape=(10**30,)), FOUR),
    "an endless number": npy(
        "{'descr':'<f4','fortran_order':False,'shape':(0x" + "f" * 4000 + ",)}"
    ),
    "a shape that overflows": npy(header(shape=(2**62, 2**62, 2**62)), FOUR),
    "an empty array with a huge axis": npy(header(shape=(0, 2**62))),
    "an empty array past 2**63": npy(header(shape=(0, 2**70))),
    "65 axes": npy(header(shape=(1,) * 65), FOUR),
    "an order that is not a bool": npy(header(fortran=0), FOUR),
    "a byte too few": pack(np.zeros(3)).data[:-1],
    "a byte too many": pack(np.zeros(3)).data + b"\0",
    "only a header": npy(header()),
}
OTHER_TYPES = {
    "big-endian": saved(np.ones(1, ">f4")),
    "complex": saved(np.ones(1, np.complex64)),
    "text": saved(np.array(["abc"])),
    "bytes": saved(np.array([b"abcd"])),
    "dates": npy(header("<M8[s]"), b"\0" * 8),
    "raw": npy(header("|V4"), FOUR),
    "objects": npy(header("|O"), b"\0" * 8),
    "a structure": saved(np.zeros(1, [("a", "<f4"), ("b", "<i4")])),
    "a structure of objects": npy(header([("a", "|O")]), b"\0" * 8),
    "an array within": npy(header(("<f4", (2,))), b"\0" * 8),
    "an empty structure": npy(header(()), FOUR),
    "a name of a type": npy(header("float32"), FOUR),
    "an old alias": npy(header("a"), FOUR),
    "several types": npy(header("f4,f4"), b"\0" * 8),
    "an odd size": npy(header("<f3"), FOUR),
    "no type": npy(header(None), FOUR),
    "a huge number for a type": npy(
        "{'descr':0x" + "f" * 4000 + ",'fortran_order':False,'shape':(1,)}", FOUR
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_bytes_are_refused(name):
    assert refusal(MALFORMED[name]) == "malformed"


@pytest.mark.parametrize("name", OTHER_TYPES)
def test_anything_but_plain_native_numbers_is_refused(name):
    assert refusal(OTHER_TYPES[name]) == "dtype"


def check_against_numpy(data: bytes) -> None:
    """`unpack` gives what numpy's own loader gives, or refuses; nothing else ever happens."""
    try:
        array = unpack(of_bytes(data))
    except Refused:
        return
    loaded = np.load(BytesIO(data), allow_pickle=False)
    assert (array.dtype, array.shape) == (loaded.dtype, loaded.shape)
    assert array.tobytes() == loaded.tobytes()


@settings(max_examples=many(300))
@given(st.binary(max_size=400))
@example(b"\x93NUMPY\x01\x00")
def test_random_bytes_are_refused_or_read_as_numpy_reads_them(data):
    check_against_numpy(data)


@settings(max_examples=many(500))
@given(
    st.text(st.sampled_from("{}()[]'\",: \\0123456789-<>|fiubOdescrhapotnFlsTu_L\n"), max_size=90)
)
def test_random_headers_are_refused_or_read_as_numpy_reads_them(text):
    check_against_numpy(npy(text, FOUR))


dimensions = (
    st.integers(-2, 9) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**40]) | st.booleans()
)
descriptions = st.sampled_from(
    [
        "<f4",
        ">f4",
        "|b1",
        "<i8",
        "<u2",
        "<f2",
        "|O",
        "<c8",
        "<U3",
        "a",
        "f4,f4",
        "<M8[s]",
        "|V8",
        "f",
    ]
) | st.recursive(
    st.sampled_from(["<f4", "|O", 3, None]), lambda item: st.lists(item) | st.tuples(item)
)


@settings(max_examples=many(500))
@given(
    descriptions,
    st.booleans() | st.none(),
    st.lists(dimensions, max_size=70).map(tuple) | st.integers(),
    st.binary(max_size=80),
)
def test_whatever_a_header_promises_nothing_but_a_refusal_happens(descr, fortran, shape, body):
    check_against_numpy(npy(header(descr, fortran, shape), body))


@settings(max_examples=many(500))
@given(plain_arrays, st.data())
def test_a_changed_valid_array_is_refused_or_read_as_numpy_reads_it(array, data):
    packed = bytearray(pack(array).data)
    for _ in range(data.draw(st.integers(1, 4), "changes")):
        place = data.draw(st.integers(0, max(0, len(packed) - 1)), "place")
        kind = data.draw(st.sampled_from(["change", "insert", "delete", "cut"]))
        byte = data.draw(st.integers(0, 255), "byte")
        if kind == "change":
            packed[place : place + 1] = bytes([byte])
        elif kind == "insert":
            packed[place:place] = bytes([byte])
        elif kind == "delete":
            del packed[place : place + 1]
        else:
            del packed[place:]
    check_against_numpy(bytes(packed))


def test_a_refusal_carries_its_reason_and_its_detail():
    with pytest.raises(Refused) as caught:
        unpack_model(ArrayRecord({"bias": of_bytes(b"no")}))
    assert caught.value.reason == "malformed"
    assert caught.value.detail.startswith("array 'bias' has no whole header")
    assert str(caught.value) == f"malformed: {caught.value.detail}"


def test_bytes_of_a_message_are_counted_with_their_names():
    record = pack_model({"weight": np.zeros(4, np.float32)})
    assert count_bytes(RecordDict({"arrays": record})) == len("weight") + 128 + 4 * 4
