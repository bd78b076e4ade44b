"""What flooding costs encrypted training, and whether the errors that it covers are what they are taken for.

    python benchmarks/encrypted_flooding.py            # all tables, about ten minutes on one core
    python benchmarks/encrypted_flooding.py --quick    # fewer keys and runs

The first table compares errors of real ciphertexts, over keys made for it, with `clients.encrypted.noise`: a step on
the same data and weights under each key, whose gradients differ by the noise of keys and encryptions alone. The second
one gives the bound t of what is assumed of magnitudes, and of those along training. The third trains the
plaintext twin with the noise that flooding adds, at the settings that `encrypted_search` found, on the same split of
the training images: the test images are not looked at.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from math import log2, prod, sqrt
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory

import numpy as np
import torch
from common import versions
from encrypted_search import CHOSEN, PARTS, TASK, Setting, data
from numpy.typing import NDArray

from clients.encrypted.evaluation import Value
from clients.encrypted.flooding import Flooding
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.network import PolynomialNet
from clients.encrypted.noise import ErrorModel, Magnitudes
from clients.encrypted.notes import Step
from clients.encrypted.owner import (
    ERRORS,
    INPUTS,
    LABELS,
    LOSS,
    PACKED,
    PACKED_ERRORS,
    Fresh,
    Owner,
)
from clients.encrypted.party import ComputeParty
from clients.encrypted.plan import Plan, plan_of
from clients.encrypted.ring import Desk
from clients.encrypted.schedule import batches
from clients.encrypted.spec import Spec
from clients.resident import ResidentModel, arrays_of
from clients.tasks import evaluate
from clients.trainers import FedSgd, FitJob
from clients.trainers.sgd import TrainingDivergedError
from strategies.server_models import Adam, ServerModel
from strategies.update import DELTA, Section, Update

ROWS = ("cross-entropy", "squared", "logistic regression")
OTHER_FEATURES = (
    "cross-entropy, pixels", "cross-entropy, DCT", "squared, DCT", "logistic regression, DCT",
)  # fmt: skip
DECRYPTIONS = (40, 400, 4096)
STEPS = {
    "cross-entropy": Spec((64, 32, 10), batch=256),
    "squared": Spec((64, 32, 10), loss="squared", batch=256),
    "logistic regression": Spec((64, 10), batch=256),
}
"""Of the sizes of these, on data and weights that are drawn at random."""


def spec_of(setting: Setting) -> Spec:
    """What a setting trains."""
    features = PolynomialNet(TASK.input_shape, 10, features=setting.features).features.size
    loss = "squared" if setting.loss == "squared" else "cross_entropy"
    return Spec((features, *setting.hidden, 10), setting.activation, loss, setting.batch)


def trained(
    setting: Setting, seed: int, sigma: float, spec: Spec | None = None
) -> tuple[float, Magnitudes | None]:
    """Accuracy on the images that are held out, in percent, 0 where training diverges; and magnitudes for a spec."""
    fitted, held_out = data(seed % PARTS)
    torch.manual_seed(seed)
    module = PolynomialNet(
        TASK.input_shape, 10, hidden=setting.hidden, activation=setting.activation,
        features=setting.features, hidden_scale=setting.hidden_scale,
        logit_scale=setting.logit_scale, logit_bias=setting.logit_bias,
    )  # fmt: skip
    resident = ResidentModel(module, arrays_of(module))
    trainer = FedSgd(batch_size=setting.batch, loss=setting.loss, seed=seed)  # type: ignore[arg-type]  # its check is its own
    optimiser = Adam(
        lr=setting.lr, beta1=setting.beta1, beta2=setting.beta2, tau=setting.tau,
        bias_correction=True, total_steps=setting.rounds, decay_from=setting.decay_from,
    )  # fmt: skip
    server, rng, seen = ServerModel(arrays_of(module), optimiser), np.random.default_rng(seed), None
    for number in range(1, setting.rounds + 1):
        job = FitJob(0, server.view(), {}, fitted, 0, {}, {"server-round": number})
        if spec is not None:
            batch = fitted.take(trainer.batch(job))
            features = module.featurise(batch.inputs).double().numpy()
            now = Magnitudes.of(spec, server.view(), features, batch.targets.numpy())
            seen = now if seen is None else seen.largest(now)
        try:
            section = trainer.fit_one(job, resident, TASK).sections[DELTA]
        except TrainingDivergedError:
            return 0.0, seen
        noisy = section.vector + (sigma * rng.normal(size=section.vector.size)).astype(np.float32)
        change = {DELTA: Section(noisy, section.layout)}
        server.apply(Update(change, 1.0, (0,), number - 1, {}))
    resident.load(server.view())
    return 100 * evaluate(module, TASK, held_out)["accuracy"], seen


def watched(setting: Setting, seeds: range) -> Magnitudes:
    """The largest magnitudes along some runs."""
    found = None
    for seed in seeds:
        seen = trained(setting, seed, 0.0, spec_of(setting))[1]
        assert seen is not None
        found = seen if found is None else found.largest(seen)
    assert found is not None
    return found


def measured(name: str, spec: Spec, keys: int) -> None:
    """Prints errors of real steps, each under a new key, beside what is predicted."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(spec.batch, spec.sizes[0]))
    targets = rng.integers(0, spec.sizes[-1], spec.batch)
    torch.manual_seed(3)
    module = PolynomialNet(
        spec.sizes[:1], spec.sizes[-1], hidden=spec.sizes[1:-1], features="raw", logit_scale=1.0
    )
    arrays = {name: value.double().numpy() for name, value in module.state_dict().items()}
    with TemporaryDirectory() as folder:
        rows = np.stack(
            [step(spec, arrays, features, targets, Path(folder) / str(at)) for at in range(keys)]
        )
    norms = np.linalg.norm(rows - rows.mean(0), axis=1) * sqrt(keys / (keys - 1))
    model = ErrorModel(plan_of(spec), Magnitudes.of(spec, arrays, features, targets))
    size = sqrt(np.mean(norms**2))
    print(
        f"| {name} | {keys} | {size:.2e} | {sqrt(model.energy):.2e} | {norms.max():.2e} | {model.bound:.2e} |"
        f" {model.bound / norms.max():.1f} |",
        flush=True,
    )


def step(
    spec: Spec, arrays: Mapping[str, NDArray[np.floating]], features: NDArray[np.floating],
    targets: NDArray[np.integer], folder: Path,
) -> NDArray[np.float64]:  # fmt: skip
    """All that one step releases, (elements,), under a new key, by a compute party with one worker."""
    plan = plan_of(spec)
    keys = OwnerKeys.generate(plan.ring)
    owner, at = Owner(plan, keys), Step(keys.fingerprint, "0" * 32, 0)
    with ComputeParty(plan, folder, workers=1) as party:
        sent = {
            f"keys.{name}": array
            for name, array in keys.evaluation(plan.galois).to_arrays().items()
        }
        sent |= owner.inputs(features).to_arrays(INPUTS) | owner.packed(features).to_arrays(PACKED)
        if spec.loss == "squared":
            sent |= owner.labels(targets).to_arrays(LABELS)
        party.take(at, sent)
        outputs, bias, loss, packed = party.forward(at, arrays), None, None, None
        if spec.loss == "squared":
            errors = party.differences(at, outputs)
        else:
            answer = owner.answer(outputs, targets)
            bias, loss = answer.bias, answer.loss
            errors, packed = _answered(plan, answer.arrays)
        found = owner.gradients(party.backward(at, arrays, errors, packed), len(features), bias)
    if loss is not None:
        found[LOSS] = np.asarray(loss)
    return np.concatenate([found[name].ravel() for name in sorted(found)])


def _answered(plan: Plan, sent: Mapping[str, NDArray[np.generic]]) -> tuple[Value, Value | None]:
    """An owner's errors as the party expands them."""
    desk, form, classes = Desk(plan.ring), plan.formats["delta"], plan.spec.sizes[-1]
    fresh = Fresh.from_arrays(sent, ERRORS, plan.ring, classes, form.level)
    errors = Value(fresh.whole(desk), 2.0**form.scale)
    if plan.spec.layers == 1:
        return errors, None
    packed = Fresh.from_arrays(sent, PACKED_ERRORS, plan.ring, plan.packs(classes), 1)
    return errors, Value(packed.whole(desk), 2.0**plan.scales.packed)


def bounds(seeds: range) -> dict[str, tuple[float, int]]:
    """Prints t of each row as it is assumed and as training goes, and gives the first, with the elements released.

    As owners do, the longest sample is taken where it is longer than assumed.
    """
    found = {}
    for name in (*ROWS, *OTHER_FEATURES):
        setting = CHOSEN[name]
        spec = spec_of(setting)
        plan, assumed, seen = plan_of(spec), Magnitudes.assumed(spec), watched(setting, seeds)
        assumed = replace(assumed, features=max(assumed.features, seen.features))
        rows = min(
            len(cut)
            for seed in seeds
            for cut in batches(data(seed % PARTS)[0].targets.numpy(), setting.batch, seed, 0)
        )
        model = ErrorModel(plan, assumed, rows)
        elements = 1 + sum(prod(shape) for shape in spec.shapes.values())
        within = "yes" if assumed.largest(seen) == assumed else "NO"
        size = sqrt(model.energy / elements)
        print(
            f"| {name} | {list(plan.ring.bits)} | 2^{log2(model.bound):.2f} |"
            f" 2^{log2(ErrorModel(plan, seen, rows).bound):.2f} | {within} | 2^{log2(size):.1f} |",
            flush=True,
        )
        found[name] = model.bound, elements
    return found


def curve(name: str, bound: float, elements: int, seeds: range) -> None:
    """Prints what noise costs, over its standard deviation, and which ν each is at τ."""
    setting = CHOSEN[name]
    base = [trained(setting, seed, 0.0)[0] for seed in seeds]
    print(f"| {name} | 0 | {fmean(base):.2f} |  |  |", flush=True)
    default = Flooding().deviation(bound, elements)
    for sigma in (default, *(2.0**exponent for exponent in range(-12, -5, 2))):
        lost = [
            before - trained(setting, seed, sigma)[0]
            for before, seed in zip(base, seeds, strict=True)
        ]
        error = stdev(lost) / sqrt(len(lost))
        bits = ", ".join(f"{2 * log2(sigma / sqrt(12 * tau) / bound):.0f}" for tau in DECRYPTIONS)
        told = "default, " if sigma == default else ""
        print(
            f"| {name} | {told}2^{log2(sigma):.1f} | {fmean(base) - fmean(lost):.2f} |"
            f" {fmean(lost):.2f} ± {error:.2f} | {bits} |",
            flush=True,
        )


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few keys and runs")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    print(versions())
    print(
        "\n| step | keys | error's norm, measured | predicted | largest | bound t | t / largest |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, spec in STEPS.items():
        measured(name, spec, 3 if quick else 10)
    print("\n| | bits | t assumed | t along training | within | error an element |")
    print("|---|--:|--:|--:|--:|--:|")
    found = bounds(range(2 if quick else 5))
    print(f"\n| | σ | held-out accuracy, % | lost | ν at τ = {', '.join(map(str, DECRYPTIONS))} |")
    print("|---|--:|--:|--:|--:|")
    for name in ROWS:
        bound, elements = found[name]
        curve(name, bound, elements, range(3 if quick else 12))


if __name__ == "__main__":
    main()
