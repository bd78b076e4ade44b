"""The audit of one run from beginning to end: what is tried, in which order, and what is written down of it.

`audit.json` holds every figure with its confidence, beside what the run promises. An attack that stays below a promise
proves nothing: a better one may not. An attack whose bound lies above it has shown the promise wrong, or is one of the
few in a hundred that its confidence allows for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from filelock import FileLock, Timeout

from clients.threads import one_thread
from fl_app.audit.canaries import audit_clients
from fl_app.audit.inversion import invert
from fl_app.audit.membership import audit_examples
from fl_app.audit.pictures import draw
from fl_app.audit.target import Promise, Target, Unit
from fl_app.audit.training import Progress
from fl_app.config.faults import ConfigError, Fault
from fl_app.services.files import write_atomically

DOCUMENT, PICTURE = "audit.json", "inversion.png"
DEFAULT_CANARIES, DEFAULT_SHADOWS, PICTURES = 128, 4, 4

Begin = Callable[[str], Progress]
"""Told what begins; gives what is told of its steps."""


@dataclass(frozen=True)
class Plan:
    """What an audit tries.

    Attributes:
        membership: attacks on examples.
        shadows: shadow models for them; 0 for the loss attack alone.
        canaries: canary clients; 0 for none.
        inversion: pictures from single updates.
        confidence: of every bound and interval, each for itself.
    """

    membership: bool = False
    shadows: int = 0
    canaries: int = 0
    inversion: bool = False
    confidence: float = 0.95


def default_plan(target: Target, confidence: float) -> Plan:
    """The loss attack; canaries where the run promises something to clients, or clips them."""
    promised = target.promise is not None and target.promise.covers("client")
    canaries = DEFAULT_CANARIES if promised or target.config.clip is not None else 0
    return Plan(membership=True, canaries=canaries, confidence=confidence)


def conduct(target: Target, plan: Plan, begin: Begin) -> dict[str, Any]:
    """Does what the plan says, and writes audit.json; of parts that are not tried it keeps what is there.

    Args:
        target: the run.
        plan: what is tried.
        begin: told of each part.

    Returns:
        The document.

    Raises:
        ConfigError: another audit of the run is going on, or a part can't be tried on this run.
        AuditError: a part failed.
        OSError: the run's folder can't be written.
    """
    target.folder.mkdir(exist_ok=True)
    lock = FileLock(target.folder / ".lock", timeout=0)
    try:
        # One thread: OpenMP's would not survive the fork of the engine's workers, which come later.
        with lock, one_thread():
            found = _parts(target, plan, begin)
            document = {**_header(target, plan), **_kept(target), **found}
            document["verdicts"] = verdicts(document, target.promise)
            text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)
            write_atomically(target.folder / DOCUMENT, text.encode() + b"\n")
    except Timeout:
        said = f"{target.folder}: another audit of this run is going on; wait for it"
        raise ConfigError([Fault("RUN", said)]) from None
    return document


def _parts(target: Target, plan: Plan, begin: Begin) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if plan.canaries:
        people = f"{target.num_clients} + {plan.canaries} clients"
        progress = begin(f"canaries: {target.rounds} rounds with {people}")
        audited = audit_clients(
            target, plan.canaries, confidence=plan.confidence, progress=progress
        )
        found["canaries"] = audited.to_dict()
    if plan.membership:

        def shadow(number: int) -> Progress:
            return begin(f"shadow {number + 1} of {plan.shadows}: {target.rounds} rounds")

        attacked = audit_examples(target, plan.shadows, confidence=plan.confidence, progress=shadow)
        found["membership"] = attacked.to_dict()
    if plan.inversion:
        inverted = invert(target, PICTURES, progress=begin(f"inversion of {PICTURES} updates"))
        draw(inverted, target.folder / PICTURE)
        found["inversion"] = inverted.to_dict()
    return found


def _header(target: Target, plan: Plan) -> dict[str, Any]:
    promise = target.promise
    return {
        "run": str(target.path),
        "run_id": target.summary.get("run_id"),
        "config_hash": target.summary.get("config_hash"),
        "confidence": plan.confidence,
        "promise": None if promise is None else promise.to_dict(),
    }


def _kept(target: Target) -> dict[str, Any]:
    """Parts of an earlier audit of the same run."""
    parts: dict[str, Any] = dict.fromkeys(("canaries", "membership", "inversion"))
    try:
        earlier = json.loads((target.folder / DOCUMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return parts
    if not isinstance(earlier, dict) or earlier.get("run_id") != target.summary.get("run_id"):
        return parts
    return {name: earlier.get(name) for name in parts}


Judgement = Literal["no promise", "within the promise", "above the promise"]


def verdicts(document: dict[str, Any], promise: Promise | None) -> list[dict[str, Any]]:
    """Each lower bound on ε beside the promise for the same unit.

    One bound for each unit decides, named before anything is tried: of the best of several, each at 95%, nobody could
    say that it is right 95 times in 100.

    Args:
        document: with `canaries` and `membership`, either of them None where it was not tried.
        promise: the run's.
    """
    bounds: list[tuple[Unit, str, bool, dict[str, Any]]] = []
    if (canaries := document.get("canaries")) is not None:
        bounds.append(("client", "canaries, versions", True, canaries["versions"]))
        bounds.append(("client", "canaries, final", False, canaries["final"]))
    if (membership := document.get("membership")) is not None:
        lira = membership["lira"]
        bounds.append(("example", "membership, loss", lira is None, membership["loss"]))
        if lira is not None:
            bounds.append(("example", "membership, LiRA", True, lira))
    return [
        {
            "unit": unit,
            "attack": attack,
            "decides": decides,
            "epsilon_lower_bound": one["epsilon_lower_bound"],
            "confidence": one["confidence"],
            "promised_epsilon": promise.epsilon if promise and promise.covers(unit) else None,
            "verdict": _judged(one["epsilon_lower_bound"], unit, promise),
        }
        for unit, attack, decides, one in bounds
    ]


def _judged(bound: float, unit: Unit, promise: Promise | None) -> Judgement:
    if promise is None or not promise.covers(unit):
        return "no promise"
    return "above the promise" if bound > promise.epsilon else "within the promise"


def refuted(document: dict[str, Any]) -> bool:
    """Whether a bound that decides lies above the promise."""
    return any(
        one["decides"] and one["verdict"] == "above the promise" for one in document["verdicts"]
    )
