"""What makes a run this run: its configuration without where, for how long and with how many hands it runs.

Works on plain mappings, as a configuration gives of itself and as a summary holds one of an earlier run; so a run that
is taken up, a report that groups runs by seed and a client that compares hashes mean the same by the same run. Must not
know the schema: a configuration of another version is compared too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from fl_app.config.faults import shown

BESIDE_IDENTITY: Final = (
    "rounds",
    "output_dir",
    "resume",
    "run_name",
    "experiment",
    "runtime.workers",
    "compute",
    "checkpoint",
    "memory.limit_mb",
    "retry.backoff_seconds",
    "admission.max_reply_mb",
)
"""Dotted paths of what another run of the same identity may have otherwise, with all below them."""


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths to plain values of a configuration, without what is beside its identity."""
    beside = [
        path for path in BESIDE_IDENTITY if path != "rounds" or not rounds_are_planned(config)
    ]
    return {
        path: value
        for path, value in _flat(config, "").items()
        if not any(path == skipped or path.startswith(f"{skipped}.") for skipped in beside)
    }


def rounds_are_planned(config: Mapping[str, Any]) -> bool:
    """Whether noise is found for so many rounds: another number of them is another run."""
    privacy = config.get("privacy")
    if not isinstance(privacy, Mapping):
        return False
    return privacy.get("target_epsilon") is not None and privacy.get("noise_multiplier") is None


def digest(found: Mapping[str, Any]) -> str:
    """SHA-256, in hex, over the canonical JSON of an identity: keys sorted, floats by their shortest repr."""
    text = json.dumps(found, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def difference(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What two identities have otherwise: lines `path: mine → theirs`, sorted by path; none where they are the same."""
    return [
        f"{path}: {_said(mine, path)} → {_said(theirs, path)}"
        for path in sorted(mine.keys() | theirs.keys())
        if path not in mine or path not in theirs or _differ(mine[path], theirs[path])
    ]


def _flat(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        inner = (_flat(item, f"{path}.{key}" if path else str(key)) for key, item in value.items())
        return {key: leaf for part in inner for key, leaf in part.items()}
    return {path: value}


def _differ(first: Any, second: Any) -> bool:
    return json.dumps(first, sort_keys=True) != json.dumps(second, sort_keys=True)


def _said(values: Mapping[str, Any], path: str) -> str:
    return shown(values[path]) if path in values else "(not set)"
