"""What becomes of bytes on a bad disk or in the hands of somebody who means ill."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st


class Piece(bytes):
    """Bytes that are not shown in full when a test fails."""

    def __repr__(self) -> str:
        return f"{bytes(self[:24])!r}… ({len(self)} bytes)"


NASTY = (
    b"",
    b"\x00",
    Piece(b"[" * 100_000),
    Piece(b'{"a":' * 50_000),
    Piece(b"9" * 5_000),
    b"NaN",
    b"1e400",
    b"-0",
    b"null",
    b"{}",
    b"[]",
    b'"\\ud800"',
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"../../../../etc/passwd",
    b"!!python/object/apply:os.system ['true']",
    b"\x80\x04cos\nsystem\n(X\x04\x00\x00\x00truetR.",
)
"""Of them: a pickle and a YAML tag that would run a command, nesting past any stack, numbers past any float."""

Mutation = Callable[[bytes], bytes]


def _cut(share: float) -> Mutation:
    return lambda data: data[: int(share * len(data))]


def _flipped(share: float, bit: int) -> Mutation:
    def flip(data: bytes) -> bytes:
        place = int(share * max(0, len(data) - 1))
        return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :] if data else data

    return flip


def _spliced(share: float, length: float, piece: bytes) -> Mutation:
    def splice(data: bytes) -> bytes:
        begin = int(share * len(data))
        return data[:begin] + piece + data[begin + int(length * (len(data) - begin)) :]

    return splice


def _doubled(share: float) -> Mutation:
    return lambda data: data + data[int(share * len(data)) :]


_share = st.floats(0, 1, exclude_max=True)
_pieces = st.sampled_from(NASTY) | st.binary(max_size=64)
mutation = (
    st.builds(_cut, _share)
    | st.builds(_flipped, _share, st.integers(0, 7))
    | st.builds(_spliced, _share, st.floats(0, 1), _pieces)
    | st.builds(_doubled, _share)
    | _pieces.map(lambda piece: lambda data: piece)
)
"""One change of a file's bytes."""

mutations = st.lists(mutation, min_size=1, max_size=3)


def changed(data: bytes, steps: list[Mutation]) -> bytes:
    """The bytes after all changes."""
    for step in steps:
        data = step(data)
    return data
