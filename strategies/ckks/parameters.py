"""The parameters of the CKKS scheme (Cheon et al. 2017), and SEAL's context for them.

Clients' ciphertexts are only ever added: the modulus of a ciphertext is one prime q, and a real vector of N values
fills one polynomial of degree N, two values a slot (a slot holds a complex number). That is 8 bytes a value for a fresh
ciphertext, half of what slots of one real value each would take.

Values are divided by their limit first. The scale then follows from what a sum may reach: a polynomial's coefficients
are averages of its slots times roots of unity, so none exceeds the largest slot, |coefficient| ≤ scale · √2 · members,
where √2 comes of two values in a slot, and this is reached when all slots are equal. Sums wrap round at q / 2. The
scale is the largest that leaves room for the encryptions' noise and for rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isfinite, log, log2, sqrt
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from tenseal import sealapi

SEED_BYTES: Final = 64
"""Of SEAL's BLAKE2xb generator, from which the uniform half of a fresh ciphertext follows."""

_NOISE_VARIANCE: Final = 42 / 4 + 1 / 12
"""Of a coefficient of a fresh ciphertext: SEAL's centred binomial of 42 bits, and the rounding of the encoding."""
_NOISE_MAXIMUM: Final = 22
"""The largest coefficient that these two can make."""
_TAIL: Final = 128 * log(2)
"""−ln of the probability with which the encryptions' noise is longer than its bound."""
_DEVIATIONS: Final = 8
"""A normal variable is further from its mean than this once in 10^15."""
_GRID_BITS: Final = 3
"""What is released is rounded to a power of two at most 2^-3 of the flooding's standard deviation."""


@dataclass(frozen=True)
class CkksParameters:
    """What all clients and the server must agree on; nothing in it is secret.

    Attributes:
        degree: N, the polynomials' degree and the number of values in a ciphertext.
        bits: of the ciphertexts' prime, and, for keys that TenSEAL's own contexts share, of a second one that no
            ciphertext of ours uses.
        members: the most updates that one sum holds.
        limit: the largest magnitude of a value; what lies beyond is saturated.
        noise_bits: ν, the statistical security that the flooding of released sums is laid out for.
        decryptions: τ, the ciphertexts that may be decrypted under one key before ν no longer holds.

    Raises:
        ValueError: a value is out of its range, or SEAL doesn't hold the ring for 128-bit secure.
    """

    degree: Literal[4096, 8192] = 4096
    bits: tuple[int, ...] = (60,)
    members: int = 100
    limit: float = 1.0
    noise_bits: float = 5.0
    decryptions: int = 4096

    def __post_init__(self) -> None:
        if self.degree not in (4096, 8192):
            raise ValueError(f"CKKS degree {self.degree} should be 4096 or 8192")
        if len(self.bits) not in (1, 2) or not all(40 <= bits <= 60 for bits in self.bits):
            raise ValueError(
                f"CKKS bits {list(self.bits)} should be one or two lengths of primes, 40 to 60 each"
            )
        if not 2 <= self.members <= 1 << 16:
            raise ValueError(f"CKKS members {self.members} should be between 2 and 65536")
        if not (isfinite(self.limit) and 2.0**-20 <= self.limit <= 2.0**20):
            raise ValueError(f"CKKS limit {self.limit} should be between 2^-20 and 2^20")
        if not 0 <= self.noise_bits <= 64 or not 1 <= self.decryptions <= 1 << 40:
            raise ValueError(
                f"CKKS noise_bits {self.noise_bits} should be within 0 and 64, decryptions"
                f" {self.decryptions} within 1 and 2^40"
            )

    @property
    def ring(self) -> tuple[int, tuple[int, ...]]:
        """What a key belongs to."""
        return self.degree, self.bits

    @cached_property
    def modulus(self) -> int:
        """The ciphertexts' prime q."""
        return ring(*self.ring).modulus

    @cached_property
    def scale(self) -> float:
        """The largest scale with which no sum of `members` values within ±1 wraps round."""
        room = self.modulus / 2 - _NOISE_MAXIMUM * self.members
        # Four units of the last place of room: the division, the encoding and the roots of unity are rounded.
        return room / (sqrt(2) * self.members) * (1 - 2.0**-50 * log2(self.degree))

    @cached_property
    def noise_norm(self) -> float:
        """An upper bound on the L2 norm of one decrypted ciphertext's error in values, (N,), for a full sum.

        The members' noise has N coefficients of known variance (its squared norm exceeds the bound with probability
        2^-128; Laurent and Massart 2000, Lemma 1), and √(N/2) is the length that decoding gives a unit vector. The
        second term is what the decoding's double precision adds.
        """
        spread = self.degree + 2 * sqrt(self.degree * _TAIL) + 2 * _TAIL
        noise = sqrt(self.degree / 2 * self.members * _NOISE_VARIANCE * spread) / self.scale
        return noise * self.limit + sqrt(self.degree) * self._rounding

    @property
    def _rounding(self) -> float:
        """What double precision does to a value of a full sum, by as many butterflies as the transform has."""
        return 2.0**-52 * log2(self.degree) * self.members * self.limit

    @property
    def flooding(self) -> float:
        """Standard deviation of the Gaussian noise that each value of a released sum is given.

        σ = √(12 τ) · 2^(ν/2) · t with t the bound of the error's norm: Li, Micciancio, Schultz and Sorrell 2022,
        "Securing Approximate Homomorphic Encryption Using Differential Privacy", their result on ν bits of
        statistical security beside the scheme's computational security.
        """
        return sqrt(12 * self.decryptions) * 2 ** (self.noise_bits / 2) * self.noise_norm

    @property
    def grid(self) -> float:
        """The power of two that released values are multiples of, so that honest decryptors agree on them."""
        return float(2.0 ** (int(log2(self.flooding) // 1) - _GRID_BITS))

    @property
    def error(self) -> float:
        """The largest error of a released sum's value; exceeded once in 10^15 values."""
        noise = sqrt(self.degree / 2 * self.members * _NOISE_VARIANCE) / self.scale * self.limit
        deviation = sqrt(self.flooding**2 + noise**2)
        return _DEVIATIONS * deviation + self.grid / 2 + 2 * self._rounding

    def ciphertexts(self, size: int) -> int:
        """How many ciphertexts hold a vector of `size` values."""
        return -(-size // self.degree)

    def upload_bytes(self, size: int) -> int:
        """Bytes of one client's encrypted vector of `size` values."""
        return self.ciphertexts(size) * (8 * self.degree + SEED_BYTES)

    def sum_bytes(self, size: int) -> int:
        """Bytes of an encrypted sum of such vectors."""
        return self.ciphertexts(size) * 16 * self.degree


@dataclass(frozen=True)
class Ring:
    """SEAL's view of a ring.

    Attributes:
        seal: TenSEAL's module of SEAL's own classes.
        context: SEAL's context, checked by SEAL for 128-bit security.
        modulus: q, of the ciphertexts.
        identity: 32 bytes by which SEAL knows the ciphertexts' parameters.
        key_identity: 32 bytes by which SEAL knows the keys' parameters.
    """

    seal: Any
    context: sealapi.SEALContext
    modulus: int
    identity: bytes
    key_identity: bytes


def seal_context(degree: int, bits: tuple[int, ...]) -> tuple[Any, Any, tuple[int, ...]]:
    """TenSEAL's module of SEAL's own classes, SEAL's context for a ring, and its primes.

    Raises:
        ValueError: SEAL does not hold it for 128-bit secure, or has no such primes.
    """
    from tenseal import sealapi as seal

    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(degree)
    primes = seal.CoeffModulus.Create(degree, list(bits))
    parameters.set_coeff_modulus(primes)
    context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
    if not context.parameters_set():
        told = context.parameters_error_message()
        raise ValueError(f"CKKS degree {degree} with bits {list(bits)}: {told}")
    return seal, context, tuple(int(prime.value()) for prime in primes)


@lru_cache(maxsize=8)
def ring(degree: int, bits: tuple[int, ...]) -> Ring:
    """SEAL's view of a ring of encrypted sums.

    Raises:
        ValueError: SEAL does not hold it for 128-bit secure, or has no such primes.
    """
    try:
        seal, context, primes = seal_context(degree, bits)
    except ValueError as error:
        raise ValueError(f"{error}; use bits=[60], or degree=8192") from error
    return Ring(
        seal,
        context,
        primes[0],
        _words(context.first_parms_id()),
        _words(context.key_parms_id()),
    )


def _words(identity: list[int]) -> bytes:
    return b"".join(word.to_bytes(8, "little") for word in identity)
