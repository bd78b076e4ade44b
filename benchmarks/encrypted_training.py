"""Encrypted training beside its plaintext twin: accuracy, seconds, memory, bytes.

    python benchmarks/encrypted_training.py                        # all rows, three seeds: about ten minutes, idle
    python benchmarks/encrypted_training.py --only cross-entropy --seeds 0 1

Settings are those that `encrypted_search.py` has chosen on a validation split of the training images; here the 4,000
training images of fold 0 are encrypted, and the 1,000 test images are looked at once a run. Each run is a process tree
of its own (`encrypted_cell.py`): wall seconds are of the training alone, with the encryption beside it, processor
seconds of the whole tree; memory is the peak of the tree's proportional set size. What the owner's own training in
plaintext would have cost stands in the last column.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from common import measured, versions
from encrypted_search import CHOSEN, TASK, Setting

from clients.encrypted.schedule import batch_of_round, batches

CELL = Path(__file__).with_name("encrypted_cell.py")
WORKERS = 2


def prepare(path: Path, setting: Setting, seed: int) -> None:
    """Features, mini-batches and initial weights of a run."""
    torch.manual_seed(seed)
    module = setting.module()
    train, test = TASK.train(), TASK.test()
    cut = batches(train.targets.numpy(), setting.batch, seed, 0)
    order = [batch_of_round(number, len(cut), seed, 0) for number in range(1, setting.rounds + 1)]
    adam = {
        name: getattr(setting, name) for name in ("lr", "beta1", "beta2", "tau", "decay_from")
    } | {"total_steps": setting.rounds}
    settings = {
        "sizes": module.sizes, "loss": setting.loss, "batch": setting.batch, "adam": adam, "workers": WORKERS,
    }  # fmt: skip
    weights = {name: value.detach().numpy() for name, value in module.named_parameters()}
    np.savez(
        path,
        settings=json.dumps(settings),
        features=module.featurise(train.inputs).double().numpy(),
        labels=train.targets.numpy(),
        test=module.featurise(test.inputs).double().numpy(),
        test_labels=test.targets.numpy(),
        rows=np.concatenate(cut),
        edges=np.cumsum([0, *map(len, cut)]),
        order=np.array(order),
        **weights,
    )


def runs(setting: Setting, seeds: list[int]) -> list[dict[str, float]]:
    """One run a seed."""
    found = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "prepared.npz"
            prepare(path, setting, seed)
            done = measured([sys.executable, str(CELL), str(path)], {"OMP_NUM_THREADS": "1"})
            row = json.loads(done.output[-1])
            row["peak_mb"] = max(row["peak_mb"], done.peak_bytes / 1e6)
            found.append(row)
            print(f"  seed {seed}: {json.dumps(row)}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=sorted(CHOSEN), default=list(CHOSEN))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    print(
        versions(), f"{WORKERS} workers, seeds {given.seeds}; means over seeds, memory the most\n"
    )
    print(
        "| | m x steps | test % (each seed) | plaintext twin % | gradient error | training s (wall, CPU)"
        " | key holder CPU s | encrypting s | peak MB | up once MB | a step MB | plaintext CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name in given.only:
        setting = CHOSEN[name]
        rows = runs(setting, given.seeds)
        mean = {key: fmean(row[key] for row in rows) for key in rows[0]}
        each = ", ".join(f"{row['accuracy']:.1f}" for row in rows)
        print(
            f"| {name} | {setting.batch} x {setting.rounds} | {mean['accuracy']:.1f} ({each}) | {mean['twin']:.1f}"
            f" | {max(row['gradient_error'] for row in rows):.0e} | {mean['wall']:.1f}, {mean['cpu']:.1f}"
            f" | {mean['key_cpu']:.2f} | {mean['encrypt_wall']:.1f} | {max(row['peak_mb'] for row in rows):.0f}"
            f" | {mean['upload_mb']:.0f} | {mean['step_mb']:.2f} | {mean['plain_cpu']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
