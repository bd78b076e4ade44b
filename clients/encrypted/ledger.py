"""What a secret key has told so far, in a file beside the key's own: who has the key has the ledger.

A release with noise of deviation σ over an error of norm t costs 12 t² / σ². Kullback-Leibler divergences of Gaussians
add up, so that ν bits of statistical security are left while the costs of all releases under the key, whatever the
noise of each, sum to 2^-ν at the most (Li, Micciancio, Schultz and Sorrell 2022, "Securing Approximate Homomorphic
Encryption Using Differential Privacy": their σ = √(12 τ) 2^(ν/2) t is τ equal ones). What was told stays told: a
release that would break a promise, this run's or an earlier one's, is refused. Where nothing is promised, steps count.

Nothing here knows a key, noise, or what is released.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from math import fsum, inf
from pathlib import Path
from typing import Final

from filelock import FileLock

from strategies.wire import Refused

_SUFFIX: Final = ".ledger"
_RELEASED, _EXACT, _NONE = "released", "exact", "-"
_SLACK: Final = 1 + 2.0**-30
"""For the rounding of costs, each of which is a 64-bit number."""


@dataclass(frozen=True)
class Charge:
    """One release.

    Attributes:
        tag: its name; what is released again under it is the same, and tells nothing new.
        cost: 12 t² / σ².
        decryptions: τ, of the run that releases it.
        noise_bits: ν that the run promises; None for none.
    """

    tag: str
    cost: float
    decryptions: int
    noise_bits: float | None = None

    def words(self) -> tuple[str, ...]:
        """As a line of the ledger."""
        bits = _NONE if self.noise_bits is None else repr(self.noise_bits)
        return self.tag, repr(self.cost), bits, str(self.decryptions)

    @classmethod
    def of(cls, words: tuple[str, ...]) -> Charge:
        """From a line; raises ValueError where it is none."""
        tag, cost, bits, decryptions = words
        return cls(tag, float(cost), int(decryptions), None if bits == _NONE else float(bits))


class ReleaseLedger:
    """One key's.

    Args:
        key_file: the key's, which may be a link to it.
        fingerprint: the key's.

    Attributes:
        path: the ledger's file.
    """

    def __init__(self, key_file: Path, fingerprint: str) -> None:
        key_file = key_file.resolve()
        self.path = key_file.with_name(key_file.name + _SUFFIX)
        self._fingerprint = fingerprint

    def check(self) -> None:
        """Whether it can be kept at all: better asked before the work than after it.

        Raises:
            Refused: `key`: it can't be understood.
            OSError: the key's folder can't be written, or the ledger not read.
        """
        with self._locked():
            self._read()

    def charge(self, charge: Charge) -> None:
        """Takes note of a release, before it is told; one that was told before is not charged again.

        Raises:
            Refused: `worn`: the key has told what it may. `key`: the ledger can't be understood.
            OSError: it can't be read or written.
        """
        with self._locked():
            exact, charges = self._read()
            if any(one.tag == charge.tag for one in charges):
                return
            charges.append(charge)
            if sum(Fraction(1, one.decryptions) for one in charges) > 1:
                raise Refused(
                    "worn",
                    f"one more step under this key exceeds the {charge.decryptions} that it may tell:"
                    " make a new key, and encrypt anew",
                )
            self._keep_promises(exact, charges)
            self._record(_RELEASED, *charge.words())

    def charge_exact(self) -> None:
        """Takes note that values without noise are told: no ν can be promised of the key from then on.

        Raises:
            Refused: as `charge`; `worn`, where a ν was promised.
            OSError: as `charge`.
        """
        with self._locked():
            exact, charges = self._read()
            if not exact:
                self._keep_promises(True, charges)
                self._record(_EXACT)

    def _keep_promises(self, exact: bool, charges: list[Charge]) -> None:
        promised = [one.noise_bits for one in charges if one.noise_bits is not None]
        spent = inf if exact else fsum(one.cost for one in charges)
        if promised and spent > 2 ** -max(promised) * _SLACK:
            raise Refused(
                "worn",
                f"{max(promised):g} bits of statistical security are promised of this key, and with this step it would"
                " have told more than they allow: make a new key, and encrypt anew",
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone with the file: two owners of a key must not both find that there is room for one."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock"), mode=0o600):
            yield

    def _read(self) -> tuple[bool, list[Charge]]:
        """Whether exact values were told, and what else was."""
        try:
            lines = self.path.read_text().splitlines()
        except FileNotFoundError:
            return False, []
        exact, charges = False, list[Charge]()
        for line in lines:
            kind, *words = line.split() or [""]
            if not words or words[0] != self._fingerprint:
                continue  # another key lay here before; or it was cut off as it was written, and nothing told
            if kind == _EXACT:
                exact = True
            elif kind == _RELEASED and len(words) == len(Charge.__dataclass_fields__) + 1:
                try:
                    charges.append(Charge.of(tuple(words[1:])))
                except ValueError as error:
                    raise Refused("key", f"{self.path} holds no ledger: {error}") from error
        return exact, charges

    def _record(self, kind: str, *words: str) -> None:
        """Adds a line, and waits until it is on the disk."""
        # The line break stands first: a line that was cut off by a full disk does not spoil the next one.
        line = "\n" + " ".join((kind, self._fingerprint, *words))
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            if os.write(handle, line.encode()) < len(line):
                raise OSError(f"{self.path} could not be written in full")
            os.fsync(handle)
        finally:
            os.close(handle)
