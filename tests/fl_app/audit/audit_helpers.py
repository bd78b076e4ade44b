"""Small runs to audit, on real data."""

import io
from pathlib import Path

import numpy as np
import torch

from clients.tasks import Digits, Examples
from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.run import run_engine

SMALL = ["task=digits", "num_clients=4", "rounds=2", "runtime.workers=1", "evaluate.every=0"]
CLIPPED = ["combiner=uniform_mean", "clip=fixed"]


def made(output: Path, *overrides: str) -> Path:
    """The folder of a run that has ended."""
    config = compose([*SMALL, f"output_dir={output}", *overrides])
    result = run_engine(config, PlainConsole(io.StringIO()))
    assert result.status == "completed", result.reason
    return result.summary_path.parent


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its audit's."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "audit" not in path.relative_to(folder).parts
    }


def silent(done: int, total: int) -> None:
    """Progress that nobody looks at."""


class Mislabelled(Digits):
    """Digits of which every third has a random label, in the training and the test set alike: these can only be learnt
    by heart."""

    def train(self) -> Examples:
        return _mislabelled(super().train(), 1)

    def test(self) -> Examples:
        return _mislabelled(super().test(), 2)


def _mislabelled(examples: Examples, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    targets = examples.targets.clone()
    targets[::3] = torch.from_numpy(rng.integers(0, 10, len(targets[::3])))
    return Examples(examples.inputs, targets)
