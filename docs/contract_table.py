"""The README's table "what composes with what": made by asking the contract about every combination of parts.

    python docs/contract_table.py                      prints the table
    python docs/contract_table.py --write README.md    puts it between the file's markers

A new part is one more entry in CLIENTS, STAGES, COMBINERS or SERVERS.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from strategies.collectors import Ckks, Masked, Plain
from strategies.combiners import (
    Bucketing,
    Bulyan,
    CenteredClipping,
    FLTrust,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    NearestNeighborMixing,
    NormBounding,
    TrimmedMean,
)
from strategies.contract import Claim, ContractError
from strategies.pipeline import Pipeline
from strategies.protocols import Collector, Combiner, Job, Stage
from strategies.server_models import SGD, Adagrad, Adam, Scaffold, ServerOptimizer, Yogi
from strategies.stages import Clip
from strategies.update import CONTROL, DELTA, Section, Update

BEGIN, END = "<!-- contract:begin -->", "<!-- contract:end -->"


@dataclass(frozen=True)
class Clients:
    """A kind of client: how its updates are collected, and which sections it sends."""

    collector: Collector
    sections: frozenset[str]


CLIENTS: dict[str, Clients] = {
    "vanilla Flower clients": Clients(Plain(vanilla=True), frozenset({DELTA})),
    "`client=sgd`, `proximal`": Clients(Plain(), frozenset({DELTA})),
    "`client=scaffold`": Clients(Plain(), frozenset({DELTA, CONTROL})),
    "`collector=masked`": Clients(Masked(max_weight=1000), frozenset({DELTA})),
    "`collector=ckks`": Clients(Ckks(max_weight=1000), frozenset({DELTA})),
    "`collector=masked_groups`": Clients(Masked(groups=3), frozenset({DELTA})),
}
STAGES: dict[str, tuple[Stage, ...]] = {"": (), "with `clip`": (Clip(),)}
COMBINERS: dict[str, Combiner] = {
    "mean, by examples": Mean(weighting="examples"),
    "mean, uniform": Mean(weighting="uniform"),
    "`krum`": Krum(f=0),
    "`multi_krum`": MultiKrum(f=0),
    "`bulyan`": Bulyan(f=0),
    "`median`": Median(f=0),
    "`trimmed_mean`": TrimmedMean(f=0),
    "`geometric_median`": GeometricMedian(f=0),
    "`centered_clipping`": CenteredClipping(f=0),
    "`norm_bounding`": NormBounding(f=0),
    "`fltrust`": FLTrust(f=0),
    "`nnm`": NearestNeighborMixing(f=0),
    "`bucketing`": Bucketing(f=0),
}
SERVERS: dict[str, type[ServerOptimizer]] = {
    "`sgd`": SGD,
    "`adagrad`": Adagrad,
    "`adam`": Adam,
    "`yogi`": Yogi,
    "`scaffold`": Scaffold,
}


def root_update(job: Job) -> Update:
    """The server's own update, where a rule asks for one: 1 everywhere."""
    sections = {
        name: Section(np.ones(layout.size, np.float32), layout)
        for name, layout in job.layouts.items()
    }
    return Update(sections, 1.0, (), job.version)


@dataclass(frozen=True)
class Combination:
    """One choice of each part, by name."""

    client: str
    stage: str
    combiner: str
    server: str

    def pipeline(self) -> Pipeline:
        """The pipeline of these parts, not yet checked."""
        clients = CLIENTS[self.client]
        return Pipeline(
            collector=clients.collector,
            stages=STAGES[self.stage],
            combiner=copy(COMBINERS[self.combiner]),  # some remember their rounds
            optimizer=SERVERS[self.server](),
            client_sections=clients.sections,
            root=root_update,
        )

    def answer(self) -> Claim | ContractError:
        """What the contract says of it."""
        try:
            return self.pipeline().check()
        except ContractError as error:
            return error


def combinations() -> Iterator[Combination]:
    """Every choice of one of each."""
    for names in product(CLIENTS, STAGES, COMBINERS, SERVERS):
        yield Combination(*names)


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
    lines: list[Sequence[str]] = [head, ["---", "---", *[":-:"] * len(columns)]]
    for cells, servers in rows.items():
        lines += [(names, combiners, *cells) for names, combiners in _merged(servers)]
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


def _merged(servers: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Servers that go with the same combiners, together."""
    by_combiners: dict[tuple[str, ...], list[str]] = {}
    for server, combiners in servers.items():
        by_combiners.setdefault(tuple(combiners), []).append(server)
    for same, names in by_combiners.items():
        yield ", ".join(names), _together(same)


def _together(combiners: tuple[str, ...]) -> str:
    """Combiners by name, or by those that are not among them where these are fewer."""
    others = [name for name in COMBINERS if name not in combiners]
    if not others:
        return "any"
    return f"any but {'; '.join(others)}" if len(others) < len(combiners) else "; ".join(combiners)


def insert(text: str) -> str:
    """The text with the present table between its markers.

    Raises:
        ValueError: it has not exactly one pair of markers, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after or END in before:
        raise ValueError(f"the text needs one line {BEGIN} and, further down, one line {END}")
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    """Prints the table, or writes it into a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="put it between FILE's markers")
    path: Path | None = parser.parse_args(arguments).write
    if path is None:
        sys.stdout.write(table())
        return 0
    try:
        path.write_text(insert(path.read_text(encoding="utf-8")), encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{path}: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
