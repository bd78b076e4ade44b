"""The tables "what composes with what": made by asking the contract about every combination of parts.

    python docs/contract_table.py                              prints them
    python docs/contract_table.py --write README.md            puts the first between the file's markers
    python docs/contract_table.py --write docs/privacy.md      likewise the second, of privacy
    python docs/contract_table.py --write docs/compression.md  likewise the third, of compression
    python docs/contract_table.py --write docs/lora_aggregation.md  likewise the fourth, of adapters

The parts, and their combinations, are `contract_parts.py`'s.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path

from contract_parts import (
    ADAPTED,
    ADAPTERS,
    BESIDE,
    CLIENTS,
    COLLECTORS,
    COMBINERS,
    COMPRESSED,
    COMPRESSIONS,
    PROMISES,
    RULES,
    SERVERS,
    STAGES,
    WAYS,
    AdaptedCombination,
    Combination,
    CompressedCombination,
    PrivateCombination,
)

from strategies.contract import Claim, ContractError

BEGIN, END = "<!-- contract:begin -->", "<!-- contract:end -->"
PRIVACY_BEGIN, PRIVACY_END = "<!-- privacy:begin -->", "<!-- privacy:end -->"
COMPRESSION_BEGIN, COMPRESSION_END = "<!-- compression:begin -->", "<!-- compression:end -->"
ADAPTERS_BEGIN, ADAPTERS_END = "<!-- adapters:begin -->", "<!-- adapters:end -->"


def table() -> str:
    """The table as Markdown, with a note for each reason; rows whose cells are all equal are one."""
    columns = list(product(CLIENTS, STAGES))
    notes: list[str] = []
    rows: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for server, combiner in product(SERVERS, COMBINERS):
        answers = [Combination(*column, combiner, server).answer() for column in columns]
        cells = tuple(_cell(answer, notes) for answer in answers)
        rows.setdefault(cells, {}).setdefault(server, []).append(combiner)
    head = ["server optimiser", "combiner", *(" ".join(column).strip() for column in columns)]
    return _written(head, rows, COMBINERS, notes)


def private_table() -> str:
    """The table of privacy, likewise."""
    notes: list[str] = []
    rows: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for privacy, rule in product(PROMISES, RULES):
        answers = [PrivateCombination(privacy, column, rule).answer() for column in COLLECTORS]
        cells = tuple(_cell(answer, notes) for answer in answers)
        rows.setdefault(cells, {}).setdefault(privacy, []).append(rule)
    head = ["`privacy=`", "`combiner=`", *COLLECTORS]
    return _written(head, rows, RULES, notes)


def compression_table() -> str:
    """The table of compression, likewise."""
    notes: list[str] = []
    rows: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for compression, use in product(COMPRESSIONS, COMPRESSED):
        answers = [CompressedCombination(compression, use, one).answer() for one in COLLECTORS]
        cells = tuple(_cell(answer, notes) for answer in answers)
        rows.setdefault(cells, {}).setdefault(compression, []).append(use)
    head = ["`compression=`", "with", *COLLECTORS]
    return _written(head, rows, COMPRESSED, notes)


def adapted_table() -> str:
    """The table of adapters, likewise."""
    notes: list[str] = []
    rows: dict[tuple[str, ...], dict[str, list[str]]] = {}
    columns = list(product(ADAPTERS, WAYS))
    for beside, combiner in product(BESIDE, ADAPTED):
        answers = [AdaptedCombination(*column, beside, combiner).answer() for column in columns]
        cells = tuple(_cell(answer, notes) for answer in answers)
        rows.setdefault(cells, {}).setdefault(beside, []).append(combiner)
    head = ["with", "`combiner=`", *(f"{adapters}; {way}" for adapters, way in columns)]
    return _written(head, rows, ADAPTED, notes)


def _written(
    head: Sequence[str],
    rows: dict[tuple[str, ...], dict[str, list[str]]],
    combiners: Iterable[str],
    notes: Sequence[str],
) -> str:
    lines: list[Sequence[str]] = [head, ["---", "---", *[":-:"] * (len(head) - 2)]]
    for cells, firsts in rows.items():
        lines += [(names, seconds, *cells) for names, seconds in _merged(firsts, tuple(combiners))]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return body + "\n\n" + "\n".join(f"{i}. {note}" for i, note in enumerate(notes, 1)) + "\n"


def _cell(answer: Claim | ContractError, notes: list[str]) -> str:
    """A tick, or the number of the reason, which is added to the notes where it is new."""
    if isinstance(answer, Claim):
        return "✓"
    note = f"{answer.why[0].upper()}{answer.why[1:]}; {answer.instead}."
    if note not in notes:
        notes.append(note)
    return f"– ({notes.index(note) + 1})"


def _merged(rows: dict[str, list[str]], every: Sequence[str]) -> Iterator[tuple[str, str]]:
    """First parts that go with the same combiners, together."""
    by_combiners: dict[tuple[str, ...], list[str]] = {}
    for first, combiners in rows.items():
        by_combiners.setdefault(tuple(combiners), []).append(first)
    for same, names in by_combiners.items():
        yield ", ".join(names), _together(same, every)


def _together(combiners: tuple[str, ...], every: Sequence[str]) -> str:
    """Combiners by name, or by those that are not among them where these are fewer."""
    others = [name for name in every if name not in combiners]
    if not others:
        return "any"
    return f"any but {'; '.join(others)}" if len(others) < len(combiners) else "; ".join(combiners)


TABLES: dict[tuple[str, str], Callable[[], str]] = {
    (BEGIN, END): table,
    (PRIVACY_BEGIN, PRIVACY_END): private_table,
    (COMPRESSION_BEGIN, COMPRESSION_END): compression_table,
    (ADAPTERS_BEGIN, ADAPTERS_END): adapted_table,
}
"""What stands between each pair of markers."""


def insert(text: str) -> str:
    """The text with the present table between its markers, or each table between its own.

    Raises:
        ValueError: it has no marker, or not exactly one pair, in order, of one kind.
    """
    found = [markers for markers in TABLES if any(marker in text for marker in markers)]
    for begin, end in found or [(BEGIN, END)]:
        before, there, rest = text.partition(begin)
        _, last, after = rest.partition(end)
        if not there or not last or begin in rest or end in after or end in before:
            raise ValueError(f"the text needs one line {begin} and, further down, one line {end}")
        text = f"{before}{begin}\n\n{TABLES[begin, end]()}\n{end}{after}"
    return text


def main(arguments: Sequence[str]) -> int:
    """Prints the tables, or writes into a file the one that it has markers for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="put one between FILE's markers")
    path: Path | None = parser.parse_args(arguments).write
    if path is None:
        sys.stdout.write("\n".join(make() for make in TABLES.values()))
        return 0
    try:
        path.write_text(insert(path.read_text(encoding="utf-8")), encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{path}: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
