"""ByzFL's answers to a few updates, for tests that hold ours against them: run in an environment that has ByzFL.

    build/byzfl/bin/python benchmarks/byzfl_vectors.py > tests/strategies/combiners/byzfl.json

float64 through ByzFL's numpy path. Only rules whose definitions agree with ours: its Krum and Multi-Krum sum n − f − 1
distances where the paper sums n − f − 2, so they are not here. Its geometric median starts from the origin and ours
from the mean: both are taken to convergence.
"""

import json
import sys
from importlib.metadata import version

import byzfl
import numpy as np

CASES = [(7, 12, 2, 1), (10, 30, 3, 2), (20, 8, 6, 3), (31, 20, 9, 4)]
"""n, d, f, seed."""


def main() -> None:
    """Prints one JSON document."""
    cases = []
    for n, d, f, seed in CASES:
        updates = np.random.default_rng(seed).standard_normal((n, d), dtype=np.float32)
        wide = updates.astype(np.float64)
        found = {
            "median": byzfl.Median()(wide),
            "trimmed_mean": byzfl.TrMean(f)(wide),
            "geometric_median": byzfl.GeometricMedian(nu=1e-6, T=5000)(wide),
            "centered_clipping": byzfl.CenteredClipping(L=1, tau=2.0)(wide),
            "centered_clipping_3": byzfl.CenteredClipping(L=3, tau=2.0)(wide),
            "nnm": byzfl.NNM(f)(wide),
            "nnm_trimmed_mean": byzfl.TrMean(f)(byzfl.NNM(f)(wide)),
            "mean": byzfl.Average()(wide),
        }
        answers = {name: np.round(value, 9).tolist() for name, value in found.items()}
        cases.append({"n": n, "d": d, "f": f, "seed": seed, "answers": answers})
    json.dump({"byzfl": version("byzfl"), "numpy": np.__version__, "cases": cases}, sys.stdout)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
