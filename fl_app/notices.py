"""What a run says of itself before it begins: what its parts promise, and what they do not protect from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fl_app.assembly import Assembly
from strategies.combiners import Robust
from strategies.contract import Visibility
from strategies.pipeline import Pipeline
from strategies.privacy import Guarantee

_RISKS: Final = {
    Visibility.SUM: "nobody sees what one client sends: one that lies can spoil the sum "
    "(strategy=secure_grouped bears some that do)",
    Visibility.GROUP: "the server sees the sum of each group, and groups are drawn anew each round: "
    "the differences tell more than one sum of all",
}

_DROWNED: Final = 5.0
"""Noise over signal past which little is learnt: at about 1 most still is, on MNIST (docs/dp_figures.md)."""


def promises(pipeline: Pipeline, assembly: Assembly, num_clients: int) -> dict[str, str]:
    """What the server sees, how many clients lie, and how many the rule bears: by the part that says it."""
    told: dict[str, str] = {}
    describe = getattr(pipeline.collector, "describe", None)
    if describe is not None:
        told["collector"] = describe(pipeline.claim.cohort or num_clients)
    if pipeline.privacy is not None:
        report = pipeline.privacy.report() or {}
        told |= {"promised": str(report["protects"])} if "protects" in report else {}
        told["privacy"] = pipeline.privacy.describe(assembly.size)
    if isinstance(pipeline.combiner, Robust):
        told["rule"] = pipeline.combiner.promise(pipeline.claim.inputs or num_clients)
    attack = assembly.config.attack
    if attack is not None:
        told["attack"] = f"{attack.name}, {_liars(assembly, num_clients)} of {num_clients} clients"
    return told


def risks(pipeline: Pipeline, assembly: Assembly, num_clients: int) -> Iterator[str]:
    """What the parts do not protect from; a rule that bears fewer than lie speaks of the setting, not of the rule."""
    if pipeline.claim.visibility in _RISKS:
        yield _RISKS[pipeline.claim.visibility]
    if isinstance(pipeline.privacy, Guarantee):
        ratio = pipeline.privacy.drowning(assembly.size)
        if ratio > _DROWNED:
            yield (
                f"noise is {ratio:.3g} times as long as what it hides: ask more clients, take a smaller model (for"
                f" images model=hog) or fewer rounds, or raise the budget"
            )
    if not isinstance(pipeline.combiner, Robust):
        return
    f, liars = (
        pipeline.combiner.tolerance(pipeline.claim.inputs or num_clients),
        _liars(assembly, num_clients),
    )
    if liars > f:
        yield (
            f"{liars} clients lie and the rule bears {f}: raise combiner.f or num_clients, or lower attack.fraction"
        )
    elif f == 0:
        yield "the rule bears no liar: raise num_clients, or set combiner.f"


def _liars(assembly: Assembly, num_clients: int) -> int:
    attack = assembly.attack
    return 0 if attack is None else len(attack.attackers(num_clients, assembly.config.seed))
