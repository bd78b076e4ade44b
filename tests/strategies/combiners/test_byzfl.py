"""Equality with ByzFL where the definitions agree, to 1e-6; its answers are stored (`benchmarks/byzfl_vectors.py`)."""

import json
from pathlib import Path

import numpy as np
import pytest

from strategies.combiners import TrimmedMean, functional

STORED = json.loads(Path(__file__).with_name("byzfl.json").read_text())
CASES = STORED["cases"]

RULES = {
    "mean": lambda x, f: functional.mean(x),
    "median": lambda x, f: functional.median(x),
    "trimmed_mean": lambda x, f: functional.trimmed_mean(x, f=f),
    "geometric_median": lambda x, f: functional.geometric_median(x, iterations=5000),
    "centered_clipping": lambda x, f: functional.centered_clipping(x, tau=2.0),
    "centered_clipping_3": lambda x, f: functional.centered_clipping(x, tau=2.0, iterations=3),
    "nnm": lambda x, f: functional.nnm(x, f=f),
    "nnm_trimmed_mean": lambda x, f: functional.nnm(x, f=f, rule=TrimmedMean()),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['n']}x{case['d']}")
def test_our_answer_is_byzfls(case, rule):
    shape = case["n"], case["d"]
    updates = np.random.default_rng(case["seed"]).standard_normal(shape, dtype=np.float32)
    wanted = np.array(case["answers"][rule])
    assert np.allclose(RULES[rule](updates, case["f"]), wanted, rtol=0, atol=1e-6)


def test_every_stored_answer_is_held_against_ours():
    assert {name for case in CASES for name in case["answers"]} == set(RULES)
