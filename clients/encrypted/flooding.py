"""Noise on what an owner decrypts, before anybody is told of it: a decrypted value gives the secret key away.

CKKS decrypts to value + error; who holds ciphertexts, knows what was computed and the value, learns the error, and from
it the key (Li and Micciancio 2021, "On the Security of Homomorphic Encryption on Approximate Numbers"). With

    σ = √(12 τ) 2^(ν/2) t

on each element, t the bound on the error's norm, ν bits of statistical security are left after τ releases (Li,
Micciancio, Schultz and Sorrell 2022, "Securing Approximate Homomorphic Encryption Using Differential Privacy"). Here t
is of all elements of a step together, so that τ counts steps; `ledger` adds up what steps with other noise have told.
Where no ν can be afforded, σ is a multiple of the error an element, for which no theorem speaks.

The noise follows from the key, whose entropy is the system's, and the exact values: the same step sent again has the
same noise, and any other has noise of its own. What is computed on ciphertexts is not known here.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Annotated, Final

import numpy as np
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray

from clients.encrypted.keys import OwnerKeys
from clients.encrypted.ledger import Charge, ReleaseLedger
from strategies.privacy.noise import gaussian
from strategies.ranges import Ranged

_TAG_BYTES: Final = 16

Gradients = Mapping[str, NDArray[np.floating]]


@dataclass(frozen=True)
class Flooding(Ranged):
    """How much noise, and for how many steps.

    Attributes:
        noise_bits: ν, the statistical security that is left after `decryptions` steps; None for a noise that no theorem
            speaks for, `multiple`.
        decryptions: τ, the steps that may be released under one key.
        multiple: without ν: the noise of an element, in bounds of its error, t / √elements.
    """

    noise_bits: Annotated[float, Ge(0), Le(64)] | None = None
    decryptions: Annotated[int, Ge(1), Le(1 << 40)] = 4096
    multiple: Annotated[float, Ge(1)] = 1.0

    def deviation(self, bound: float, elements: int) -> float:
        """σ of each element.

        Args:
            bound: t, of the norm of the error of all elements.
            elements: of all that a step releases.

        Raises:
            ValueError: the bound is no positive number, or there are no elements.
        """
        if not (isfinite(bound) and bound > 0) or elements < 1:
            raise ValueError(f"a bound of {bound:g} for {elements} elements covers nothing")
        if self.noise_bits is None:
            return self.multiple * bound / sqrt(elements)
        return sqrt(12 * self.decryptions) * 2 ** (self.noise_bits / 2) * bound

    def describe(self) -> str:
        """What it promises."""
        if self.noise_bits is None:
            return (
                f"noise of {self.multiple:g} times the error of an element on decrypted gradients, for"
                f" {self.decryptions} steps a key: no theorem speaks for it"
            )
        return (
            f"noise on decrypted gradients for {self.noise_bits:g} bits of statistical security after"
            f" {self.decryptions} steps a key"
        )


@dataclass(frozen=True)
class Release:
    """An owner's key, and what of it may still be told.

    Attributes:
        keys: whose noise it is.
        ledger: the key's.
        flooding: how much noise.
        bound: t, of the norm of a step's error; `noise.ErrorModel.bound`.
    """

    keys: OwnerKeys
    ledger: ReleaseLedger
    flooding: Flooding
    bound: Annotated[float, Gt(0)]

    def __call__(self, gradients: Gradients) -> dict[str, NDArray[np.float64]]:
        """What may be told of a step's decrypted values: all of it, metrics of them too, in one call.

        The ledger is charged first. A step that was released before is not charged again.

        Raises:
            Refused: `worn`: the key has told what it may.
            ValueError: there is nothing to release, or a value is not finite.
            OSError: the ledger can't be written.
        """
        names = sorted(gradients)
        values = [np.asarray(gradients[name], np.float64) for name in names]
        if not all(np.isfinite(value).all() for value in values):
            raise ValueError("a decrypted value is not finite")
        size = sum(value.size for value in values)
        sigma = self.flooding.deviation(self.bound, size)
        seed = self._seed(names, values, sigma)
        tag = self.keys.derive("flooding ledger", seed, _TAG_BYTES).hex()
        cost = 12 * (self.bound / sigma) ** 2
        told = self.flooding
        self.ledger.charge(Charge(tag, cost, told.decryptions, told.noise_bits))
        noise = gaussian(size, lambda length: self.keys.derive("flooding", seed, length)) * sigma
        ends = np.cumsum([value.size for value in values])[:-1]
        parts = np.split(noise, ends)
        return {
            name: value + part.reshape(value.shape)
            for name, value, part in zip(names, values, parts, strict=True)
        }

    def _seed(self, names: list[str], values: list[NDArray[np.float64]], sigma: float) -> bytes:
        """Another one for each other value, name, shape or σ: noise that was used for two would cancel."""
        hashed = hashlib.sha256(struct.pack("<d", sigma))
        for name, value in zip(names, values, strict=True):
            hashed.update(repr((name, value.shape)).encode())
            hashed.update(np.ascontiguousarray(value).data)
        return hashed.digest()
