"""What the audit of split runs finds, by depth of the cut and by defence: the tables of docs/split_privacy.md.

    python benchmarks/split_privacy.py                  # all five runs, minutes each
    python benchmarks/split_privacy.py plain nopeek     # or some of plain, noise, nopeek, int8, u_shaped

MiniLM with rank-8 adapters, cut in the middle, docstrings of flwr and sklearn (80 each, 32 tokens), 4 clients, 2 rounds
a run. Each is audited as `trellis privacy-audit RUN --split` does it, with fewer texts; every score is a row. NoPeek is
trained with, so it is compared between runs; noise and precision are tried on each run's activations besides.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from common import versions

from fl_app.audit.split.conduct import conduct
from fl_app.audit.split.exposure import Sizes
from fl_app.audit.target import load
from fl_app.audit.training import Progress
from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.run import run_engine

BASE = (
    "strategy=split_lora", "task=docstrings", "task.packages=[flwr,sklearn]", "task.max_per_package=80",
    "task.max_length=32", "task.partition=iid", "num_clients=4", "rounds=2", "client.lr=0.003",
    "runtime.workers=1", "evaluate.every=2",
)  # fmt: skip
RUNS = {
    "plain": (),
    "noise": ("client.noise=1",),
    "nopeek": ("client.nopeek=1",),
    "int8": ("collector.precision=int8",),
    "u_shaped": ("model.u_shaped=true",),
}
SIZES = Sizes(private=24, public=80, labelled=64, spans=4, senders=4, rounds=3, seconds=240)


def begun(title: str) -> Progress:
    """Progress that nobody watches."""
    return lambda done, total: None


def audited(name: str) -> None:
    """One run and its table."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose([*BASE, *RUNS[name], f"output_dir={folder}", f"run_name={name}"])
        result = run_engine(config, PlainConsole(io.StringIO()))
        if result.status != "completed":
            raise RuntimeError(result.reason)
        target = load(Path(result.summary_path).parent)
        document = conduct(target, SIZES, begun)
    accuracy = target.summary["final"]["accuracy"]
    print(f"\n### {name}: cut {document['cut']} of {document['blocks']}, accuracy {accuracy:.3f}\n")
    print(
        "| attack | measure | cut | setting | value (95%) | a guess | n |\n|---|---|---|---|---|---|---|"
    )
    for one in document["scores"]:
        low, high = one["interval"]
        cut = "-" if one["cut"] is None else one["cut"]
        print(
            f"| {one['attack']} | {one['measure']} | {cut} | {one['setting']} | "
            f"{one['value']:.3f} ({low:.3f} to {high:.3f}) | {one['baseline']:.3f} | {one['n']} |"
        )
    for wire, places in document["gradient_norms"].items():
        for place, norms in places.items():
            told = [
                f"{key} {sum(norms[key]) / len(norms[key]):.3g}"
                for key in ("before", "after", "cosine")
            ]
            print(f"\ngradient norms, {wire}, {place}: {', '.join(told)} (means of 3 batches)")
    for attack, reason in document["not_applicable"].items():
        print(f"\n{attack}: not applicable, {reason}")
    for attack in document["no_time_for"]:
        print(f"\n{attack}: no time")
    sys.stdout.flush()


def main() -> None:
    """The runs that are named, or all."""
    chosen = sys.argv[1:] or list(RUNS)
    print(versions())
    for name in chosen:
        audited(name)


if __name__ == "__main__":
    main()
