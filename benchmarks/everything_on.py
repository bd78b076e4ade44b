"""What everything at once costs, and what it bears: `experiment=private_robust_secure` by attack and by ε.

    python benchmarks/everything_on.py build/everything.jsonl            # 60 runs, over an hour on a core; resumes
    python benchmarks/everything_on.py build/everything.jsonl --quick    # one fold: no attack, sign flip, a full ring
    python benchmarks/everything_on.py build/everything.jsonl --part 0/2 # every second run, for a process beside it
    python benchmarks/everything_on.py build/everything.jsonl --draw     # also draws docs/figures/everything_on.png
    python benchmarks/everything_on.py build/everything.jsonl --tables   # of what is there; runs nothing

Runs are those of `trellis run`; settings were chosen on fold 0, figures are of folds 1 to 3, with seed = fold. Noise
comes of the operating system, so a run is never the same twice; losses are paired by fold.

Clients that `attack=` makes lie run the code of honest ones: clip and noise act on what they say. Two more attacks are
made here, of clients that run other code in the place of both (`modified`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from common import FIGURES, versions
from dp_accuracy import shown
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.run import run_engine
from fl_app.services.summary import read_summary
from strategies.attacks import SignFlip
from strategies.privacy.rotation import Rotation
from strategies.protocols import ClientContext
from strategies.secagg.fixed_point import LARGEST
from strategies.stages.integer_noise import IntegerNoise, rotation_seed
from strategies.update import DELTA, Section, Update, Vector
from strategies.wire import Refused

PRESET = "experiment=private_robust_secure"
FOLDS = (1, 2, 3)
PLANNED = 24.0
"""The preset's own ε."""
EPSILONS = (0.5, 4.0, 8.0, 16.0, 24.0)
FRACTION = 0.02
CLIENTS, MEMBERS = 100, 15
HIDDEN = 1 / 3
"""Of the noise's length: what hurt most on fold 0, of tries from a tenth to the whole."""
HONEST_CODE = ("sign_flip", "scaling", "gaussian", "label_flip", "nan")
OPEN = (
    "strategy=robust", "model=hog", "clip=fixed", "collector=masked_groups", "collector.groups=7", "combiner.f=2",
    "num_clients=100", "rounds=20", "task.partition=iid", "client.lr=10", "client.batch_size=40", "server.lr=2",
)  # fmt: skip
"""The preset without noise."""
MODELS = {"hog": (), "cnn": ("model=cnn", "client.lr=0.5")}

Cell = tuple[str, str, float, int]
"""The model, the attack, ε (0: no privacy), the fold."""
Lie = Callable[[Update, ClientContext], Vector]
"""What a modified client gives to the masks, in whole numbers, in the place of a clipped update."""


def full_ring(update: Update, context: ClientContext) -> Vector:
    """The largest number that the ring takes of a member, with a random sign in each element."""
    rng = np.random.default_rng([context.client, context.round])
    signs = rng.choice(np.float32([-1, 1]), update.delta.layout.size)
    return signs * np.float32(LARGEST // MEMBERS)


def hidden(update: Update, context: ClientContext) -> Vector:
    """Minus its own change, drawn out to a share of the sum's noise: no sum is odd for it, and liars push one way."""
    settings, vector = context.settings, update.delta.vector
    seed = rotation_seed(int(settings["seed"]), update.version)
    noise = math.sqrt(float(settings["variance"]) * MEMBERS * len(vector))
    turned = Rotation(seed, len(vector)).forward(vector)
    return np.rint(turned * np.float32(-HIDDEN * noise / np.linalg.norm(turned)))


MODIFIED: dict[str, Lie] = {"full_ring": full_ring, "hidden": hidden}


@contextmanager
def modified(lie: Lie | None, liars: frozenset[int]) -> Iterator[list[str]]:
    """Clients whose code skips clip and noise, in all workers that are forked meanwhile; yields refusals of sums."""
    encode, decode = IntegerNoise.encode, IntegerNoise.decode
    refused: list[str] = []

    def lying(stage: IntegerNoise, update: Update, context: ClientContext) -> Update:
        if lie is None or context.client not in liars:
            return encode(stage, update, context)
        section = Section(lie(update, context), update.delta.layout)
        return Update({DELTA: section}, 1.0, update.members, update.version)

    def counting(stage: IntegerNoise, update: Update) -> Update:
        try:
            return decode(stage, update)
        except Refused as error:
            refused.append(str(error))
            raise

    with (
        patch.object(IntegerNoise, "encode", lying),
        patch.object(IntegerNoise, "decode", counting),
    ):
        yield refused


def overrides(cell: Cell) -> list[str]:
    """What a user would ask for; modified clients are those that `attack=` would choose."""
    model, attack, epsilon, fold = cell
    asked = [PRESET, *MODELS[model], f"task.fold={fold}", f"seed={fold}"]
    if attack in HONEST_CODE:
        asked += [f"attack={attack}", f"attack.fraction={FRACTION}"]
    if epsilon:
        return [*asked, f"privacy.target_epsilon={epsilon}"]
    # The preset's settings of its budget go with its privacy alone.
    return [*OPEN, *asked[1:]]


def run(cell: Cell) -> dict[str, Any]:
    """One run: its cell, its accuracy, what it says of privacy, and how many sums were refused."""
    torch.set_num_threads(1)
    liars = SignFlip(FRACTION).attackers(CLIENTS, cell[3])
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, modified(MODIFIED.get(cell[1]), liars) as refused:
        extra = [f"output_dir={folder}", "run_name=one", "runtime.workers=1"]
        with Path(os.devnull).open("w") as nowhere:
            result = run_engine(compose([*overrides(cell), *extra]), PlainConsole(nowhere))
        summary = read_summary(Path(result.summary_path))
    if summary is None or result.status != "completed":
        raise RuntimeError(f"{cell}: {result.status}, {result.reason}")
    return {
        "cell": list(cell),
        "accuracy": summary["final"]["accuracy"],
        "privacy": summary["privacy"],
        "refused": len(refused),
        "void": sum(row["void"] for row in summary["history"]),
        "seconds": time.monotonic() - began,
    }


def cells(quick: bool) -> list[Cell]:
    """Every run, what matters most first."""
    if quick:
        return [("hog", attack, PLANNED, 1) for attack in ("none", "sign_flip", "full_ring")]
    asked: list[Cell] = []
    for fold in FOLDS:
        asked += [
            ("hog", one, PLANNED, fold) for one in ("none", "hidden", "full_ring", "sign_flip")
        ]
    for fold in FOLDS:
        asked += [("hog", one, 8.0, fold) for one in ("none", "hidden")]
        asked += [("hog", "none", epsilon, fold) for epsilon in (0.5, 0.0)]
    for fold in FOLDS:
        asked += [
            ("hog", one, epsilon, fold) for epsilon in (16.0, 4.0) for one in ("none", "hidden")
        ]
        asked += [("hog", one, PLANNED, fold) for one in HONEST_CODE[1:]]
        asked += [("hog", one, 16.0, fold) for one in ("full_ring", *HONEST_CODE[:2])]
        asked += [("cnn", "none", PLANNED, fold)]
    return asked


Found = dict[Cell, dict[str, Any]]


def read(path: Path) -> Found:
    """What is there."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {tuple(row["cell"]): row for row in rows}


def run_all(path: Path, wanted: Sequence[Cell]) -> None:
    """Runs what the file has not yet, and adds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for cell in wanted:
        if cell in read(path):
            continue
        found = run(cell)
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{cell} {found['accuracy']:.3f}, {found['seconds']:.0f} s", flush=True)


def values(found: Found, model: str, attack: str, epsilon: float) -> dict[int, float]:
    """Accuracy in percent by fold."""
    return {
        cell[3]: 100 * row["accuracy"]
        for cell, row in sorted(found.items())
        if cell[:3] == (model, attack, epsilon)
    }


def lost(found: Found, model: str, attack: str, epsilon: float) -> list[float]:
    """Points lost against the same pipeline without attackers, fold by fold."""
    calm, hit = values(found, model, "none", epsilon), values(found, model, attack, epsilon)
    return [calm[fold] - hit[fold] for fold in sorted(calm.keys() & hit.keys())]


def folds(sample: dict[int, float]) -> str:
    """Which they are."""
    return ", ".join(map(str, sorted(sample)))


def by_attack(found: Found) -> None:
    """Prints what each attack costs at the preset's ε."""
    print(f"\n### 2 of 100 clients lie, ε = {PLANNED:g}\n")
    print("| attack | clients run | accuracy, % | points lost | sums refused, a round | folds |")
    print("|---|---|---|---|---|---|")
    for attack in ("none", *HONEST_CODE, *MODIFIED):
        sample = values(found, "hog", attack, PLANNED)
        if not sample:
            continue
        rows = [row for cell, row in found.items() if cell[:3] == ("hog", attack, PLANNED)]
        refused = sum(row["refused"] for row in rows) / (20 * len(rows))
        points = shown(lost(found, "hog", attack, PLANNED)) if attack != "none" else ""
        code = "other code" if attack in MODIFIED else "honest code"
        print(
            f"| {attack} | {code} | {shown(list(sample.values()))} | {points} | {refused:.2f} | {folds(sample)} |"
        )


def by_epsilon(found: Found) -> None:
    """Prints accuracy by ε, with and without the attack that hides in the noise."""
    print("\n### By ε\n")
    print("| model | ε | z | accuracy, % | with two hidden liars, % | points lost | folds |")
    print("|---|---|---|---|---|---|---|")
    for model in MODELS:
        for epsilon in (0.0, *EPSILONS):
            sample = values(found, model, "none", epsilon)
            if not sample:
                continue
            row = found[(model, "none", epsilon, min(sample))]
            z = f"{row['privacy']['noise_multiplier']:.3g}" if epsilon else ""
            name = f"{epsilon:g}" if epsilon else "none"
            hit = values(found, model, "hidden", epsilon)
            print(
                f"| {model} | {name} | {z} | {shown(list(sample.values()))} | {shown(list(hit.values()))} |"
                f" {shown(lost(found, model, 'hidden', epsilon))} | {folds(sample)} |"
            )


def draw(found: Found, path: Path) -> None:
    """Accuracy by ε: a point a run, a line through the means."""
    figure = Figure(figsize=(5.5, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for attack, colour, label in (
        ("none", "#0072B2", "no attackers"),
        ("hidden", "#D55E00", "two liars hide in the noise"),
    ):
        means = {}
        for epsilon in EPSILONS:
            sample = list(values(found, "hog", attack, epsilon).values())
            axes.plot([epsilon] * len(sample), sample, ".", color=colour, alpha=0.5)
            if sample:
                means[epsilon] = sum(sample) / len(sample)
        axes.plot(list(means), list(means.values()), "-", color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(EPSILONS, [f"{one:g}" for one in EPSILONS])
    axes.set(
        xlabel="ε of a client", ylabel="accuracy, %", title="private_robust_secure, 100 clients"
    )
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path)


def main() -> None:
    """Runs what is missing, prints the tables, draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="for the runs' results, JSON lines")
    parser.add_argument("--quick", action="store_true", help="one fold, three runs")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th run, from the I-th")
    parser.add_argument("--draw", action="store_true", help="draw docs/figures/everything_on.png")
    parser.add_argument("--tables", action="store_true", help="of what is there; run nothing")
    options = parser.parse_args()
    print(versions(), f"seed = fold, folds {', '.join(map(str, FOLDS))} of 0 to 4")
    first, step = map(int, options.part.split("/"))
    if not options.tables:
        run_all(options.file, cells(options.quick)[first::step])
    found = read(options.file)
    by_attack(found)
    by_epsilon(found)
    if options.draw:
        draw(found, FIGURES / "everything_on.png")


if __name__ == "__main__":
    main()
