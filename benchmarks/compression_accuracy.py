"""Accuracy against bytes for every compression: images with a CNN, and text with low-rank adapters.

    python benchmarks/compression_accuracy.py ROWS.jsonl [--minutes 14] [--draw]

Each row of the file is a run: those that are there are not repeated, and after so many minutes none begins. All in one
process. Prints, over the seeds: test accuracy after the last round, what it is apart from
`compression=none` with the same seed (a 95% interval by Student's t over the seeds), and the bytes of a client's
serialised reply, the mean over rounds and seeds. `--draw` also draws docs/figures/compression.png.

The encoder of the text task is the first two of MiniLM's six layers as pretrained (`make models`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import FIGURES, versions
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.run import run_engine
from fl_app.services.summary import read_summary

CLIENTS = 10
LAYERS = 2
MINILM = Path(__file__).resolve().parent.parent / "models" / "minilm"
CODINGS: dict[str, tuple[str, ...]] = {
    "none": (),
    "top-k 1%, fp16": ("compression=top_k",),
    "top-k 1%, fp32": ("compression=top_k", "compression.values=float32"),
    "top-k 1%, no error feedback": ("compression=top_k", "compression.error_feedback=false"),
    "top-k 10%, fp16": ("compression=top_k", "compression.ratio=0.1"),
    "random-k 1%": ("compression=random_k",),
    "random-k 10%": ("compression=random_k", "compression.ratio=0.1"),
    "8 bits": ("compression=quantize", "compression.bits=8"),
    "4 bits": ("compression=quantize", "compression.bits=4"),
    "2 bits": ("compression=quantize", "compression.bits=2"),
    "PowerSGD rank 2": ("compression=power_sgd",),
    "signs, mean": ("compression=sign",),
    "signs, majority vote": (
        "compression=sign",
        "compression.error_feedback=false",
        "combiner=majority_vote",
    ),
}
TEXT = ("none", "top-k 1%, fp16", "top-k 1%, no error feedback", "8 bits", "2 bits")
NAMES = {"mnist": tuple(CODINGS), "docstrings": (*TEXT, "PowerSGD rank 2")}
SETTINGS = {
    "mnist": (
        *("model.width=41", "rounds=15", "evaluate.every=15"),
        *("task.folds=2", "task.test_fraction=0.75", "client.lr=0.1", "client.local_epochs=1"),
    ),
    "docstrings": (
        *("task=docstrings", "model=lora", "rounds=10", "evaluate.every=10"),
        *("task.folds=2", "task.max_per_package=60", "task.max_length=16"),
        *("client.lr=0.5", "client.local_epochs=1"),
    ),
}
LAST = ("top-k 10%, fp16", "random-k 10%", "4 bits")
"""Of the images; others lie on both sides of them."""

ORDER = [("docstrings", name, 1) for name in NAMES["docstrings"]]
ORDER += [("mnist", name, seed) for seed in (1, 2, 3) for name in CODINGS if name not in LAST]
ORDER += [("docstrings", name, seed) for seed in (2, 3) for name in NAMES["docstrings"]]
ORDER += [("mnist", name, seed) for seed in (1, 2, 3) for name in LAST]
STUDENT = {2: 12.706, 3: 4.303}
"""The 97.5% quantile of Student's t, by the number of seeds."""

Row = dict[str, Any]


def shortened(folder: Path) -> Path:
    """Writes MiniLM with its first layers only, and its tokenizer."""
    shutil.copytree(MINILM, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((MINILM / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    dropped = tuple(f"encoder.layer.{n}." for n in range(LAYERS, config["num_hidden_layers"]))
    weights = load_file(MINILM / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(dropped)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(task: str, coding: str, seed: int, encoder: Path) -> Row:
    """One training, and what it gives.

    Raises:
        RuntimeError: it did not end as it should.
    """
    own = (f"model.pretrained={encoder}",) if task == "docstrings" else ()
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        place = (f"output_dir={folder}", "run_name=one", f"num_clients={CLIENTS}", f"seed={seed}")
        alone = ("runtime.workers=1", "runtime.batch_clients=off")
        overrides = [*SETTINGS[task], *own, *CODINGS[coding], *place, *alone]
        result = run_engine(compose(overrides), PlainConsole(nowhere))
        summary = read_summary(Path(result.summary_path))
    if summary is None or result.status != "completed" or summary["rejections"]:
        raise RuntimeError(f"{task}, {coding}, seed {seed}: {result.status}, {result.reason}")
    replies = CLIENTS * summary["rounds_completed"]
    return {
        "task": task,
        "coding": coding,
        "seed": seed,
        "accuracy": summary["final"]["accuracy"],
        "bytes": summary["totals"]["upload_bytes"] / replies,
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def missing(path: Path, minutes: float) -> None:
    """Runs what the file lacks, until the time is over."""
    ends = time.monotonic() + 60 * minutes
    done = {(row["task"], row["coding"], row["seed"]) for row in read(path)}
    with tempfile.TemporaryDirectory() as folder:
        encoder = shortened(Path(folder) / "encoder")
        for cell in ORDER:
            if cell in done:
                continue
            if time.monotonic() > ends:
                return
            row = run(*cell, encoder)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """The rows that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tabulated(rows: list[Row], task: str) -> list[Row]:
    """One line for each coding that has run, over the seeds that `none` has, too."""
    found = {(row["coding"], row["seed"]): row for row in rows if row["task"] == task}
    lines: list[Row] = []
    for coding in NAMES[task]:
        pairs = [
            (row, found["none", seed])
            for (name, seed), row in found.items()
            if name == coding and ("none", seed) in found
        ]
        if not pairs:
            continue
        apart = 100 * np.array([row["accuracy"] - whole["accuracy"] for row, whole in pairs])
        count = len(pairs)
        half = STUDENT[count] * apart.std(ddof=1) / count**0.5 if count > 1 else None
        sent, instead = (float(np.mean([pair[n]["bytes"] for pair in pairs])) for n in (0, 1))
        lines.append(
            {
                "coding": coding,
                "seeds": count,
                "accuracy": 100 * float(np.mean([row["accuracy"] for row, _ in pairs])),
                "apart": float(apart.mean()),
                "half": half,
                "bytes": sent,
                "smaller": instead / sent,
            }
        )
    return lines


def show(lines: list[Row], task: str) -> None:
    """Prints a table."""
    print(f"\n### {task}\n")
    print("| coding | seeds | accuracy, % | against `none`, points | bytes up | times fewer |")
    print("| --- | --: | --: | --: | --: | --: |")
    for line in lines:
        apart, half = line["apart"], line["half"]
        within = "" if half is None else f" [{apart - half:+.1f}, {apart + half:+.1f}]"
        against = "" if line["coding"] == "none" else f"{apart:+.1f}{within}"
        print(
            f"| {line['coding']} | {line['seeds']} | {line['accuracy']:.1f} | {against} "
            f"| {line['bytes']:,.0f} | {line['smaller']:.1f} |"
        )


def draw(tables: dict[str, list[Row]], path: Path) -> None:
    """Accuracy over bytes, a panel for each task."""
    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    markers = "osD^v<>PX*hdp"
    for axes, (task, lines) in zip(panels, tables.items(), strict=True):
        for line in lines:
            place = list(CODINGS).index(line["coding"])
            axes.plot(
                line["bytes"],
                line["accuracy"],
                markers[place],
                color=f"C{place % 10}",
                markersize=7,
                label=line["coding"],
            )
        axes.axhline(lines[0]["accuracy"] - 1, color="grey", linewidth=0.8, linestyle="--")
        axes.set(xscale="log", xlabel="bytes up, a client and round", title=task)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize="small")
    figure.savefig(path)


def main() -> None:
    """Runs what is missing, prints and draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, help="of the runs; the same again resumes")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no run begins")
    parser.add_argument("--draw", action="store_true")
    given = parser.parse_args()
    print(versions(), flush=True)
    missing(given.rows, given.minutes)
    rows = read(given.rows)
    tables = {task: lines for task in NAMES if (lines := tabulated(rows, task))}
    for task, lines in tables.items():
        show(lines, task)
    if given.draw:
        draw(tables, FIGURES / "compression.png")


if __name__ == "__main__":
    main()
