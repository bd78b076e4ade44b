"""What crosses the wire between an owner of data and the service, as bytes.

A message is a magic word, the length of a head, the head (JSON of a few numbers and the model's digest), and residues.
How many residues there are follows from the model, so a message that is not exactly as long as it should be is refused,
and nothing in it can make the other side allocate more than its own model asks for. There are fields for the seeded
halves of fresh ciphertexts and for an answer's components, and for nothing else: a key has no place in it.

Nothing here knows HTTP, SEAL or a model. Numbers are little-endian.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from strategies import plain_json

MEDIA_TYPE: Final = "application/octet-stream"
LARGEST_HEAD: Final = 1024
"""Bytes of a head that anybody reads."""

_FRAME: Final = struct.Struct("<8sI")
_REQUEST: Final = b"TRELIQ1\n"
_ANSWER: Final = b"TRELIA1\n"


class MessageError(ValueError):
    """Bytes that are no such message.

    Args:
        code: a word for programs: malformed, truncated, too_long, other_model, bad_samples, bad_residues.
        text: what is wrong.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Sizes:
    """What one model's messages hold.

    Attributes:
        model: digest of model and parameters.
        features: ciphertexts of a request.
        primes: below which each ciphertext's residues lie.
        degree: N, residues of a polynomial for one prime.
        samples: the most that a request may hold.
        classes: ciphertexts of an answer.
        components: polynomials of each of them.
        seed_bytes: of a fresh ciphertext's second half.
    """

    model: str
    features: int
    primes: tuple[int, ...]
    degree: int
    samples: int
    classes: int
    components: int
    seed_bytes: int

    @property
    def request_bytes(self) -> int:
        """Of a request's residues and seeds, without its head."""
        return self.features * (8 * len(self.primes) * self.degree + self.seed_bytes)

    @property
    def answer_bytes(self) -> int:
        """Of an answer's residues, without its head."""
        return 8 * self.classes * self.components * len(self.primes) * self.degree

    @property
    def largest_request(self) -> int:
        """Bytes of the longest message that can be a request."""
        return _FRAME.size + LARGEST_HEAD + self.request_bytes


@dataclass(frozen=True)
class Request:
    """Fresh ciphertexts, one a feature.

    Attributes:
        samples: slots that hold one.
        first: first components (features, primes, N) uint64, in NTT form.
        seeds: (features, bytes) uint8, of the second ones.
    """

    samples: int
    first: NDArray[np.uint64]
    seeds: NDArray[np.uint8]

    def to_bytes(self, sizes: Sizes) -> bytes:
        """The message."""
        head = {"model": sizes.model, "samples": self.samples}
        residues = np.ascontiguousarray(self.first, "<u8")
        return b"".join(
            (
                _framed(_REQUEST, head),
                residues.tobytes(),
                np.ascontiguousarray(self.seeds).tobytes(),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes | bytearray, sizes: Sizes) -> Request:
        """What a message says.

        Raises:
            MessageError: it is none for this model.
        """
        head, start = _head(_REQUEST, data, ("model", "samples"))
        _same_model(head, sizes)
        samples = head["samples"]
        if type(samples) is not int or not 1 <= samples <= sizes.samples:
            raise MessageError(
                "bad_samples", f"samples should be a whole number from 1 to {sizes.samples}"
            )
        _length(data, start, sizes.request_bytes)
        shape = (sizes.features, len(sizes.primes), sizes.degree)
        first = _residues(data, start, shape, sizes.primes, axis=1)
        seeds = np.frombuffer(data, np.uint8, offset=start + first.nbytes)
        return cls(samples, first, seeds.reshape(sizes.features, sizes.seed_bytes))


@dataclass(frozen=True)
class Answer:
    """Encrypted logits, one ciphertext a class.

    Attributes:
        residues: (classes, components, primes, N) uint64, in NTT form.
    """

    residues: NDArray[np.uint64]

    def to_bytes(self, sizes: Sizes) -> bytes:
        """The message."""
        residues = np.ascontiguousarray(self.residues, "<u8")
        return _framed(_ANSWER, {"model": sizes.model}) + residues.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes | bytearray, sizes: Sizes) -> Answer:
        """What a message says.

        Raises:
            MessageError: it is none of this model.
        """
        head, start = _head(_ANSWER, data, ("model",))
        _same_model(head, sizes)
        _length(data, start, sizes.answer_bytes)
        shape = (sizes.classes, sizes.components, len(sizes.primes), sizes.degree)
        return cls(_residues(data, start, shape, sizes.primes, axis=2))


def _framed(magic: bytes, head: Mapping[str, object]) -> bytes:
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (
        -(_FRAME.size + len(text)) % 8
    )  # residues that are words of memory are read faster
    return _FRAME.pack(magic, len(text)) + text


def _head(
    magic: bytes, data: bytes | bytearray, keys: tuple[str, ...]
) -> tuple[dict[str, object], int]:
    """The head, and where the residues begin."""
    if len(data) < _FRAME.size:
        raise MessageError("truncated", f"{len(data)} bytes are no message")
    found, size = _FRAME.unpack_from(data)
    if found != magic:
        raise MessageError("malformed", f"a message begins with {magic!r}, not with {found!r}")
    if size > LARGEST_HEAD:
        raise MessageError("malformed", f"a head of {size} bytes; {LARGEST_HEAD} are the most")
    start = _FRAME.size + size
    if len(data) < start:
        raise MessageError("truncated", "the message ends within its head")
    try:
        head = plain_json.loads(bytes(data[_FRAME.size : start]))
    except (ValueError, RecursionError) as error:
        raise MessageError("malformed", "the head is no JSON") from error
    if not isinstance(head, dict) or set(head) != set(keys):
        raise MessageError("malformed", f"a head holds {' and '.join(keys)}, and nothing else")
    return head, start


def _same_model(head: Mapping[str, object], sizes: Sizes) -> None:
    if head["model"] != sizes.model:
        raise MessageError(
            "other_model", f"this is for another model than {sizes.model}: ask for /v1/model again"
        )


def _length(data: bytes | bytearray, start: int, wanted: int) -> None:
    found = len(data) - start
    if found != wanted:
        code = "truncated" if found < wanted else "too_long"
        raise MessageError(code, f"{found} bytes follow the head, and {wanted} should")


def _residues(
    data: bytes | bytearray, start: int, shape: tuple[int, ...], primes: tuple[int, ...], axis: int
) -> NDArray[np.uint64]:
    found = np.frombuffer(data, "<u8", int(np.prod(shape)), start).reshape(shape)
    highest = found.max(axis=tuple(one for one in range(len(shape)) if one != axis))
    for prime, largest in zip(primes, highest, strict=True):
        if int(largest) >= prime:
            raise MessageError("bad_residues", f"a residue is not below its prime {prime}")
    return found.astype(np.uint64, copy=False)
