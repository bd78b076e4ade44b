"""What a device asks of encrypted sums, and how much its key may still open: its operator's word, never a server's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Final

from annotated_types import Ge, Le

from strategies.ckks.settings import CkksSettings
from strategies.ranges import Ranged
from strategies.secagg.policy import numbers_in
from strategies.secagg.vault import Ledger
from strategies.wire import Refused

LEAST_QUORUM, LEAST_NOISE, MOST_DECRYPTIONS = (
    "ckks-least-quorum", "ckks-least-noise-bits", "ckks-most-decryptions",
)  # fmt: skip
"""A SuperNode's node config."""

_OPENED: Final = "opened"
_WORDS: Final = 5


@dataclass(frozen=True)
class Conditions(Ranged):
    """A device's own conditions; by default the settings' own defaults.

    Attributes:
        least_quorum: members of a sum without which this device opens none.
        least_noise_bits: ν below which it opens none.
        most_decryptions: the largest τ that a run may count on.

    Raises:
        ValueError: a condition is out of its range.
    """

    least_quorum: Annotated[int, Ge(2)] = CkksSettings.quorum
    least_noise_bits: Annotated[float, Ge(0), Le(64)] = CkksSettings.noise_bits
    most_decryptions: Annotated[int, Ge(1)] = CkksSettings.decryptions

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> Conditions:
        """Those in a node config.

        Raises:
            ValueError: one is no number, or out of its range.
        """
        names = {
            LEAST_QUORUM: "least_quorum", LEAST_NOISE: "least_noise_bits", MOST_DECRYPTIONS: "most_decryptions",
        }  # fmt: skip
        return cls(**numbers_in(settings, names, whole={LEAST_QUORUM, MOST_DECRYPTIONS}))

    def check(self, settings: CkksSettings) -> None:
        """Holds a run's settings against them.

        Raises:
            ValueError: one is not met; the message names it, and the mend.
        """
        for name, key, own in (
            ("quorum", LEAST_QUORUM, self.least_quorum),
            ("noise_bits", LEAST_NOISE, self.least_noise_bits),
            ("decryptions", MOST_DECRYPTIONS, self.most_decryptions),
        ):
            value = getattr(settings, name)
            if (value > own) if key == MOST_DECRYPTIONS else (value < own):
                raise ValueError(
                    f"the run's collector.{name}={value:g} does not meet this device's {key}={own:g}: start the run"
                    f" with collector.{name}={own:g}, or the SuperNode with another {key}"
                )


class KeyLedger(Ledger):
    """What one device has opened under one key, in all runs.

    Noise is made for so many openings under a key: each of n ciphertexts takes n / τ of what the key may tell, τ being
    that of its own run.

    Args:
        folder: of all that the device remembers of encrypted sums.
        fingerprint: the key's.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        super().__init__(folder / f"key-{fingerprint}")

    def open(self, session: bytes, digest: str, ciphertexts: int, decryptions: int) -> None:
        """Takes note of a sum, before it is opened; one that was opened before tells nothing new.

        Raises:
            Refused: `worn`: the key has told what it may.
        """
        with self.locked():
            spent = Fraction(ciphertexts, decryptions)
            for entry in self.recorded():
                if len(entry) != _WORDS or entry[0] != _OPENED:
                    continue  # cut off as it was written: that sum was not opened
                if entry[1:3] == (session.hex(), digest):
                    return
                spent += Fraction(int(entry[3]), int(entry[4]))
            if spent > 1:
                raise Refused(
                    "worn",
                    f"{ciphertexts} more ciphertexts under this key exceed the {decryptions} that its noise is made"
                    " for: give all clients a new key",
                )
            self.record(_OPENED, session.hex(), digest, str(ciphertexts), str(decryptions))
