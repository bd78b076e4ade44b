"""What adapters make of a small language model on text that it has not read: perplexity, and what it writes.

    trellis make-base-model
    python benchmarks/causal_lm.py

The base model has read no package of the task. Held out are whole modules of each package. Centralised: the adapters
are trained on all text in one place, in as many passes as the federation has rounds. Federated: FedAvg on the
in-process engine, 12 clients with modules of their own, neighbours by name, so that most hold one package's.
Split: the same federation over a model that is cut at half (SplitFed v1). Perplexity
is a token's, of the base model's tokens; one seed, no interval. Prints the table and a prompt's continuations.
"""

from __future__ import annotations

import io
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from common import versions
from safetensors.numpy import load_file

from clients.generation import continuation
from clients.resident import ResidentModel, arrays_of
from clients.tasks import Prose, evaluate
from clients.tasks.prose import perplexity
from clients.tasks.text import load_tokenizer
from clients.trainers import FitJob
from fl_app.assembly import Assembly
from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.run import run_engine

ROUNDS = 4
SETTINGS = [
    "task=prose", "task.max_per_package=60", "model=lora_lm", "model.rank=8", "client=adamw",
    "client.lr=0.003", "client.batch_size=8", "num_clients=12", f"rounds={ROUNDS}",
    "runtime.workers=1", f"evaluate.every={ROUNDS}",
]  # fmt: skip
PROMPT = "Parameters\n----------\nx : array_like\n    The"

State = Mapping[str, np.ndarray]


def untrained(folder: Path) -> State:
    """Adapters that change nothing."""
    return arrays_of(Assembly(compose([*SETTINGS, f"output_dir={folder}"])).module())


def centralised(folder: Path) -> State:
    """Adapters trained on all clients' text at once."""
    overrides = [*SETTINGS, f"output_dir={folder}", f"client.local_epochs={ROUNDS}"]
    assembly = Assembly(compose(overrides))
    arrays = arrays_of(assembly.module())
    model = ResidentModel(assembly.module(), arrays)
    job = FitJob(0, arrays, {}, assembly.task.train(), 0, {}, {})
    assembly.trainer.fit_one(job, model, assembly.task)
    return arrays_of(model.module)


def federated(folder: Path, *overrides: str) -> State:
    """Adapters of a federation's last round."""
    config = compose([*SETTINGS, f"output_dir={folder}", *overrides])
    result = run_engine(config, PlainConsole(io.StringIO()))
    return load_file(result.summary_path.parent / "model.safetensors")


def split(folder: Path) -> State:
    """The same federation over a model that is cut at half: labels are tokens, so U-shaped they stay with clients."""
    return federated(
        folder / "split",
        "strategy=split_lora",
        "model=split_lora",
        "model.pretrained=./models/base-gpt2",
        "model.head=tokens",
        "model.u_shaped=true",
        "client=split",
        "combiner=mean",
    )


WAYS: Mapping[str, Callable[[Path], State]] = {
    "base model": untrained,
    "centralised LoRA": centralised,
    "LoRA, FedAvg": federated,
    "split, U-shaped": split,
}


def by_package(model: torch.nn.Module, task: Prose) -> dict[str, float]:
    """Perplexity on each package's held-out modules, and on all of them."""
    sources = np.array(task.sources[1])
    found = {}
    for name in sorted(set(sources)):
        rows = task.test().take(np.flatnonzero(sources == name))
        found[name] = perplexity(evaluate(model, task, rows, batch_size=32))
    return {**found, "all": perplexity(evaluate(model, task, task.test(), batch_size=32))}


def main() -> None:
    """Runs each way once."""
    written: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        assembly = Assembly(compose([*SETTINGS, f"output_dir={folder}"]))
        task = assembly.task
        assert isinstance(task, Prose)
        place = str(assembly.config.model.arguments["pretrained"])
        model = ResidentModel(assembly.module(), untrained(Path(folder)))
        tokens = [int((part.targets >= 0).sum()) for part in (task.train(), task.test())]
        print(versions(), f"transformers {version('transformers')}; seed 0")
        print(
            f"{tokens[0]:,} tokens to train on, {tokens[1]:,} held out; {model.flat.numel():,} trained"
        )
        for name, way in WAYS.items():
            began = time.process_time()
            state = way(Path(folder))
            seconds = time.process_time() - began
            model.load(state)
            found = by_package(model.module, task)
            if name == "base model":
                print(f"{'':<18}" + "".join(f"{package:>12}" for package in found))
            print(f"{name:<18}" + "".join(f"{value:>12.1f}" for value in found.values())
                  + f"  {seconds:.0f} CPU s")  # fmt: skip
            assert all(map(math.isfinite, found.values()))
            written[name] = continuation(
                model.module, load_tokenizer(place), PROMPT, tokens=30, context=task.input_shape[0]
            )
    print(f"\n{PROMPT} …")
    for name, text in written.items():
        print(f"  {name}: {text!r}")


if __name__ == "__main__":
    main()
