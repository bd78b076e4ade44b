"""What trial steps of a run come to: do they work, do they fit into memory, does the model learn.

The steps themselves are in `steps`, and are tried in a process of their own, so that one that takes all memory takes
nobody with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from clients.free_memory import free_bytes
from clients.tasks import Examples
from fl_app.checks.check import Finding
from fl_app.checks.plan import spoken
from fl_app.checks.steps import STEPS, Workload, evaluation, overfit, step
from fl_app.checks.trial import TrialError, tried
from fl_app.cli.console import human_bytes

_STEP_SECONDS: Final = 300.0
"""That a few steps may take before they are given up."""
_SEARCH_SECONDS: Final = 60.0
"""For learning a few examples by heart, at all learning rates together."""
_TIGHT: Final = 0.9
"""Of the memory that is available."""
_NOTHING: Final = 0.9
"""Of the first loss: who has not come below has learnt nothing."""


@dataclass(frozen=True)
class Steps:
    """What a few steps took.

    Attributes:
        bytes: of memory, the most at once beside what was there before.
        seconds: of a step of one client, on one thread.
        example_seconds: of one test example's evaluation, likewise.
        clients: that were trained at once.
    """

    bytes: int
    seconds: float
    example_seconds: float
    clients: int


def batch(
    workload: Workload, parts: Sequence[Examples], test_batch: int
) -> tuple[Finding, Steps | None]:
    """One mini-batch forward and backward, and what that takes; the evaluation beside it.

    Args:
        workload: of the run.
        parts: training examples of the clients that are trained at once, the largest ones.
        test_batch: examples of an evaluation at a time.
    """

    def work() -> dict[str, Any]:
        return {"step": step(workload, parts), "test": evaluation(workload, test_batch)}

    size = min(workload.trainer.batch_size, max(map(len, parts)))
    try:
        found = tried(work, seconds=_STEP_SECONDS)
    except TrialError as error:
        said = f"a mini-batch of {size} examples: {error}"
        if error.memory:
            return Finding("failed", said, lower_memory(size, len(parts))), None
        return Finding("failed", said, "mend the task or the model, or what the message says"), None
    took = Steps(
        int(found["step"]["bytes"]),
        float(found["step"]["seconds"]),
        float(found["test"]["seconds"]),
        len(parts),
    )
    loss = found["step"]["loss"]
    stand_in = f" ({workload.stand_in})" if workload.stand_in else ""
    together = f", {took.clients} clients at once" if took.clients > 1 else ""
    said = (
        f"a mini-batch of {size} forward and back{together}: {spoken(took.seconds)} a client"
        + ("" if loss is None else f", loss {loss:.4g}")
        + stand_in
    )
    if found["step"]["still"]:
        mend = "look at travel=, and at what of the model is frozen"
        return Finding("failed", f"{said}; no parameter that travels has moved", mend), took
    return Finding("ok", said), took


def memory(
    took: Steps, size: int, workers: int, server: int, each: int = 0, free: int | None = None
) -> Finding:
    """Whether memory suffices for all workers' largest mini-batch at once.

    Args:
        took: what one took.
        size: examples of the mini-batch.
        workers: that train at once.
        server: bytes that the server's side needs.
        each: bytes that each worker takes before it trains.
        free: bytes that are available; None to look.
    """
    free = free_bytes() if free is None else free
    needed = workers * (took.bytes + each) + server
    them = "1 worker" if workers == 1 else f"{workers} workers"
    said = (
        f"{human_bytes(needed)} of {human_bytes(free)} that are available: {them} at"
        f" {human_bytes(took.bytes + each)}, a mini-batch of {size} each"
        + (f" of {took.clients} clients" if took.clients > 1 else "")
        + f", and {human_bytes(server)} for the server"
    )
    if needed <= _TIGHT * free:
        return Finding("ok", said)
    mend = lower_memory(size, took.clients, workers)
    return Finding("failed" if needed > free else "warning", said, mend)


def lower_memory(size: int, clients: int, workers: int = 1) -> str:
    """The settings that make a mini-batch take less."""
    ways = [f"client.batch_size={max(1, size // 2)}"]
    if workers > 1:
        ways.append(f"runtime.workers={max(1, workers // 2)}")
    if clients > 1:
        ways.append("runtime.batch_clients=off")
    return f"set {' or '.join(ways)}"


def learns(workload: Workload, seed: int, seconds: float = _SEARCH_SECONDS) -> Finding:
    """Whether the model learns a few examples by heart, at the trainer's own learning rate or at which other.

    Args:
        workload: of the run, whose trainer takes local steps of its own.
        seed: of the draw.
        seconds: for all learning rates together.
    """
    try:
        found = tried(lambda: overfit(workload, seed, seconds), seconds=2 * seconds + 60)
    except TrialError as error:
        return Finding("failed", f"learning a few examples by heart: {error}", "mend what it says")
    own, others = found["own"], found["others"]
    told = _progress(own, found["examples"])
    if own["learnt"]:
        return Finding("ok", told)
    better = next((other for other in others if other["learnt"]), None)
    if better is not None:
        mend = f"client.lr={better['lr']:g} learns them in {better['steps']} steps"
        stuck = own["diverged"] or own["last"] > _NOTHING * own["first"]
        return Finding("failed" if stuck else "warning", told, mend)
    rates = ", ".join(f"{other['lr']:g}" for other in others)
    best = min([own, *others], key=lambda one: _left(one))
    if _left(best) > _NOTHING:
        said = f"{told}; nor at client.lr={rates}" if rates else told
        mend = (
            "look whether labels belong to their inputs, and whether the model can tell these apart"
        )
        return Finding("failed", said, mend)
    if own["diverged"]:
        mend = f"lower client.lr: {best['lr']:g} brings the loss to {best['last']:.3g}"
        return Finding("failed", told, mend)
    mend = "longer training may; a model with little that is trained may not"
    if best["lr"] != own["lr"]:
        mend = f"client.lr={best['lr']:g} comes to {best['last']:.3g} in as many; {mend}"
    return Finding("warning", told, mend)


def _left(one: dict[str, Any]) -> float:
    """What of the first loss is left; all, where training diverged."""
    return 1.0 if one["diverged"] or not one["first"] > 0 else float(one["last"] / one["first"])


def _progress(one: dict[str, Any], examples: int) -> str:
    if one["diverged"]:
        return f"client.lr={one['lr']:g} diverges on {examples} examples: {one['diverged']}"
    accuracy = "" if one["accuracy"] is None else f", accuracy {one['accuracy']:.0%}"
    verb = "learns" if one["learnt"] else "does not learn"
    out_of_time = not one["learnt"] and one["steps"] < STEPS
    within = f" in {one['steps']} steps" + (", for which time was" if out_of_time else "")
    return (
        f"client.lr={one['lr']:g} {verb} {examples} examples by heart{within}: loss"
        f" {one['first']:.3g} → {one['last']:.3g}{accuracy}"
    )
