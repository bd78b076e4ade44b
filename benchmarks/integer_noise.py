"""Distributed privacy: what its noise costs in time, in accuracy and in ε.

    python benchmarks/integer_noise.py                    # a minute on one core
    python benchmarks/integer_noise.py --size 100000 --members 20

Speed: the median of five runs. Accuracy: n members' random changes of the clip's length, so that nothing is cut;
the error of their mean through the stage, against Gaussian noise of the same z on the exact mean by a trusted server.
All members are counted on and come; where m of n are counted on, all n still add noise, √(n/m) times as much. The
first z is next to nothing: what is left is what rotation, rounding and float32 do.
ε: by the Rényi accountant, for the Gaussian mechanism and for what is accounted here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np
from common import versions

from strategies.privacy.accountants import make_accountant
from strategies.privacy.events import GaussianRelease
from strategies.privacy.integers import discrete_gaussian, skellam
from strategies.privacy.lattice import renyi
from strategies.privacy.rotation import Rotation
from strategies.privacy.rounding import rounded
from strategies.privacy.steps import Steps
from strategies.protocols import ClientContext
from strategies.stages.integer_noise import IntegerNoise
from strategies.update import DELTA, Layout, Section, Update

BOUND = 1.0
DELTA_OF_EPSILON = 1e-5


def seconds(action: Callable[[], object], runs: int = 5) -> float:
    """The median, after one run that does not count."""
    taken = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return median(taken[1:])


def numbers(noise: str, size: int, members: int, z: float, part: float) -> Steps:
    """Settings of a round of which so large a part of the members adds noise at least."""
    return Steps(noise, z, max(1, round(part * members)), members, {DELTA: size})


def samplers(size: int) -> None:
    """Nanoseconds an element."""
    print("| σ of a share | discrete Gaussian, ns an element | Skellam, ns an element |")
    print("| --: | --: | --: |")
    for deviation in (1.0, 100.0, 400.0, 1e4, 1e6):
        one, other = (
            seconds(lambda law=law, v=deviation**2: law(v, size)) / size * 1e9
            for law in (discrete_gaussian, skellam)
        )
        print(f"| {deviation:,.0f} | {one:.0f} | {other:.0f} |")


def of_client(vector: np.ndarray) -> Update:
    """A client's clipped update."""
    layout = Layout(("w",), (vector.shape,))
    return Update({DELTA: Section(vector, layout, BOUND)}, 1.0, (0,), 0)


def parts(size: int, members: int) -> None:
    """Milliseconds of each part of a client's half, and of the whole of both halves."""
    steps = numbers("skellam", size, members, 1.0, 0.6)
    vector = _changes(1, size)[0]
    rotation, scaled = Rotation(bytes(32), size), vector * (steps.norm / BOUND)
    stage = IntegerNoise(lambda: steps, lambda: {DELTA: BOUND})
    context = ClientContext(0, 1, stage.configure())
    sent = stage.encode(of_client(vector), context)
    rows = {
        "seed to signs": lambda: Rotation(bytes(32), size),
        "rotation": lambda: rotation.forward(vector),
        "rounding": lambda: rounded(scaled.astype(np.float64), steps.norm),
        "Skellam noise": lambda: skellam(steps.variance, size),
        "all of a client's half": lambda: stage.encode(of_client(vector), context),
        "all of the server's half": lambda: stage.decode(sent),
    }
    print("| | ms |")
    print("| --- | --: |")
    for name, action in rows.items():
        print(f"| {name} | {seconds(action) * 1e3:.1f} |")


def errors(size: int, members: int) -> None:
    """The error of a mean, relative to Gaussian noise's."""
    rows = _changes(members, size)
    exact = rows.mean(axis=0, dtype=np.float64)
    print("| noise | z | steps in C | σ of a share, steps | rms error | Gaussian's | ratio |")
    print("| --- | --: | --: | --: | --: | --: | --: |")
    for noise in ("discrete_gaussian", "skellam"):
        for z in (1e-6, 0.3, 1.0, 3.0):
            steps = numbers(noise, size, members, z, 1.0)
            stage = IntegerNoise(lambda steps=steps: steps, lambda: {DELTA: BOUND})
            context = ClientContext(0, 1, stage.configure())
            total = np.zeros(size)
            for row in rows:
                total += stage.encode(of_client(row), context).delta.vector
            mean = Section((total / members).astype(np.float32), Layout(("w",), ((size,),)))
            decoded = stage.decode(Update({DELTA: mean}, 1.0, tuple(range(members)), 0))
            error = float(np.sqrt(np.mean((decoded.delta.vector - exact) ** 2)))
            gaussian = z * BOUND / members
            print(
                f"| {noise.replace('_', ' ')} | {z} | {steps.norm:,.0f} | {steps.variance**0.5:,.0f}"
                f" | {error:.3e} | {gaussian:.3e} | {error / gaussian:.4f} |"
            )


def epsilons(size: int, members: int, rounds: int) -> None:
    """What rounding and integer noise add to ε."""
    print(
        f"| z | ε, Gaussian | discrete Gaussian | Skellam | ({rounds} rounds, δ = {DELTA_OF_EPSILON:g})"
    )
    print("| --: | --: | --: | --: |")
    for z in (1.0, 3.0, 10.0, 30.0):
        releases = [GaussianRelease(z)]
        releases += [
            numbers(noise, size, members, z, 0.6).release()
            for noise in ("discrete_gaussian", "skellam")
        ]
        found = []
        for release in releases:
            account = make_accountant("rdp")
            account.step(release, rounds)
            found.append(account.epsilon(DELTA_OF_EPSILON))
        print(f"| {z:g} | " + " | ".join(f"{one:.4f}" for one in found) + " |")


def room(z: float) -> None:
    """How fine the steps are for several sizes of cohort and model."""
    print("| members | elements | steps in C | L after rounding, over c | σ of a share, steps |")
    print("| --: | --: | --: | --: | --: |")
    for members in (10, 100, 1_000, 10_000):
        for size in (10**5, 10**7):
            steps = numbers("skellam", size, members, z, 0.6)
            print(
                f"| {members:,} | {size:,} | {steps.norm:,.0f} | {steps.rounded / steps.norm:.7f}"
                f" | {steps.variance**0.5:,.0f} |"
            )


def _changes(members: int, size: int) -> np.ndarray:
    """Random vectors a hair within the clip's length."""
    rows = np.random.default_rng(1).normal(size=(members, size))
    rows *= BOUND * (1 - 1e-6) / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/integer_noise.py --size 100000 --members 20",
    )
    parser.add_argument("--size", type=int, default=1_000_000, help="elements of a vector")
    parser.add_argument("--members", type=int, default=20, help="of a sum")
    parser.add_argument("--rounds", type=int, default=100, help="that ε is for")
    options = parser.parse_args()
    print(versions(), f"{options.size:,} elements, {options.members} members\n")
    samplers(options.size)
    print()
    parts(options.size, options.members)
    print()
    errors(min(options.size, 200_000), options.members)
    print()
    epsilons(options.size, options.members, options.rounds)
    print()
    room(1.0)
    release = numbers("skellam", options.size, options.members, 1.0, 0.6).release(0.1, "poisson")
    spent = seconds(lambda: renyi(release, [1 + x / 10 for x in range(1, 630)]))
    print(f"\n629 orders of a sampled release: {spent * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
