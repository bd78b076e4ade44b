"""A stand-in for `experiment=private_robust_secure`: what its groups, rule and ε were chosen by, in minutes.

    python benchmarks/everything_on_search.py             # fold 0: by groups and rule; folds 1 to 3: by ε
    python benchmarks/everything_on_search.py --quick     # one seed

No engine, no masks, no integers: 100 clients train the linear layer of `model=hog` in numpy, each group's sum gets
Gaussian noise of the variance that the real shares add up to, a sum that is too long is refused as the stage would, and
the real rules combine the means. Client half, noise and masks are each held to this by tests of their own; the figures
of the real thing are `everything_on.py`'s. A run takes a second, so there are more of them.

Two clients, drawn by seed, lie in the place of clip and noise: `ring` with random signs that fill the ring, `hidden`
with minus its own change, drawn out to a share of the length of the noise in its group's sum.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import log, sqrt
from statistics import fmean

import numpy as np
import torch
from common import versions
from dp_accuracy import shown
from numpy.typing import NDArray

from clients.models import Hog
from clients.tasks import FederatedData, Mnist
from strategies.combiners import TrimmedMean
from strategies.combiners import functional as rules
from strategies.privacy.accountants import calibrate
from strategies.privacy.steps import Steps
from strategies.secagg.parameters import choose
from strategies.update import DELTA

CLIENTS, LIARS, ROUNDS, FOLDS = 100, 2, 20, (1, 2, 3)
SERVER_LR, LR, EPOCHS, BOUND, DELTA_ = 2.0, 10.0, 3, 1.0, 1e-5
DROPOUTS, COLLUDERS = 0.1, 0.15
SHARES_OF_NOISE = (0.15, 0.25, 1 / 3, 0.45)
RARE = 40 * log(2)

Floats = NDArray[np.float64]
Rule = Callable[[NDArray[np.float32], int], NDArray[np.float32]]
RULES: dict[str, Rule] = {
    "mean": lambda means, f: means.mean(0),
    "median": lambda means, f: rules.median(means, f=f),
    "trimmed_mean": lambda means, f: rules.trimmed_mean(means, f=f),
    "geometric_median": lambda means, f: rules.geometric_median(means, f=f),
    "centered_clipping": lambda means, f: rules.centered_clipping(means, f=f),
    "nnm": lambda means, f: rules.nnm(means, f=f, rule=TrimmedMean()),
}


@dataclass(frozen=True)
class Data:
    """Features and labels of each client, and of the test set.

    Attributes:
        clients: (features (n, k + 1) with a column of ones, labels (n,)) of each.
        test: likewise.
    """

    clients: Sequence[tuple[Floats, NDArray[np.int64]]]
    test: tuple[Floats, NDArray[np.int64]]


@cache
def data(fold: int) -> Data:
    """The preset's images, IID."""
    task = Mnist(fold=fold)
    model = Hog(task.input_shape, task.num_classes)

    def featured(inputs: torch.Tensor) -> Floats:
        with torch.no_grad():
            found = model.features(inputs).double().numpy()
        return np.concatenate([found, np.ones((len(found), 1))], axis=1)

    cut = FederatedData(task, CLIENTS, seed=fold, test_fraction=0.1)
    parts = [cut.train(client) for client in range(CLIENTS)]
    test = task.test()
    return Data(
        [(featured(part.inputs), part.targets.numpy()) for part in parts],
        (featured(test.inputs), test.targets.numpy()),
    )


@dataclass(frozen=True)
class Setting:
    """A cell of the tables.

    Attributes:
        epsilon: of all rounds.
        groups: sums a round.
        rule: across their means.
        lie: None, `ring`, or the share of the noise's length that is hidden in it.
    """

    epsilon: float
    groups: int = 7
    rule: str = "nnm"
    lie: str | float | None = None

    @property
    def members(self) -> int:
        """Of the largest group."""
        return -(-CLIENTS // self.groups)

    @property
    def honest(self) -> int:
        """Shares of noise that are sure, as the collector counts them."""
        sizes = {CLIENTS // self.groups, self.members}
        return min(
            choose(size, dropouts=DROPOUTS, colluders=COLLUDERS).quorum - int(COLLUDERS * size)
            for size in sizes
        )

    def share(self, dimension: int) -> float:
        """Standard deviation of one share, in the units of the clip."""
        return noise(self.epsilon, self.honest, self.members, dimension) / sqrt(self.honest)


@cache
def noise(epsilon: float, honest: int, members: int, dimension: int) -> float:
    """The multiplier z that comes to ε after all rounds."""

    def planned(z: float) -> list[tuple[object, int]]:
        return [
            (Steps("discrete_gaussian", z, honest, members, {DELTA: dimension}).release(), ROUNDS)
        ]

    return calibrate("rdp", epsilon, DELTA_, planned)


def trained(weights: Floats, features: Floats, labels: NDArray[np.int64]) -> Floats:
    """One client's clipped change of (classes, k + 1) weights, as a vector."""
    present = weights
    for _ in range(EPOCHS):
        logits = features @ present.T
        odds = np.exp(logits - logits.max(1, keepdims=True))
        odds /= odds.sum(1, keepdims=True)
        odds[np.arange(len(labels)), labels] -= 1
        present = present - LR / len(labels) * odds.T @ features
    change = (present - weights).ravel()
    return change * min(1.0, BOUND / float(np.linalg.norm(change)))


def summed(
    changes: Sequence[Floats],
    lying: Sequence[bool],
    share: float,
    lie: object,
    rng: np.random.Generator,
) -> Floats | None:
    """A group's sum under noise, None where it is too long to be honest."""
    dimension, members = len(changes[0]), len(changes)
    honest = [one for one, lies in zip(changes, lying, strict=True) if not lies or lie is None]
    total = np.sum(honest, axis=0) + rng.normal(0, share * sqrt(len(honest)), dimension)
    for one in [one for one, lies in zip(changes, lying, strict=True) if lies and lie is not None]:
        if lie == "ring":
            total = total + rng.choice([-1.0, 1.0], dimension) * 50 * BOUND
        else:
            length = float(lie) * share * sqrt(members * dimension)  # type: ignore[arg-type]
            total = total - one / np.linalg.norm(one) * length
    square = dimension + 2 * sqrt(dimension * RARE) + 2 * RARE
    longest = members * BOUND + share * sqrt(members * square)
    return None if np.linalg.norm(total) > longest else total


def accuracy(setting: Setting, fold: int, seed: int) -> float:
    """After all rounds, in percent."""
    held, rng = data(fold), np.random.default_rng([fold, seed])
    (inputs, targets), width = held.test, held.test[0].shape[1]
    weights = rng.uniform(-1, 1, (10, width)) / sqrt(width - 1)
    share = setting.share(weights.size)
    liars = set(rng.permutation(CLIENTS)[:LIARS].tolist())
    for _ in range(ROUNDS):
        means, f = [], LIARS
        for group in np.array_split(rng.permutation(CLIENTS), setting.groups):
            changes = [trained(weights, *held.clients[one]) for one in group]
            total = summed(changes, [one in liars for one in group], share, setting.lie, rng)
            if total is None:
                f -= 1
            else:
                means.append(np.float32(total / len(group)))
        step = RULES[setting.rule](np.stack(means), max(f, 0))
        weights = weights + SERVER_LR * step.reshape(weights.shape)
    return 100 * float(((inputs @ weights.T).argmax(1) == targets).mean())


def mean(setting: Setting, folds: Iterable[int], seeds: int) -> float:
    """Over folds and seeds."""
    return fmean(accuracy(setting, fold, seed) for fold in folds for seed in range(seeds))


def by_rule(epsilon: float, seeds: int) -> None:
    """Prints fold 0's accuracy by groups and rule."""
    lies = (None, "ring", 0.25, 0.45)
    print(f"\n### Fold 0, ε = {epsilon:g}, means of {seeds} seeds\n")
    print(
        "| groups | rule | no lie | ring | hidden, 1/4 | hidden, 0.45 |\n|---|---|--:|--:|--:|--:|"
    )
    for groups in (5, 7, 10):
        for rule in RULES:
            found = [mean(Setting(epsilon, groups, rule, lie), [0], seeds) for lie in lies]
            print(
                f"| {groups} | {rule} | {' | '.join(f'{one:.1f}' for one in found)} |", flush=True
            )


def by_epsilon(seeds: int) -> None:
    """Prints accuracy by ε, and what the worst hidden lie takes: intervals over folds, each the mean of its seeds."""
    print(f"\n### Folds 1 to 3, {seeds} seeds each\n")
    print(
        "| ε | z | accuracy, % | points lost to the worst hidden lie | its share of the noise |\n|---|---|---|---|---|"
    )
    for epsilon in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0):
        calm = [mean(Setting(epsilon), [fold], seeds) for fold in FOLDS]
        hit = {
            share: [mean(Setting(epsilon, lie=share), [fold], seeds) for fold in FOLDS]
            for share in SHARES_OF_NOISE
        }
        worst = min(hit, key=lambda share: fmean(hit[share]))
        lost = [one - other for one, other in zip(calm, hit[worst], strict=True)]
        setting = Setting(epsilon)
        z = noise(epsilon, setting.honest, setting.members, 970)
        print(
            f"| {epsilon:g} | {z:.3g} | {shown(calm)} | {shown(lost)} | {worst:.2g} |", flush=True
        )


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed")
    seeds = 1 if parser.parse_args().quick else 3
    torch.set_num_threads(1)
    print(versions(), "a stand-in: no run of Trellis")
    by_epsilon(seeds)
    by_rule(24.0, seeds)


if __name__ == "__main__":
    main()
