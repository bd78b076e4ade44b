"""The rings that the guide names are those that are planned."""

import re
from pathlib import Path

import pytest

from clients.encrypted.plan import plan_of
from clients.encrypted.ring import MOST_BITS
from clients.encrypted.spec import Spec

GUIDE = Path(__file__).parents[3] / "docs" / "encrypted_training.md"
ROWS = re.findall(
    r"^\| ([\d →]+)(?:, (squares|cubes))? \| (ce|strict) \| (\d+) \| ([\d ]+) \| (\d+) of (\d+) \|$",
    GUIDE.read_text(),
    re.MULTILINE,
)


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_the_guides_rings(row: tuple[str, ...]) -> None:
    sizes, kind, mode, degree, bits, total, most = row
    plan = plan_of(
        Spec(
            tuple(map(int, sizes.split(" → "))),
            "cubic" if kind == "cubes" else "square",
            "squared" if mode == "strict" else "cross_entropy",
            256,
        )
    )
    assert plan.ring.degree == int(degree)
    assert list(plan.ring.bits) == list(map(int, bits.split()))
    assert (sum(plan.ring.bits), MOST_BITS[plan.ring.degree]) == (int(total), int(most))


def test_all_rows_are_read() -> None:
    assert len(ROWS) == 8
