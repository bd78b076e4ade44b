"""What a device's operator has decided: a SuperNode's node config, held against what a run asks of the device.

A run's configuration is the server's word. Which logical client this is, what it may send and tell of itself, what it
may take of the device's battery and memory, and where it keeps its secrets are in the node config alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clients.encrypted import conditions as encrypted
from clients.encrypted.trainer import EncryptedTrainer
from clients.leftovers import DAYS
from clients.power import LEAST_BATTERY, FilePower, PowerGuard, PowerSource, SystemPower
from clients.trainers import SGD, DpSgd
from strategies.ckks.conditions import LEAST_NOISE, LEAST_QUORUM, MOST_DECRYPTIONS
from strategies.ckks.member import CkksClient
from strategies.collectors import Ckks, Masked
from strategies.collectors.ckks import KEY_SETTING
from strategies.protocols import ClientHalf, Collector, ConfigValue
from strategies.secagg import MaskedClient
from strategies.secagg.policy import COLLUDERS, DROPOUTS, IDENTITY, LEAST_COHORT, ROSTER

PARTITION, FOLDER = "partition-id", "client-folder"
DP_EPSILON, DP_DELTA = "dp-epsilon", "dp-delta"
"""The most that the device's own examples may be charged, over all runs."""
OWNER_KEY = "encrypted-key"
DEVICE_PROFILE, POWER_FILE = "device-profile", "device-power-file"
LEAST_CHARGE, MEMORY = "device-least-battery", "device-memory-mb"
HALF_DONE_DAYS = "device-half-done-days"
_OURS = ("secagg-", "ckks-", "client-", "device-", "dp-", "encrypted-")
_HIDING = ("secagg-", "ckks-")
_SECAGG = {ROSTER, IDENTITY, LEAST_COHORT, DROPOUTS, COLLUDERS}
_CKKS = {KEY_SETTING, LEAST_QUORUM, LEAST_NOISE, MOST_DECRYPTIONS}
_ENCRYPTED = {
    OWNER_KEY, encrypted.LEAST_NOISE, encrypted.LEAST_MULTIPLE, encrypted.MOST_DECRYPTIONS,
}  # fmt: skip
_DEVICE = {DEVICE_PROFILE, POWER_FILE, LEAST_CHARGE, MEMORY, HALF_DONE_DAYS}
KNOWN = frozenset(_SECAGG | _CKKS | _ENCRYPTED | _DEVICE | {FOLDER, DP_EPSILON, DP_DELTA})
"""All settings that are ours, but for the one that says which client it is."""


@dataclass(frozen=True)
class Node:
    """A SuperNode's node config.

    Attributes:
        settings: as it was given.

    Raises:
        ValueError: it does not say which client this is, has a setting of ours that there is not, or one about the
            device that is out of its range.
    """

    settings: Mapping[str, ConfigValue]

    def __post_init__(self) -> None:
        client = self.settings.get(PARTITION)
        if type(client) is not int or client < 0:
            raise ValueError(
                f"this SuperNode's {PARTITION} is {client!r}: start it with --node-config '{PARTITION}=0' (1, 2, …)"
            )
        # A name with a slip in it would leave the device open to what its operator meant to forbid.
        unknown = sorted(key for key in self.settings if key.startswith(_OURS) and key not in KNOWN)
        if unknown:
            raise ValueError(
                f"the node config has no setting {unknown[0]}: {', '.join(sorted(KNOWN))} are there"
            )
        # Looked at now: whoever reads them later answers a server, who should not see what is in them.
        _ = self.tells_profile, self.pause, self.memory, self.half_done_days

    @property
    def client(self) -> int:
        """The one logical client that this device is."""
        value = self.settings[PARTITION]
        assert isinstance(value, int)
        return value

    @property
    def folder(self) -> Path:
        """Where this device keeps what secure sums must remember: the same in every run, or "once" would be once a run.

        Raises:
            ValueError: the setting is no absolute path.
        """
        named = self.settings.get(FOLDER)
        if named is None:
            state = Path(os.environ.get("XDG_STATE_HOME", ""))
            if not state.is_absolute():  # as its specification asks
                state = Path.home() / ".local" / "state"
            return state / "trellis" / "clients"
        return _absolute(FOLDER, named, "/var/lib/trellis")

    @property
    def owner_key(self) -> Path | None:
        """The file of this device's secret key of encrypted training; None for one in its folder.

        Raises:
            ValueError: the setting is no absolute path.
        """
        named = self.settings.get(OWNER_KEY)
        return None if named is None else _absolute(OWNER_KEY, named, "/etc/owner.key")

    @property
    def tells_profile(self) -> bool:
        """Whether a server may learn the device's classes (`strategies.profiles`): only where its operator says so.

        Raises:
            ValueError: the setting is neither true nor false.
        """
        told = self.settings.get(DEVICE_PROFILE, False)
        if not isinstance(told, bool):
            raise ValueError(
                f"the node config's {DEVICE_PROFILE} is {told!r}: true or false is needed, without quotes"
            )
        return told

    @property
    def power(self) -> PowerSource:
        """What tells of the device's battery.

        Raises:
            ValueError: the setting of its file is no absolute path.
        """
        named = self.settings.get(POWER_FILE)
        if named is None:
            return SystemPower()
        return FilePower(_absolute(POWER_FILE, named, "/run/battery.json"))

    @property
    def pause(self) -> PowerGuard | None:
        """What has training wait while the battery is low; None where the operator has switched that off.

        Raises:
            ValueError: a setting is out of its range.
        """
        least = _number(self.settings, LEAST_CHARGE, LEAST_BATTERY)
        if not 0 <= least <= 100:
            raise ValueError(
                f"the node config's {LEAST_CHARGE} is {least:g}: percent from 0 (off) to 100 are needed"
            )
        source = self.power  # looked at in any case: a slip in its path is told at once
        return PowerGuard(source, least=least) if least else None

    @property
    def memory(self) -> int | None:
        """Bytes that a training's batch may take at most; None where only what is free counts.

        Raises:
            ValueError: the setting is no number above 0.
        """
        if MEMORY not in self.settings:
            return None
        if not (megabytes := _number(self.settings, MEMORY, 0.0)) > 0:
            raise ValueError(
                f"the node config's {MEMORY} is {megabytes:g}: a number above 0 is needed, of MB"
            )
        return int(megabytes * 1_000_000)

    @property
    def half_done_days(self) -> float:
        """Days for which work that was cut off is kept on the device.

        Raises:
            ValueError: the setting is no number above 0.
        """
        if not (days := _number(self.settings, HALF_DONE_DAYS, DAYS)) > 0:
            raise ValueError(
                f"the node config's {HALF_DONE_DAYS} is {days:g}: a number above 0 is needed, of days"
            )
        return days

    @property
    def pinned(self) -> str | None:
        """The setting that keeps this device from sending anything in clear, None where none does."""
        if ROSTER in self.settings:
            return ROSTER
        return next((key for key in sorted(self.settings) if key.startswith(_HIDING)), None)

    def admit_trainer(self, trainer: SGD) -> None:
        """Holds a run's trainer against what the operator lets be told of the device's examples, and of its key.

        Raises:
            ValueError: the run may charge them more, or protects them by less noise or none; or a setting is no number
                in its range.
        """
        if isinstance(trainer, EncryptedTrainer):
            encrypted.Conditions.of(self.settings).check(trainer.flooding)
        most: dict[str, float] = {}
        for key in (DP_EPSILON, DP_DELTA):
            if (value := self.settings.get(key)) is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(
                    f"the node config's {key} is {value!r}: a number above 0 is needed"
                )
            most[key] = float(value)
        if not most:
            return
        if not isinstance(trainer, DpSgd) or trainer.reproducible_noise:
            raise ValueError(
                f"the node config's {next(iter(most))} keeps this device to training under noise: start the run with"
                f" client=dp_sgd client.reproducible_noise=false, or the SuperNode without it"
            )
        asked = {DP_EPSILON: trainer.target_epsilon, DP_DELTA: trainer.delta}
        for key, limit in most.items():
            found, name = asked[key], "target_epsilon" if key == DP_EPSILON else "delta"
            if found is None or found > limit:
                raise ValueError(
                    f"the run's client.{name} is {found}, and the node config's {key} allows {limit:g} at most"
                )

    def admit(self, collector: Collector, half: ClientHalf) -> None:
        """Holds a run's collector against what the operator has pinned.

        Args:
            collector: the run's.
            half: what it made for this device: what will be sent is the half's doing.

        Raises:
            ValueError: it would send what the operator does not want to be seen.
        """
        if self.pinned == ROSTER:
            malicious = isinstance(collector, Masked) and collector.malicious
            if not malicious or type(half) is not MaskedClient:
                raise ValueError(
                    f"the node config's {ROSTER} keeps this device to sums in the malicious mode: start the run with"
                    f" collector=masked collector.malicious=true, or the SuperNode without {ROSTER}"
                )
        elif self.pinned is not None:
            hides = isinstance(collector, (Masked, Ckks)) and type(half) in (
                MaskedClient,
                CkksClient,
            )
            if not hides:
                raise ValueError(
                    f"the node config's {self.pinned} keeps this device from sending updates in clear: start the run"
                    f" with collector=masked or collector=ckks, or the SuperNode without {self.pinned}"
                )


def _absolute(setting: str, named: ConfigValue, example: str) -> Path:
    path = Path(named).expanduser() if isinstance(named, str) else Path()
    if not path.is_absolute():
        raise ValueError(
            f'the node config\'s {setting} is {named!r}: an absolute path is needed, such as "{example}"'
        )
    return path


def _number(settings: Mapping[str, ConfigValue], name: str, default: float) -> float:
    """A setting's finite number."""
    value = settings.get(name, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value):  # type: ignore[arg-type]
        raise ValueError(f"the node config's {name} is {value!r}: a number is needed")
    return float(value)  # type: ignore[arg-type]
