"""How the settings of encrypted training were chosen: its plaintext twin on a validation split, never the test set.

    python benchmarks/encrypted_search.py             # the settings: 15 runs a row
    python benchmarks/encrypted_search.py --around    # and what differs from each in one thing
    python benchmarks/encrypted_search.py --quick     # 5 runs a row
    python benchmarks/encrypted_search.py --hunt squared --minutes 2     # a search like those that found the settings

Of the 4,000 training images of the task's fold 0, a fifth is held out and the rest fitted: run s holds out part s mod 5
of a stratified cut and draws weights, mini-batches and their order from seed s, so that 15 runs judge every training
image three times. The test images are not looked at. Figures are means and their standard errors over runs; they are of
models that were fitted on 3,200 images. All parts are the run's own (`clients.trainers.FedSgd`, the server's model and
optimiser); no engine, no ciphertexts.

A step on ciphertexts costs about 0.35 + m / 1024, in units of one with 665 samples, and a hidden unit its share of it:
that is the column `cost`, for as many units as the row has of 32, by which a setting was preferred among those that
reach the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import exp, sqrt
from statistics import fmean, stdev

import numpy as np
import torch
from common import versions

from clients.encrypted.features import Kind
from clients.encrypted.network import Activation, PolynomialNet
from clients.resident import ResidentModel, arrays_of
from clients.tasks import Examples, Mnist, evaluate
from clients.tasks.folds import stratified_folds
from clients.trainers import FedSgd, FitJob
from clients.trainers.sgd import TrainingDivergedError
from strategies.server_models import Adam, ServerModel
from strategies.update import Update

PARTS, CUT = 5, 1234
TASK = Mnist(fold=0)


@dataclass(frozen=True)
class Setting:
    """A row: the model, the client and the server of a run.

    Attributes:
        loss: `cross_entropy` | `squared`.
        rounds: steps.
        batch: m.
    """

    loss: str
    rounds: int
    batch: int
    lr: float
    beta1: float
    beta2: float
    tau: float = 1e-3
    decay_from: float = 0.5
    hidden: tuple[int, ...] = (32,)
    features: Kind = "hog"
    number: int | None = None
    activation: Activation = "square"
    hidden_scale: float = 1.0
    logit_scale: float = 0.2
    logit_bias: float = 0.0

    def module(self) -> PolynomialNet:
        """The model with its initial weights, drawn from torch's generator."""
        return PolynomialNet(
            TASK.input_shape,
            TASK.num_classes,
            hidden=self.hidden,
            activation=self.activation,
            features=self.features,
            number=self.number,
            hidden_scale=self.hidden_scale,
            logit_scale=self.logit_scale,
            logit_bias=self.logit_bias,
        )

    @property
    def cost(self) -> float:
        """Of all steps; without hidden units as if there were 32, which says too much."""
        return self.rounds * (0.35 + self.batch / 1024) * (sum(self.hidden) or 32) / 32


CHOSEN = {
    "cross-entropy": Setting(
        "cross_entropy", rounds=30, batch=256, lr=0.025, beta1=0.7, beta2=0.98,
        decay_from=0.65, hidden_scale=1.0, logit_scale=0.7,
    ),
    "squared": Setting(
        "squared", rounds=36, batch=256, lr=0.0135, beta1=0.8, beta2=0.87, tau=1e-5,
        decay_from=0.9, hidden_scale=0.16, logit_scale=0.007, logit_bias=0.1,
    ),
    "logistic regression": Setting(
        "cross_entropy", rounds=12, batch=256, lr=0.2, beta1=0.65, beta2=0.8, tau=0.1,
        decay_from=0.9, hidden=(), logit_scale=0,
    ),
    "cross-entropy, m = 512": Setting(
        "cross_entropy", rounds=24, batch=512, lr=0.025, beta1=0.7, beta2=0.98,
        decay_from=0.65, hidden_scale=1.0, logit_scale=0.7,
    ),
    "squared, m = 512": Setting(
        "squared", rounds=32, batch=512, lr=0.015, beta1=0.8, beta2=0.8, tau=1e-5,
        decay_from=0.75, hidden_scale=0.25, logit_scale=0.015, logit_bias=0.1,
    ),
    "cross-entropy, 16 units": Setting(
        "cross_entropy", rounds=40, batch=256, lr=0.025, beta1=0.7, beta2=0.98,
        decay_from=0.65, hidden=(16,), hidden_scale=1.0, logit_scale=0.7,
    ),
    "squared, 16 units": Setting(
        "squared", rounds=40, batch=256, lr=0.0135, beta1=0.8, beta2=0.87, tau=1e-5,
        decay_from=0.9, hidden=(16,), hidden_scale=0.16, logit_scale=0.007, logit_bias=0.1,
    ),
    "cross-entropy, DCT": Setting(
        "cross_entropy", rounds=50, batch=256, lr=0.045, beta1=0.5, beta2=0.95,
        decay_from=0.35, features="dct", hidden_scale=0.5, logit_scale=0.05,
    ),
    "squared, DCT": Setting(
        "squared", rounds=80, batch=512, lr=0.03, beta1=0.8, beta2=0.93, tau=2e-4,
        features="dct", hidden_scale=0.35, logit_scale=0.07, logit_bias=0.1,
    ),
    "logistic regression, DCT": Setting(
        "cross_entropy", rounds=24, batch=512, lr=0.2, beta1=0.6, beta2=0.94,
        decay_from=0.65, hidden=(), features="dct", logit_scale=0,
    ),
    "cross-entropy, pixels": Setting(
        "cross_entropy", rounds=40, batch=256, lr=0.0065, beta1=0.6, beta2=0.93,
        decay_from=0.6, features="raw", hidden_scale=1.0, logit_scale=0.15,
    ),
}  # fmt: skip
"""Found by `--hunt` with a minute or two each, rounded."""


@cache
def data(part: int) -> tuple[Examples, Examples]:
    """Examples to fit, and those held out."""
    every = TASK.train()
    dealt = stratified_folds(every.targets.numpy(), PARTS, CUT)
    return every.take(np.flatnonzero(dealt != part)), every.take(np.flatnonzero(dealt == part))


def accuracy(setting: Setting, seed: int) -> float:
    """On the images that are held out, in percent; 0 where training diverges."""
    fitted, held_out = data(seed % PARTS)
    torch.manual_seed(seed)
    module = setting.module()
    resident = ResidentModel(module, arrays_of(module))
    trainer = FedSgd(batch_size=setting.batch, loss=setting.loss, seed=seed)  # type: ignore[arg-type]  # its check is its own
    server = ServerModel(
        arrays_of(module),
        Adam(
            lr=setting.lr,
            beta1=setting.beta1,
            beta2=setting.beta2,
            tau=setting.tau,
            bias_correction=True,
            total_steps=setting.rounds,
            decay_from=setting.decay_from,
        ),
    )
    for number in range(1, setting.rounds + 1):
        job = FitJob(0, server.view(), {}, fitted, 0, {}, {"server-round": number})
        try:
            fit = trainer.fit_one(job, resident, TASK)
        except TrainingDivergedError:
            return 0.0
        server.apply(Update(fit.sections, 1.0, (0,), number - 1, {}))
    resident.load(server.view())
    return 100 * evaluate(module, TASK, held_out)["accuracy"]


def measured(setting: Setting, seeds: range) -> tuple[float, float]:
    """Mean and its standard error over seeds."""
    found = [accuracy(setting, seed) for seed in seeds]
    return fmean(found), stdev(found) / sqrt(len(found))


def neighbours(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Settings that differ from a chosen one in one thing."""
    yield "lr / 2", replace(setting, lr=setting.lr / 2)
    yield "lr x 2", replace(setting, lr=setting.lr * 2)
    yield "rate held to the end", replace(setting, decay_from=1.0)
    yield "rate falls from the start", replace(setting, decay_from=0.0)
    yield "3/4 of the steps", replace(setting, rounds=setting.rounds * 3 // 4)
    yield (
        "half the batch, twice the steps",
        replace(setting, batch=setting.batch // 2, rounds=setting.rounds * 2),
    )
    yield (
        "twice the batch, half the steps",
        replace(setting, batch=setting.batch * 2, rounds=setting.rounds // 2),
    )
    if setting.hidden:
        yield "16 hidden units", replace(setting, hidden=(16,))
        yield "cubic activation, lr / 2", replace(setting, activation="cubic", lr=setting.lr / 2)
    if setting.features == "dct":
        yield "8 x 8 means", replace(setting, features="pool", number=64)


def row(name: str, setting: Setting, seeds: range) -> None:
    """Prints one line of the table."""
    mean, error = measured(setting, seeds)
    print(
        f"| {name} | {setting.batch} x {setting.rounds} | {setting.cost:.0f} | {mean:.2f} ± {error:.2f} |",
        flush=True,
    )


def tables(seeds: range, *, around: bool) -> None:
    """Prints each chosen setting, and its neighbours if they are asked for."""
    for name, setting in CHOSEN.items():
        print(f"{name}: {setting}")
    print("\n| | m x steps | cost | held-out accuracy, % |\n|---|--:|--:|--:|")
    for name, setting in CHOSEN.items():
        row(f"**{name}**", setting, seeds)
        for change, other in neighbours(setting) if around else ():
            row(change, other, seeds)


def hunt(name: str, minutes: float) -> None:
    """Hill climbing from a chosen setting: one of the best five, changed at random, less and less as time goes by."""
    rng, start, seeds = np.random.default_rng(0), time.monotonic(), range(10)
    best = [(fmean(accuracy(CHOSEN[name], seed) for seed in seeds), CHOSEN[name])]
    while (spent := (time.monotonic() - start) / (60 * minutes)) < 1:
        found = changed(best[rng.integers(min(len(best), 5))][1], 0.7 * (1 - spent), rng)
        best.append((fmean(accuracy(found, seed) for seed in seeds), found))
        best = sorted(best, key=lambda one: -one[0])[:8]
    for mean, setting in best[:5]:
        again, error = measured(setting, range(1000, 1020))
        print(f"{mean:.2f} in the search, {again:.2f} ± {error:.2f} by 20 new seeds: {setting}")


def changed(setting: Setting, width: float, rng: np.random.Generator) -> Setting:
    """Each number of an optimiser or of initial weights is multiplied by e^N(0, width²), or left alone."""

    def near(value: float) -> float:
        return value * exp(width * rng.normal()) if rng.random() < 0.5 else value

    return replace(
        setting,
        lr=near(setting.lr),
        tau=near(near(setting.tau)),
        hidden_scale=near(setting.hidden_scale),
        logit_scale=near(setting.logit_scale),
        beta1=max(0.0, 1 - near(1 - setting.beta1)),
        beta2=max(0.0, 1 - near(1 - setting.beta2)),
        decay_from=float(np.clip(setting.decay_from + width * rng.normal() / 2, 0, 0.9)),
    )


def main() -> None:
    """Prints the tables, or searches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="five runs a row")
    parser.add_argument("--around", action="store_true", help="also what differs in one thing")
    parser.add_argument("--hunt", choices=sorted(CHOSEN), help="search from one of the settings")
    parser.add_argument("--minutes", type=float, default=1.0, help="that a search takes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(100, 105 if given.quick else 115)  # of which no search has seen any
    print(versions(), f"seeds {seeds.start} to {seeds.stop - 1}\n")
    if given.hunt:
        hunt(given.hunt, given.minutes)
    else:
        tables(seeds, around=given.around)


if __name__ == "__main__":
    main()
