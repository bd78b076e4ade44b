"""The audit of a split run from beginning to end: each attack in turn until its time is over, and what is written down.

`split.json` holds every score by itself, with its number of trials, its interval and what a guess would get; no total
is made of them. What can't be tried on a run is named with the reason, and what there was no time for is named, too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from filelock import FileLock, Timeout

from clients.threads import one_thread
from fl_app.audit.conduct import Begin
from fl_app.audit.split.exposure import Exposure, NotApplicableError, Sizes, Wire
from fl_app.audit.split.pictures import draw
from fl_app.audit.split.reading import inverted, looked_up, spanned
from fl_app.audit.split.score import Score
from fl_app.audit.split.watching import labelled, norms, senders
from fl_app.audit.target import Target
from fl_app.audit.training import Progress
from fl_app.config.faults import ConfigError, Fault
from fl_app.services.files import write_atomically

DOCUMENT, PICTURE = "split.json", "split.png"

Attack = Callable[[Progress], list[Score]]

_LADDER = (0.5, 1.0, 2.0, 4.0)
"""Standard deviations that are tried beside the run's own."""


def conduct(target: Target, sizes: Sizes, begin: Begin, confidence: float = 0.95) -> dict[str, Any]:
    """Attacks what the run exposes, and writes split.json and split.png.

    Args:
        target: a run of a split model.
        sizes: how much is tried, and for how long.
        begin: told of each part.
        confidence: of every interval, each for itself.

    Returns:
        The document.

    Raises:
        ConfigError: the run's model is not cut, or another audit of the run is going on.
        OSError: the run's folder can't be written.
    """
    target.folder.mkdir(exist_ok=True)
    lock = FileLock(target.folder / ".lock", timeout=0)
    try:
        with lock, one_thread():
            exposure = Exposure(target, sizes)
            document = {**_header(exposure, confidence), **_tried(exposure, begin, confidence)}
            text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)
            write_atomically(target.folder / DOCUMENT, text.encode() + b"\n")
            write_atomically(target.folder / PICTURE, draw(document))
    except Timeout:
        said = f"{target.folder}: another audit of this run is going on; wait for it"
        raise ConfigError([Fault("RUN", said)]) from None
    return document


def wires_of(own: Wire) -> list[Wire]:
    """What is tried in turn: the run's own wire first, then none, noise from little to much, and eight bits."""
    bare = Wire(nopeek=own.nopeek)
    others = [bare, *(Wire(noise=noise, nopeek=own.nopeek) for noise in _LADDER)]
    others.append(Wire(precision="int8", nopeek=own.nopeek))
    return [own, *(wire for wire in others if wire != own)]


def cuts_of(at: int, blocks: int) -> list[int]:
    """Cuts that are tried beside the run's: the first, the last, and those in the middle of what is between."""
    wanted = {1, at, blocks - 1, (1 + at) // 2, (at + blocks - 1) // 2}
    return sorted(
        (cut for cut in wanted if cut != at), key=lambda cut: (cut not in (1, blocks - 1), cut)
    )


def _attacks(exposure: Exposure, confidence: float) -> list[tuple[str, Attack]]:
    """What is tried, in this order: what says most of the run itself comes first."""
    at, wires = exposure.at, wires_of(exposure.wire)
    own = wires[:1] if exposure.wire == Wire(nopeek=exposure.wire.nopeek) else wires[:2]
    bits = [wire for wire in wires if wire.precision == "int8" and wire not in own][:1]
    named: list[tuple[str, Attack]] = [
        (
            f"learned inverter at cut {at}",
            lambda told: inverted(exposure, at, wires, confidence, told),
        ),
        ("span check", lambda told: spanned(exposure, confidence, told)),
        ("labels from gradients", lambda told: labelled(exposure, own + bits, confidence, told)),
        ("senders of updates", lambda told: senders(exposure, confidence, told)),
        (
            f"dictionary at cut {at}",
            lambda told: looked_up(exposure, at, wires, confidence, told),
        ),
    ]
    for cut in cuts_of(at, exposure.module().blocks):
        attack = partial(inverted, exposure, cut, own, confidence)
        named.append((f"learned inverter at cut {cut}", attack))
    if at != 1:
        named.append(("dictionary at cut 1", partial(looked_up, exposure, 1, own, confidence)))
    return named


def _tried(exposure: Exposure, begin: Begin, confidence: float) -> dict[str, Any]:
    began, scores = time.monotonic(), list[Score]()
    refused = {"reconstruction of pictures": "the split model takes tokens, and no pictures"}
    late: list[str] = []
    found: dict[str, Any] = {}

    def is_time(name: str) -> bool:
        if time.monotonic() - began <= exposure.sizes.seconds:
            return True
        late.append(name)
        return False

    for name, attack in _attacks(exposure, confidence):
        if is_time(name):
            try:
                scores += attack(begin(name))
            except NotApplicableError as error:
                refused[name] = str(error)
    if is_time("gradient norms"):
        settings = wires_of(exposure.wire)
        found = norms(exposure, [settings[0], *settings[-2:]], begin("gradient norms"))
    return {
        "scores": [one.to_dict() for one in scores],
        "gradient_norms": found,
        "not_applicable": refused,
        "no_time_for": late,
        "seconds": round(time.monotonic() - began, 1),
    }


def _header(exposure: Exposure, confidence: float) -> dict[str, Any]:
    target, module = exposure.target, exposure.module()
    return {
        "run": str(target.path),
        "run_id": target.summary.get("run_id"),
        "config_hash": target.summary.get("config_hash"),
        "confidence": confidence,
        "cut": exposure.at,
        "blocks": module.blocks,
        "u_shaped": module.u_shaped,
        "wire": exposure.wire.name,
        "sizes": vars(exposure.sizes),
    }
