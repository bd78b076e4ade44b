"""Vectors to ciphertexts, and their sums to vectors: the clients' half, with the key, and the server's, without."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from strategies.ckks.key import SharedKey
from strategies.ckks.parameters import SEED_BYTES, CkksParameters, ring
from strategies.ckks.streams import CiphertextError, Residues, Streams, scratch
from strategies.ckks.tags import keystream

_SEED_WORDS: Final = SEED_BYTES // 8


class SecretKeyError(ValueError):
    """A server was handed a secret key."""


@dataclass(frozen=True)
class Encrypted:
    """One client's vector.

    Attributes:
        blob: its ciphertexts, each N residues and a seed.
        residues: what the ciphertexts are, (ciphertexts, 2, N), for the client's own use.
        saturated: how many values lay beyond ±limit.
    """

    blob: bytes
    residues: Residues
    saturated: int


class Cipher:
    """The clients' half: encrypts one's own vector, and decrypts sums.

    Args:
        parameters: that all agree on.
        key: that the clients share.

    Raises:
        ValueError: the key belongs to another ring.
    """

    def __init__(self, parameters: CkksParameters, key: SharedKey) -> None:
        if key.ring != parameters.ring:
            raise ValueError(
                f"the CKKS key is one for degree and bits {key.ring}, the run wants {parameters.ring}"
            )
        self._parameters, self._key, self._ring = parameters, key, ring(*parameters.ring)

    def encrypt(self, vector: NDArray[np.floating], factor: float = 1.0) -> Encrypted:
        """Encrypts factor · vector (d,), saturated at ±limit.

        Raises:
            ValueError: a value is not finite, or there is none.
        """
        slots, saturated = self._slots(vector, factor)
        parameters, seal = self._parameters, self._ring.seal
        encoder = seal.CKKSEncoder(self._ring.context)
        encryptor = seal.Encryptor(self._ring.context, self._key.seal_key())
        blob = np.empty((len(slots), parameters.degree + _SEED_WORDS), "<u8")
        residues = np.empty((len(slots), 2, parameters.degree), np.uint64)
        plaintext = seal.Plaintext()
        with scratch() as file:
            streams = Streams(self._ring, parameters.degree, file, parameters.scale)
            for index, row in enumerate(slots):
                encoder.encode(row.tolist(), parameters.scale, plaintext)
                first, seed = streams.fresh(encryptor.encrypt_symmetric(plaintext))
                blob[index, : parameters.degree] = first
                blob[index, parameters.degree :] = np.frombuffer(seed, "<u8")
                residues[index] = streams.whole(streams.load(first, seed))
        return Encrypted(blob.tobytes(), residues, saturated)

    def _slots(
        self, vector: NDArray[np.floating], factor: float
    ) -> tuple[NDArray[np.complex128], int]:
        """Values as slots (ciphertexts, N/2), padded with zeros, and how many were saturated."""
        degree, limit = self._parameters.degree, self._parameters.limit
        values = np.zeros(self._parameters.ciphertexts(vector.size) * degree)
        np.multiply(vector, factor, out=values[: vector.size], dtype=np.float64)
        if not values.size or not np.isfinite(values).all():
            raise ValueError("only vectors of finite values can be encrypted")
        saturated = int(np.count_nonzero(np.abs(values) > limit))
        np.clip(values, -limit, limit, out=values)
        values /= limit
        return values.view(np.complex128).reshape(-1, degree // 2), saturated

    def release(self, blob: bytes, size: int) -> NDArray[np.float64]:
        """The plain sum (size,) of an encrypted sum, flooded with noise that follows from the key and the ciphertexts.

        Raises:
            CiphertextError: the bytes are no such sum.
        """
        noisy = self.decrypt(blob, size) + self._flood(blob, size)
        grid = self._parameters.grid
        return np.round(noisy / grid) * grid

    def decrypt(self, blob: bytes, size: int) -> NDArray[np.float64]:
        """The sum as it is decrypted (size,): never to be shown to whoever holds the ciphertexts.

        Raises:
            CiphertextError: the bytes are no such sum.
        """
        parameters, seal = self._parameters, self._ring.seal
        residues = sum_residues(parameters, blob, size)
        decryptor = seal.Decryptor(self._ring.context, self._key.seal_key())
        encoder = seal.CKKSEncoder(self._ring.context)
        values = np.empty((len(residues), parameters.degree // 2), np.complex128)
        plaintext = seal.Plaintext()
        with scratch() as file:
            streams = Streams(self._ring, parameters.degree, file, parameters.scale)
            for index, row in enumerate(residues):
                decryptor.decrypt(streams.load(row), plaintext)
                values[index] = encoder.decode_complex(plaintext)
        return values.view(np.float64).reshape(-1)[:size] * parameters.limit

    def _flood(self, blob: bytes, size: int) -> NDArray[np.float64]:
        """Gaussian noise (size,): the same for the same sum and scale, whoever decrypts it and however often."""
        from scipy.special import ndtri

        # Two scales of one normal vector would give the exact sum away.
        scale = struct.pack("<d", self._parameters.flooding)
        key = self._key.derive("flooding", hashlib.sha256(scale + blob).digest())
        words = np.frombuffer(keystream(key, 8 * size), "<u8")
        return np.asarray(ndtri(_uniform(words)) * self._parameters.flooding, np.float64)


class Sum:
    """The server's half: adds up ciphertexts as they come. Public parameters are all that it has.

    Args:
        parameters: that all agree on.
        size: values of a vector.
    """

    def __init__(self, parameters: CkksParameters, size: int) -> None:
        public_only(parameters)  # whoever builds a server by hand may hand it a context instead
        self._parameters, self._size, self._ring = parameters, size, ring(*parameters.ring)
        self._evaluator = self._ring.seal.Evaluator(self._ring.context)
        self._total: list[Any] = []
        self.members = 0

    def add(self, blob: bytes) -> None:
        """Adds one client's vector; one that is refused leaves the sum as it was.

        Raises:
            CiphertextError: the bytes are no vector of ciphertexts, or the sum is full.
        """
        if self.members == self._parameters.members:
            raise CiphertextError(f"a sum of {self.members} members is full")
        ciphertexts = self._load(blob)
        if not self._total:
            self._total = ciphertexts
        else:
            for ours, theirs in zip(self._total, ciphertexts, strict=True):
                self._evaluator.add_inplace(ours, theirs)
        self.members += 1

    def _load(self, blob: bytes) -> list[Any]:
        parameters = self._parameters
        rows = _rows(parameters, blob, self._size, parameters.degree + _SEED_WORDS)
        first = rows[:, : parameters.degree]
        _in_range(first, self._ring.modulus)
        with scratch() as file:
            streams = Streams(self._ring, parameters.degree, file, parameters.scale)
            return [
                streams.load(row, seed.tobytes())
                for row, seed in zip(first, rows[:, parameters.degree :], strict=True)
            ]

    def to_bytes(self) -> bytes:
        """The encrypted sum: 2 N residues a ciphertext.

        Raises:
            ValueError: nothing has been added.
        """
        if not self._total:
            raise ValueError("a sum of no ciphertexts can't be sent")
        with scratch() as file:
            streams = Streams(self._ring, self._parameters.degree, file, self._parameters.scale)
            return b"".join(streams.whole(item).tobytes() for item in self._total)


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Words as numbers in (0, 1): (2⁵³ − 1) + 0.5 is rounded to 2⁵³, and no normal deviate belongs to 1."""
    uniform: NDArray[np.float64] = np.minimum(
        ((words >> np.uint64(11)) + 0.5) * 2.0**-53, 1 - 2.0**-53
    )
    return uniform


def public_only(context: Any) -> None:
    """Refuses what holds a secret key: one of ours, or a `tenseal.Context` that can decrypt.

    For servers of one's own that are handed a context: Trellis's collectors have parameters only, which are numbers.

    Raises:
        SecretKeyError: it does.
    """
    private = isinstance(context, SharedKey | Cipher) or any(
        callable(asked := getattr(context, name, None)) and asked()
        for name in ("is_private", "has_secret_key")
    )
    if private:
        raise SecretKeyError(
            "a server's context must not hold the secret key: with it the server could decrypt every client's update;"
            " hand it the public one (context.make_context_public())"
        )


def sum_residues(parameters: CkksParameters, blob: bytes, size: int) -> Residues:
    """The residues (ciphertexts, 2, N) of an encrypted sum.

    Raises:
        CiphertextError: the bytes are no such sum.
    """
    rows = _rows(parameters, blob, size, 2 * parameters.degree)
    _in_range(rows, parameters.modulus)
    return rows.reshape(-1, 2, parameters.degree)


def _rows(parameters: CkksParameters, blob: bytes, size: int, width: int) -> Residues:
    """Bytes as one row of `width` words a ciphertext."""
    wanted = 8 * width * parameters.ciphertexts(size)
    if len(blob) != wanted or not wanted:
        raise CiphertextError(
            f"{len(blob)} bytes came; {size} values in degree {parameters.degree} take {wanted}"
        )
    return np.frombuffer(blob, "<u8").reshape(-1, width)


def _in_range(residues: Residues, modulus: int) -> None:
    if (residues >= modulus).any():
        raise CiphertextError(
            "a residue is not below the modulus: other parameters, or no ciphertext"
        )
