"""What a server may learn of a device: one of a few classes for each of five things, and nothing finer.

A device tells them with its answer to a hello, and only where its operator agreed. The vocabulary is closed: whatever
else a peer puts into the record is left out unread, so that it can neither fill the server's memory nor find its way
into a log. Classes are wide on purpose: five of them tell at most 360 kinds of devices apart, where exact numbers of
bytes would tell one device from all others. What a device says is its own word, which nobody can check: nothing that
protects others may rest on it. This file knows neither how a device measures itself (`clients.device`) nor who asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from flwr.app import ConfigRecord, RecordDict

from strategies.records import record_in

DEVICE: Final = "device"
"""The record of a hello's answer that holds a profile."""

VOCABULARY: Final[Mapping[str, tuple[str, ...]]] = {
    "cores": ("1-2", "3-4", "5-8", "9+"),
    "memory": ("<2", "2-4", "4-8", "8-16", "16+"),
    "power": ("mains", "battery", "low"),
    "network": ("unmetered", "metered", "unknown"),
    "gpu": ("none", "yes"),
}
"""All that can be said, by what it is said of: cores, memory in GiB, power, network, GPU."""


def pack_profile(profile: Mapping[str, str]) -> ConfigRecord:
    """A profile as it travels.

    Raises:
        ValueError: it says anything that is not in the vocabulary; names it.
    """
    for key, value in profile.items():
        if value not in VOCABULARY.get(key, ()):
            raise ValueError(f"a device's profile says {key}={value!r}, which is no class of it")
    return ConfigRecord(dict(profile))


def read_profile(content: RecordDict) -> dict[str, str]:
    """What an answer to a hello tells of its device; empty where it tells nothing.

    Args:
        content: a peer's: only the vocabulary's keys are looked up, and only its words taken.
    """
    record = record_in(content, DEVICE, ConfigRecord)
    if record is None:
        return {}
    found: dict[str, str] = {}
    for key, words in VOCABULARY.items():
        said = record.get(key)
        # The vocabulary's own word is kept, and not the peer's object.
        found.update((key, word) for word in words if isinstance(said, str) and said == word)
    return found


def told(profiles: Iterable[Mapping[str, str]]) -> str:
    """How many devices are of each class, in a line, such as `cores 3-4: 2, 9+: 1; gpu none: 3`; empty for none."""
    counts: Counter[tuple[str, str]] = Counter()
    for profile in profiles:
        counts.update((key, word) for key, word in profile.items())
    parts = []
    for key, words in VOCABULARY.items():
        if there := [f"{word}: {counts[key, word]}" for word in words if counts[key, word]]:
            parts.append(f"{key} {', '.join(there)}")
    return "; ".join(parts)
