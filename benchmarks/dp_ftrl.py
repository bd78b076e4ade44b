"""DP-FTRL's noise: how far prefix sums are off at the same privacy, how near the best that is, and what a step takes.

    python benchmarks/dp_ftrl.py                  # everything, a minute
    python benchmarks/dp_ftrl.py --rounds 200

Errors are exact, not sampled: root mean squares over all rounds and all draws of the noise, of one element, in units of
what one client can change in a round, for a run that is 1-GDP in all (μ = 1). Every client takes part at most ⌈T/b⌉
times, at least b rounds apart. Beside the banded root there are

* independent noise (DP-FedAvg without amplification);
* the binary tree, read by Honaker's estimate from below (Honaker 2015, "Efficient Use of Differentially Private Binary
  Trees"; Kairouz et al. 2021, DP-FTRL's own). Its sensitivity is taken over evenly spaced schedules only, so that
  the tree may be worse than shown, never better;
* the best banded Toeplitz matrix with as many bands, found by L-BFGS from the root on;
* a bound that no factor undercuts, banded or not. The b evenly spaced schedules part the columns of C among them, and
  with signs at random a schedule's ‖C·u‖² is on average its columns' norms squared. So s² ≥ ‖C‖_F²/b, and from
  ‖A‖_* ≤ ‖B‖_F·‖C‖_F follows rms = s·‖B‖_F/√T ≥ ‖A‖_*/√(b·T).
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import numpy as np
from common import versions
from numpy.typing import NDArray
from scipy.linalg import solve_triangular, toeplitz
from scipy.optimize import minimize

from strategies.privacy.banded import BandedNoise, BandedToeplitz

SEED = 1
SEPARATIONS = (8, 32, 100)
MOMENTA = (0.0, 0.9)

Vector = NDArray[np.float64]


def powers(momentum: float, rounds: int) -> Vector:
    """The workload's coefficients: A's first column."""
    return np.cumsum(momentum ** np.arange(rounds))


def tree_error(rounds: int, separation: int) -> float:
    """Honaker's estimate from below, for prefix sums."""
    # A node of height h from its own noise and its two children's estimates, by inverse variances.
    variances = [1.0]
    while 2 ** len(variances) <= rounds:
        variances.append(1 / (1 + 1 / (2 * variances[-1])))
    of_sums = [
        sum(variance for height, variance in enumerate(variances) if number >> height & 1)
        for number in range(1, rounds + 1)
    ]
    worst = 0
    for offset in range(separation):
        asked = np.zeros(rounds)
        asked[offset::separation] = 1
        squares = 0
        for height in range(len(variances)):
            whole = rounds >> height
            nodes = asked[: whole << height].reshape(whole, -1).sum(axis=1)
            squares += int(nodes @ nodes)
        worst = max(worst, squares)
    return float(np.sqrt(worst * np.mean(of_sums)))


def best_banded(rounds: int, separation: int, momentum: float) -> float:
    """The least error of a banded Toeplitz matrix with c_0 = 1 and `separation` bands that L-BFGS finds."""
    sums = powers(momentum, rounds)
    columns = rounds - separation * np.arange(-(-rounds // separation))
    counts = np.array([(columns > lag).sum() for lag in range(separation)], float)  # of c_i² in s²
    shares = 1 - np.arange(rounds) / rounds

    def logarithm(tail: Vector) -> tuple[float, Vector]:
        """Of the mean square error, and its gradient in the tail."""
        c = np.concatenate([[1.0], tail])
        matrix = toeplitz(np.pad(c, (0, rounds - separation)), np.zeros(rounds))
        w = solve_triangular(matrix, sums, lower=True)
        squared, spread = counts @ c**2, shares @ w**2
        # d w / d c_i = -C⁻¹·(w shifted by i).
        back = solve_triangular(matrix, shares * w, lower=True, trans="T")
        slopes = np.array([-2 * back[lag:] @ w[: rounds - lag] for lag in range(separation)])
        gradient = 2 * counts * c / squared + slopes / spread
        return float(np.log(squared * spread)), gradient[1:]

    start = BandedToeplitz(separation, momentum).coefficients()[1:]
    found = minimize(logarithm, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return float(np.exp(found.fun / 2))


def errors(rounds: int) -> None:
    """The table of errors."""
    print(f"\n### Root mean square error of prefix sums, T = {rounds}, μ = 1\n")
    print(
        "| momentum | b | k | independent | tree | banded root | gain | best banded | lower bound |"
    )
    print("| --: | --: | --: | --: | --: | --: | --: | --: | --: |")
    for momentum in MOMENTA:
        sums = powers(momentum, rounds)
        nuclear = float(np.linalg.svd(toeplitz(sums, np.zeros(rounds)), compute_uv=False).sum())
        for separation in SEPARATIONS:
            k = -(-rounds // separation)
            terms = (rounds, k, separation)
            independent = BandedToeplitz(1, momentum).errors(*terms)[0]
            banded = BandedToeplitz(separation, momentum).errors(*terms)[0]
            tree = "" if momentum else f"{tree_error(rounds, separation):.1f}"
            best = best_banded(rounds, separation, momentum)
            bound = nuclear / np.sqrt(separation * rounds)
            print(
                f"| {momentum:g} | {separation} | {k} | {independent:.1f} | {tree} | {banded:.1f} |"
                f" {independent / banded:.1f}× | {best:.1f} | {bound:.1f} |",
                flush=True,
            )


def speed(size: int = 1_000_000) -> None:
    """The time of a row of C⁻¹Z, beside that of the normal numbers that it is made of."""
    rng = np.random.default_rng(SEED)
    normal = rng.standard_normal(size)
    print(f"\n### A row of C⁻¹Z for {size:,} parameters, one thread\n")
    print("| bands | ms | MB held |")
    print("| --: | --: | --: |")
    for bands in (1, *SEPARATIONS):
        stream = BandedNoise(BandedToeplitz(bands), size)
        for _ in range(bands):
            stream.next(normal.copy())
        taken = []
        for _ in range(9):
            row = normal.copy()
            began = time.perf_counter()
            stream.next(row)
            taken.append(time.perf_counter() - began)
        print(f"| {bands} | {1e3 * median(taken):.1f} | {8e-6 * size * (bands - 1):,.0f} |")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1_000, metavar="T")
    options = parser.parse_args()
    print(versions())
    errors(options.rounds)
    speed()


if __name__ == "__main__":
    main()
