"""What a device asks of the noise on what it decrypts: its operator's word, never that of a run's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from clients.encrypted.flooding import Flooding
from strategies.ranges import Ranged
from strategies.secagg.policy import numbers_in

LEAST_NOISE, LEAST_MULTIPLE, MOST_DECRYPTIONS = (
    "encrypted-least-noise-bits", "encrypted-least-multiple", "encrypted-most-decryptions",
)  # fmt: skip
"""A SuperNode's node config."""


@dataclass(frozen=True)
class Conditions(Ranged):
    """A device's own conditions; by default the settings' own defaults.

    Attributes:
        least_noise_bits: ν below which it tells nothing of what it decrypts; None where a run need not promise any.
        least_multiple: the least `Flooding.multiple` of a run that promises no ν.
        most_decryptions: the largest τ that a run may count on.

    Raises:
        ValueError: a condition is out of its range.
    """

    least_noise_bits: Annotated[float, Ge(0), Le(64)] | None = Flooding.noise_bits
    least_multiple: Annotated[float, Ge(1)] = Flooding.multiple
    most_decryptions: Annotated[int, Ge(1)] = Flooding.decryptions

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> Conditions:
        """Those in a node config.

        Raises:
            ValueError: one is no number, or out of its range.
        """
        names = {
            LEAST_NOISE: "least_noise_bits", LEAST_MULTIPLE: "least_multiple", MOST_DECRYPTIONS: "most_decryptions",
        }  # fmt: skip
        return cls(**numbers_in(settings, names, whole={MOST_DECRYPTIONS}))

    def check(self, flooding: Flooding | None) -> None:
        """Holds a run's flooding against them.

        Raises:
            ValueError: one is not met; the message names it, and the mend.
        """
        if flooding is None:
            raise ValueError(
                "the run's client.flooding=null tells exact decrypted values, and with them of the key: no device does;"
                " start the run without it"
            )
        bits, least = flooding.noise_bits, self.least_noise_bits
        if least is not None and (bits is None or bits < least):
            raise _unmet("noise_bits", bits, LEAST_NOISE, least)
        if bits is None and flooding.multiple < self.least_multiple:
            raise _unmet("multiple", flooding.multiple, LEAST_MULTIPLE, self.least_multiple)
        if flooding.decryptions > self.most_decryptions:
            raise _unmet(
                "decryptions", flooding.decryptions, MOST_DECRYPTIONS, self.most_decryptions
            )


def _unmet(name: str, value: float | None, key: str, own: float) -> ValueError:
    told = "null" if value is None else f"{value:g}"
    return ValueError(
        f"the run's client.flooding.{name}={told} does not meet this device's {key}={own:g}: start the run with"
        f" client.flooding.{name}={own:g}, or the SuperNode with another {key}"
    )
