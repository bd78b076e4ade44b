"""A vector of which most is 0, as the coordinates and the values of the rest."""

from __future__ import annotations

import struct

import numpy as np

from strategies.compression.entropy import Codec, Reader
from strategies.compression.gaps import most_index_bytes, pack_indices, unpack_indices
from strategies.compression.values import (
    Precision,
    most_value_bytes,
    pack_values,
    unpack_values,
)
from strategies.update import Vector
from strategies.wire import Refused

_COUNT = struct.Struct("<I")


def pack_sparse(vector: Vector, precision: Precision, codec: Codec) -> bytes:
    """The elements of a (d,) vector that are not 0; their number is 4 bytes, so d < 2³²."""
    indices = np.flatnonzero(vector != 0)  # numpy finds ones among bools seven times as fast
    values = vector[indices]
    return b"".join(
        (
            _COUNT.pack(len(indices)),
            pack_indices(indices, len(vector), codec),
            pack_values(values, precision, codec),
        )
    )


def unpack_sparse(
    data: bytes | memoryview, size: int, most: int, precision: Precision, codec: Codec
) -> Vector:
    """The (size,) vector.

    Args:
        data: from a client.
        size: d.
        most: elements that may be other than 0.
        precision: of the values.
        codec: of the streams.

    Raises:
        Refused: `malformed`, for anything that is not so written.
    """
    reader = Reader(data)
    (count,) = reader.numbers(_COUNT)
    if not count <= most:
        raise Refused("malformed", f"{count} elements came, {most} at most were asked for")
    indices = unpack_indices(reader, int(count), size, codec)
    values = unpack_values(reader, int(count), precision, codec)
    reader.close()
    vector = np.zeros(size, np.float32)
    vector[indices] = values
    return vector


def most_sparse_bytes(size: int, most: int, precision: Precision, codec: Codec) -> int:
    """The most bytes that up to `most` elements of `size` can take."""
    indices = most_index_bytes(most, size, codec)
    return _COUNT.size + indices + most_value_bytes(most, precision, codec)
