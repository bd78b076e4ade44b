"""What a run says of itself before it begins: what its parts promise, and what they do not protect from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fl_app import encryption
from fl_app.assembly import Assembly
from strategies.combiners import Robust
from strategies.contract import Claim, Visibility
from strategies.pipeline import Pipeline
from strategies.privacy import Guarantee
from strategies.schedulers import Buffered

_RISKS: Final = {
    Visibility.SUM: "nobody sees what one client sends: one that lies can spoil the sum "
    "(strategy=secure_grouped bears some that do)",
    Visibility.GROUP: "the server sees the sum of each group, and groups are drawn anew each round: "
    "the differences tell more than one sum of all",
}

_SUPPORT: Final = {
    "shared": "",
    "per_version": "each version of the model has coordinates of its own",
    "per_client": "each client sends coordinates of its own",
}

DROWNED: Final = 5.0
"""Noise over signal past which little is learnt: at about 1 most still is, on MNIST (docs/dp_figures.md)."""


def promises(pipeline: Pipeline, assembly: Assembly, num_clients: int) -> dict[str, str]:
    """What the contract comes to, and what each part says of itself: what is seen, how many liars the rule bears."""
    claim = pipeline.claim
    told: dict[str, str] = {"contract": contract(claim)}
    if isinstance(pipeline.scheduler, Buffered):
        told["scheduler"] = pipeline.scheduler.describe()
    describe = getattr(pipeline.collector, "describe", None)
    if describe is not None:
        told["collector"] = describe((claim.cohort or num_clients) // claim.sessions)
    if pipeline.privacy is not None:
        report = pipeline.privacy.report() or {}
        told |= {"promised": str(report["protects"])} if "protects" in report else {}
        told["privacy"] = pipeline.privacy.describe(assembly.network.size)
    if isinstance(pipeline.combiner, Robust):
        told["rule"] = pipeline.combiner.promise(pipeline.claim.inputs or num_clients)
    attack = assembly.config.attack
    if attack is not None:
        told["attack"] = f"{attack.name}, {_liars(assembly, num_clients)} of {num_clients} clients"
    return told


def contract(claim: Claim) -> str:
    """What holds of each aggregate, once all parts have spoken."""
    planned = "clients" if claim.cohort is None else f"{claim.cohort} clients"
    cohort = (
        f"rounds of {planned} ({claim.sampling} sampling)"
        if claim.staleness is None
        else f"buffers of {planned}, up to {claim.staleness} versions old"
    )
    seen = {
        Visibility.EACH: "the server sees each update",
        Visibility.GROUP: f"the server sees {claim.groups} sums",
        Visibility.SUM: "the server sees one sum",
    }[claim.visibility]
    bound = claim.l2_bound()
    facts = [
        cohort,
        seen,
        "" if bound is None else f"a client's update is no longer than {bound:.3g}",
        "" if claim.private is None else f"private by {claim.private}",
        f"{claim.honest} honest shares in a sum of {claim.members} at most" if claim.whole else "",
        "" if claim.sensitivity is None else f"sensitivity {claim.sensitivity:.3g}",
        _SUPPORT[claim.support],
        "" if claim.served is None else "activations at each turn",
        "" if claim.packed is None else f"packed by {claim.packed}",
        f"in clear: {', '.join(sorted(claim.clear))}" if claim.clear else "nothing else in clear",
    ]
    return "; ".join(filter(None, facts))


def risks(pipeline: Pipeline, assembly: Assembly, num_clients: int) -> Iterator[str]:
    """What the parts do not protect from; a rule that bears fewer than lie speaks of the setting, not of the rule."""
    claim = pipeline.claim
    if claim.visibility is Visibility.GROUP and claim.whole:
        yield "the server sees the sum of each group; each has noise of its own, which ε accounts for"
    elif claim.visibility in _RISKS:
        yield _RISKS[claim.visibility]
    if claim.served is not None:
        yield (
            "activations tell of the texts that they are of, and no ε covers them: `trellis privacy-audit` says by how"
            " much (docs/split_privacy.md)"
        )
    if assembly.encrypted:
        yield from encryption.risks(assembly.trainer, assembly.serving.plan.spec, num_clients)
    if claim.factors == "both" and claim.visibility < Visibility.EACH:
        yield (
            "clients train both factors of each product, and the product of mean factors is not the mean product; the"
            " server, which sees sums, can't say by how much: model.share_a=true is exact"
        )
    if isinstance(pipeline.scheduler, Buffered):
        plan = pipeline.scheduler
        age = plan.busy / (plan.size * plan.cohort)
        if age > plan.max_staleness:
            yield (
                f"updates are about {age:.3g} versions old and refused past {plan.max_staleness}: raise"
                f" scheduler.max_staleness or scheduler.buffer, or lower scheduler.concurrency"
            )
    if isinstance(pipeline.privacy, Guarantee):
        ratio = pipeline.privacy.drowning(assembly.network.size)
        if ratio > DROWNED:
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
