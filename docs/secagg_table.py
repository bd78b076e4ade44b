"""The table "Parameters" of docs/secure_aggregation.md: what `choose` gives for rounds of several sizes.

python docs/secagg_table.py
"""

from __future__ import annotations

from strategies.secagg.parameters import Parameters, choose

MEMBERS = (5, 10, 50, 100, 500, 1_000, 5_000)
DROPOUTS = (0.05, 0.3)
COLLUDERS = 0.1


def table() -> str:
    """Markdown, a line for each number of members and part that drops out."""
    lines = [
        "| clients | drop out | neighbours | threshold | of holders | exposed | halted "
        "| draws | threshold | of holders | least honest | quorum | exposed | halted |",
        "|" + " --: |" * 14,
    ]
    for members in MEMBERS:
        for dropouts in DROPOUTS:
            honest, malicious = (
                choose(members, dropouts=dropouts, colluders=COLLUDERS, malicious=mode)
                for mode in (False, True)
            )
            cells = [
                f"{members:,}", f"{dropouts:.0%}",
                honest.degree, honest.threshold, honest.holders, *_odds(honest),
                malicious.degree, malicious.threshold, malicious.holders,
                malicious.least_honest, malicious.quorum, *_odds(malicious),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _odds(chosen: Parameters) -> tuple[str, str]:
    def power(log2: float) -> str:
        return "0" if log2 == -float("inf") else f"2^{log2:.1f}"

    return power(chosen.log2_exposed), power(chosen.log2_halted)


if __name__ == "__main__":
    print(table(), end="")
