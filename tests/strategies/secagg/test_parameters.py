"""The smallest graph that will do: held against exact fractions, and against simulated rounds."""

import math
import runpy
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.secagg.graph import circulant
from strategies.secagg.parameters import LEAST_DEGREE, choose
from tests.strategies.secagg.test_tails import exact_tail, log2

DOCS = Path(__file__).parents[3] / "docs"

parts = st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.3, 0.4])


def exposed(n, colluding, removed, degree, threshold):
    """Semi-honest, in exact fractions."""
    apart = Fraction(0)
    if degree < n - 1:
        apart = Fraction(n * n, 2) * math.prod(
            Fraction(max(removed - j, 0), n - j) for j in range(degree)
        )
    return n * exact_tail(n - 1, colluding, degree, threshold) + apart


def halted(n, dropped, degree, threshold):
    lost = degree + 1 - threshold
    survivor = (n - dropped) * exact_tail(n - 1, dropped, degree, lost + 1)
    return survivor + (dropped * exact_tail(n - 1, dropped - 1, degree, lost) if dropped else 0)


@settings(deadline=None)
@given(st.integers(3, 60), parts, parts, st.sampled_from([4, 10, 20]))
def test_the_choice_is_the_smallest_that_exact_fractions_allow(n, dropouts, colluders, bits):
    dropped, colluding = int(Fraction(str(dropouts)) * n), int(Fraction(str(colluders)) * n)

    def thresholds(degree):
        return [
            threshold
            for threshold in range((degree + 1) // 2 + 1, degree + 2)
            if exposed(n, colluding, colluding + dropped, degree, threshold) <= Fraction(1, 2**bits)
            and halted(n, dropped, degree, threshold) <= Fraction(1, 2**bits)
        ]

    able = {k: thresholds(k) for k in [*range(LEAST_DEGREE, n - 1, 2), n - 1]}
    able = {k: found for k, found in able.items() if found and n - dropped - colluding >= 2}
    try:
        chosen = choose(
            n, dropouts=dropouts, colluders=colluders, privacy_bits=bits, correctness_bits=bits
        )
    except ValueError:
        assert not able
        return
    degree = min(able)
    assert (chosen.degree, chosen.threshold) == (degree, able[degree][0])
    assert chosen.log2_exposed == pytest.approx(
        log2(exposed(n, colluding, colluding + dropped, degree, chosen.threshold)), abs=1e-8
    )
    assert chosen.log2_halted == pytest.approx(
        log2(halted(n, dropped, degree, chosen.threshold)), abs=1e-8
    )
    # The odds of a sparse graph are those of so many drop-outs and no more; a complete one stays whole.
    fewest = max(chosen.threshold, colluding + 2) if chosen.complete else n - dropped
    assert chosen.quorum == fewest <= n - dropped
    assert chosen.least_honest == fewest - colluding >= 2


@settings(deadline=None, max_examples=40)
@given(st.integers(3, 60), parts, parts, st.sampled_from([4, 20]))
def test_against_a_malicious_server_all_that_is_promised_holds_in_exact_fractions(
    n, dropouts, colluders, bits
):
    dropped, colluding = int(Fraction(str(dropouts)) * n), int(Fraction(str(colluders)) * n)
    try:
        p = choose(
            n,
            dropouts=dropouts,
            colluders=colluders,
            malicious=True,
            privacy_bits=bits,
            correctness_bits=bits,
        )
    except ValueError:
        assert (n + colluding) // 2 + 1 > n - dropped
        return
    allowed = Fraction(1, 2**bits)
    near = n * exact_tail(n - 1, colluding, p.degree, p.colluders_near + 1)
    assert near <= allowed / 2
    if p.colluders_near:  # the smallest
        assert n * exact_tail(n - 1, colluding, p.degree, p.colluders_near) > allowed / 2
    assert 2 * p.threshold > p.holders + p.colluders_near
    assert p.threshold <= p.holders
    assert halted(n, dropped, p.degree, p.threshold) <= allowed
    assert 2 * p.quorum - n > colluding
    assert p.quorum <= n - dropped
    inside = p.threshold - 1 - p.colluders_near
    if not p.complete:
        near += sum(
            math.comb(n, s) * exact_tail(n - 1, s - 1, p.degree, inside) ** s
            for s in range(1, p.least_honest)
        )
    assert near <= allowed
    assert p.log2_exposed == pytest.approx(log2(near), abs=1e-8)
    assert 2 <= p.least_honest <= p.quorum - colluding


@pytest.mark.parametrize("malicious", [False, True])
@pytest.mark.parametrize(("members", "holders", "threshold"), [(3, 3, 2), (5, 5, 3), (10, 10, 6)])
def test_a_handful_mask_with_everybody(members, holders, threshold, malicious):
    chosen = choose(members, dropouts=0.3, colluders=0.1, malicious=malicious)
    assert (chosen.complete, chosen.holders, chosen.threshold) == (True, holders, threshold)
    assert chosen.log2_exposed == chosen.log2_halted == -math.inf


@pytest.mark.parametrize("malicious", [False, True])
def test_more_is_asked_for_more(malicious):
    def degree(n=400, dropouts=0.2, colluders=0.1, **options):
        return choose(
            n, dropouts=dropouts, colluders=colluders, malicious=malicious, **options
        ).degree

    assert degree() <= degree(dropouts=0.25) <= degree(dropouts=0.3)
    assert degree() <= degree(colluders=0.15) <= degree(colluders=0.2)
    assert degree(privacy_bits=20) <= degree() <= degree(privacy_bits=80)
    assert degree(correctness_bits=10) <= degree() <= degree(correctness_bits=40)
    assert degree(n=4_000) < 2 * degree()
    assert degree(complete=True) == 399


def test_rounds_fail_no_more_often_than_chosen():
    """Simulation, seeded: 400 graphs of 60 clients, asked to hide and to complete but for 1 in 8 each."""
    p = choose(60, dropouts=0.3, colluders=0.3, privacy_bits=3, correctness_bits=3)
    assert not p.complete
    rng, rounds = np.random.default_rng(1), 400
    opened = stopped = 0
    for _ in range(rounds):
        graph = circulant(rng.permutation(60).tolist(), p.degree)
        colluding, gone = (set(rng.permutation(60)[:18].tolist()) for _ in range(2))
        opened += any(
            len(colluding & set(graph[i])) >= p.threshold for i in range(60) if i not in colluding
        )
        stopped += any(len({i, *graph[i]} - gone) < p.threshold for i in range(60))
    spare = 4 * math.sqrt(rounds / 8)
    assert opened <= rounds * 2**p.log2_exposed + spare <= rounds / 8 + spare
    assert stopped <= rounds * 2**p.log2_halted + spare <= rounds / 8 + spare


@pytest.mark.parametrize("malicious", [False, True])
def test_five_thousand_clients_are_a_matter_of_a_second(malicious):
    began = time.process_time()
    chosen = choose(5_000, dropouts=0.3, colluders=0.1, malicious=malicious)
    assert time.process_time() - began < 2  # about 0.3 s; the rest is for slower processors
    assert chosen.log2_exposed <= -40
    assert chosen.log2_halted <= -20


def test_one_line_for_people():
    said = choose(100, dropouts=0.3, colluders=0.1).describe()
    assert said == (
        "each of 100 clients masks with 58 others, 30 of its 59 shareholders open a mask; fails to hide"
        " with probability 0, to complete ≤ 2^-22 (30% drop out, 10% collude);"
        " every sum holds 60 honest clients or more"
    )
    said = choose(500, dropouts=0.05, colluders=0.1, malicious=True).describe()
    assert "masks with 54 that it draws and all that draw it, 41 of its 55 shareholders" in said
    assert "malicious server, fails to hide with probability ≤ 2^-42, to complete ≤ 2^-21" in said
    assert "\n" not in said


def test_the_documented_table_is_what_is_chosen():
    table = runpy.run_path(str(DOCS / "secagg_table.py"))["table"]()
    assert table in (DOCS / "secure_aggregation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("members", "options", "words"),
    [
        (2, {}, "2 clients cannot hide"),
        (10, {"dropouts": 1.0}, r"dropouts = 1.0: must be at least 0"),
        (10, {"colluders": -0.1}, r"colluders = -0.1"),
        (10, {"dropouts": math.nan}, "dropouts = nan"),
        (20, {"dropouts": 0.5}, r"20 clients, dropouts = 0.5, colluders = 0.1: no threshold .* 10 survivors; assume"),
        (20, {"colluders": 0.8}, "above 16 colluders"),
        (20, {"dropouts": 0.45, "malicious": True}, "12 signatures.* more than 11 survivors; assume fewer"),
    ],
)  # fmt: skip
def test_what_no_graph_can_do_is_refused_with_the_mend(members, options, words):
    with pytest.raises(ValueError, match=words):
        choose(members, **{"dropouts": 0.3, "colluders": 0.1, **options})
