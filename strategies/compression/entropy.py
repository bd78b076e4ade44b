"""Bytes shorter by the odds of their values, and back, where whoever wrote them may wish to harm.

Zstandard (Collet & Kucherawy 2021, RFC 8878, "Zstandard Compression and the 'application/zstd' Media Type"), one frame
a stream. Of its two parts it is the entropy coder that helps here.

A frame says how long its content is, and a few bytes can say a terabyte. So what it says is held against what the
reader knows before anything is inflated, its window likewise, and nothing is read that is not one whole frame.
"""

from __future__ import annotations

import struct
from typing import Final, Literal

import numpy as np
import zstandard
from numpy.typing import NDArray

from strategies.wire import Refused

Codec = Literal["zstd", "none"]
"""How streams of bytes are made shorter, if at all."""

Bytes = NDArray[np.uint8]

_PARAMETERS: Final = zstandard.ZstdCompressionParameters.from_level(
    1, strategy=zstandard.STRATEGY_DFAST, min_match=7, hash_log=6, chain_log=6
)
"""Hardly any search: numbers seldom repeat in runs, and looking for these took twice the time of the coder's."""
_LEAST_WINDOW: Final = 1 << 10
"""Zstandard's smallest."""
_LENGTH: Final = struct.Struct("<I")


def most_bytes(size: int, codec: Codec) -> int:
    """The longest stream that `size` bytes can become, its length included."""
    if codec == "none":
        return _LENGTH.size + size
    # ZSTD_COMPRESSBOUND of zstd.h.
    return _LENGTH.size + size + (size >> 8) + max(0, (1 << 17) - size >> 11)


def deflate(data: Bytes, codec: Codec) -> bytes:
    """A stream: its length in 4 bytes, then one frame, or the bytes as they are."""
    body = data.tobytes() if codec == "none" else _compressed(data)
    return _LENGTH.pack(len(body)) + body


def _compressed(data: Bytes) -> bytes:
    return zstandard.ZstdCompressor(compression_params=_PARAMETERS).compress(data.data)


class Reader:
    """Takes a section's bytes apart, from the front.

    Args:
        data: what a client sent.

    Raises:
        Refused: `malformed`, by every method, where the bytes are not what an honest client sends.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._at = memoryview(data).cast("B"), 0

    def take(self, size: int) -> Bytes:
        """The next `size` bytes, without a copy."""
        if size > len(self._data) - self._at:
            raise Refused("malformed", f"{size} bytes are missing their end")
        found = np.frombuffer(self._data, np.uint8, size, self._at)
        self._at += size
        return found

    def numbers(self, form: struct.Struct) -> tuple[int | float, ...]:
        """The next few numbers."""
        return form.unpack(self.take(form.size).data)

    def stream(self, least: int, most: int, codec: Codec) -> Bytes:
        """The next stream, which must hold from `least` to `most` bytes: no more memory is taken than for these."""
        (size,) = _LENGTH.unpack(self.take(_LENGTH.size).data)
        body = self.take(size)
        if codec == "zstd":
            return _inflated(body, least, most)
        if not least <= size <= most:
            raise Refused(
                "malformed", f"a stream has {size} bytes, {least} to {most} were expected"
            )
        return body

    def close(self) -> None:
        """Nothing may follow."""
        if self._at != len(self._data):
            raise Refused("malformed", f"{len(self._data) - self._at} bytes follow the end")


def _inflated(body: Bytes, least: int, most: int) -> Bytes:
    try:
        frame = zstandard.get_frame_parameters(body.data)
        if not least <= frame.content_size <= most:  # an unknown size is 2^64 - 1
            raise Refused("malformed", f"a frame says that it holds {frame.content_size} bytes")
        if frame.window_size > max(most, _LEAST_WINDOW) or frame.dict_id:
            raise Refused("malformed", f"a frame asks for a window of {frame.window_size} bytes")
        content = zstandard.ZstdDecompressor().decompress(body.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Refused("malformed", f"a stream is no frame of Zstandard: {error}") from error
    if len(content) != frame.content_size:
        raise Refused("malformed", f"a frame of {frame.content_size} bytes holds {len(content)}")
    return np.frombuffer(content, np.uint8)
