"""What accountants say and what they cost: known runs, milliseconds a round, and found noise; a minute on one core.

    python benchmarks/accounting.py
    python benchmarks/accounting.py --rounds 200      # for the seconds a round

Reference: dp_accounting's loss distributions, at a step that is fine for each run. Flower's accountant is asked what
its fixed-clipping strategy asks each round: would one more be too many, compose it, and what is spent. Processor time,
which does not count what else the machine does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import get_args

from common import versions
from dp_accounting.pld import privacy_loss_distribution as reference
from flwr.serverapp import GaussianPrivacyEvent, PrivacyConfig, RdpAccountant
from flwr.supercore.privacy_accounting import NeighboringRelation, SamplingMethod

from strategies.privacy.accountants import AccountantName, calibrate, make_accountant
from strategies.privacy.events import GaussianRelease
from strategies.privacy.flower import FlowerAccountant

DELTA = 1e-5
# noise multiplier, rate, releases, δ, step of the reference
RUNS = [
    (1.0, 0.01, 1, 1e-6, 1e-4),
    (1.0, 0.01, 1_000, 1e-5, 1e-4),
    (1.0, 0.01, 10_000, 1e-9, 1e-3),
    (0.5, 0.1, 1_000, 1e-5, 1e-3),
    (0.3, 0.01, 100, 1e-5, 1e-3),
    (5.0, 0.001, 1_000, 1e-5, 2e-6),
    (10.0, 0.01, 1_000, 1e-6, 1e-5),
    (2.0, 0.2, 5_000, 1e-6, 1e-3),
    (1.0, 0.5, 20, 1e-8, 1e-3),
    (1.0, 1e-4, 1_000, 1e-5, 1e-5),
]


def poisson(noise: float, rate: float) -> GaussianRelease:
    """A release in which each is in by a coin of its own."""
    return GaussianRelease(noise, rate, "poisson")


def spent(
    name: AccountantName, release: GaussianRelease, count: int, delta: float = DELTA
) -> float:
    """ε of equal releases."""
    accountant = make_accountant(name, release.relation)
    accountant.step(release, count)
    return accountant.epsilon(delta)


def known() -> None:
    """The textbook's run by each accountant, with and without what sampling amplifies."""
    print(
        f"\nz = 1, q = 0.01, 1,000 releases, δ = {DELTA:g}: ε by accountant and by how the 1 % are drawn"
    )
    print(f"{'':6}{'Poisson':>12}{'fixed size*':>14}{'not amplified':>16}")
    for name in get_args(AccountantName):
        runs = (
            poisson(1.0, 0.01),
            GaussianRelease(1.0, 0.01, "fixed", "replace_one"),
            GaussianRelease(1.0),
        )
        print(f"{name:6}" + "".join(
            f"{spent(name, release, 1_000):>{width}.2f}"
            for release, width in zip(runs, (12, 14, 16), strict=True)
        ))  # fmt: skip
    print("* neighbours by replacing one, z over twice the clip's bound; amplified by rdp only")


def against_reference() -> None:
    """ε beside dp_accounting's, and what one question takes."""
    print("\nloss distributions beside dp_accounting's")
    print(f"{'z':>6}{'q':>8}{'releases':>10}{'δ':>8}{'ours':>12}{'dp_accounting':>16}{'ratio':>9}")
    for noise, rate, count, delta, step in RUNS:
        one = reference.from_gaussian_mechanism(
            noise, sampling_prob=rate, value_discretization_interval=step
        )
        theirs = one.self_compose(count).get_epsilon_for_delta(delta)
        ours = spent("pld", poisson(noise, rate), count, delta)
        print(
            f"{noise:>6g}{rate:>8g}{count:>10,}{delta:>8g}{ours:>12.6g}{theirs:>16.6g}{ours / theirs:>9.4f}"
        )


def processor(action: Callable[[], object]) -> float:
    """Seconds of processor time."""
    began = time.process_time()
    action()
    return time.process_time() - began


def of_rounds(
    name: AccountantName, rounds: int, release: Callable[[int], GaussianRelease]
) -> float:
    """Milliseconds a round, amortised, where ε is asked after each."""
    accountant = make_accountant(name)

    def play() -> None:
        for number in range(rounds):
            accountant.step(release(number))
            accountant.epsilon(DELTA)

    return 1e3 * processor(play) / rounds


def speed(rounds: int) -> None:
    """Milliseconds a round, ours and Flower's."""
    print(f"\nms of processor a round, ε asked after each of {rounds:,} (q = 0.01)")
    kinds: dict[str, Callable[[int], GaussianRelease]] = {
        "Poisson, z = 1": lambda _: poisson(1.0, 0.01),
        "Poisson, z another each round": lambda number: poisson(1.2 - 2e-4 * number, 0.01),
        "Poisson, z = 1, q = 0.0001": lambda _: poisson(1.0, 1e-4),
        "not amplified, z another each round": lambda number: GaussianRelease(20 - 1e-3 * number),
    }
    for label, release in kinds.items():
        for name in ("pld", "rdp"):
            if name == "pld" or label == "Poisson, z = 1":
                print(f"{name:6}{label:40}{of_rounds(name, rounds, release):>9.2f}")
    print("\nms of processor for a round's three questions of Flower's strategy, by rounds so far")
    config = PrivacyConfig(
        DELTA, 1000, NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.POISSON, 100.0
    )
    event = GaussianPrivacyEvent(1.0, 10, 1000)
    for label, accountant in (
        ("flwr's RdpAccountant", RdpAccountant(config)),
        ("ours, rdp", FlowerAccountant(config, "rdp")),
        ("ours, pld", FlowerAccountant(config, "pld")),
    ):
        taken = []

        def play(accountant: RdpAccountant | FlowerAccountant = accountant) -> None:
            accountant.would_exceed(event)
            accountant.compose(event)
            accountant.get_privacy_spent()

        for number in range(1, 101):
            seconds = processor(play)
            if number in (1, 10, 100):
                taken.append(f"{1e3 * seconds:>10.1f}")
        print(f"{label:24}" + "".join(taken) + "   (1, 10, 100 rounds)")


def found() -> None:
    """Noise for a budget."""
    print(f"\nnoise for ε = 1 over 1,000 rounds, q = 0.01, δ = {DELTA:g}")
    for name in get_args(AccountantName):
        began = time.process_time()
        noise = calibrate(name, 1.0, DELTA, lambda z: [(poisson(z, 0.01), 1_000)])
        seconds = time.process_time() - began
        epsilon = spent(name, poisson(noise, 0.01), 1_000)
        print(f"{name:6}z = {noise:.4f}, ε = {epsilon:.4f}, found in {seconds:.2f} s")


def main() -> None:
    """Prints all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1_000)
    arguments = parser.parse_args()
    print(versions(), f"dp-accounting {version('dp-accounting')}, opacus {version('opacus')}")
    known()
    against_reference()
    speed(arguments.rounds)
    found()


if __name__ == "__main__":
    main()
