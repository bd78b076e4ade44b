"""Whether clients that learn the same task are found from what they send: real texts, a real encoder, three questions.

    make models
    python benchmarks/task_clusters.py [--seeds 0-9] [--steps 4] [--save FILE.npz]

MiniLM with adapters of rank 4, docstrings of 32 tokens, FedAvg of SGD. Clients hold IID parts of the same texts; client
c is asked for the package, the kind or the list of arguments of a text, by c modulo 3. So inputs have one distribution
and only the labels tell a task. Two models: `own heads`, one a goal (as `model=lora` has them), of which a client
trains its own, and `shared head`, in which all goals' classes share the same six logits, so that the server is told
nothing of which there are. A third federation has one goal only, `kind`. With 12 clients, and with 9 of these 12.

For each: the adjusted Rand index (1: as it is, 0: as by chance) of agglomerative clustering with the number of the
largest silhouette, of 3-means, and of HDBSCAN (who is in no group counts as a group), mean and range over the seeds;
and how often the test at 5% says that there is more than one group.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import versions
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from clients.lora import LoraClassifier
from clients.resident import ResidentModel, arrays_of
from clients.tasks import Docstrings, FederatedData
from clients.trainers.sgd import SGD, FitJob
from strategies.clustering.clusters import agglomerative, distances, hdbscan, k_means, one_group
from strategies.clustering.fingerprints import SUFFIX, fingerprints, units
from strategies.seeds import integer
from strategies.update import DELTA

MODEL = str(Path(__file__).resolve().parent.parent / "models" / "minilm")
GOALS = ("package", "kind", "arguments")
CLIENTS, ROUNDS, BATCH, RATE, RANK, MOST = 12, 3, 8, 0.3, 4, 8
SEES = {
    "B, round 1": ("B", slice(0, 1)),
    "B, round 3": ("B", slice(2, 3)),
    "B, rounds 1 to 3": ("B", slice(0, 3)),
    "first gradient of B": ("gradient", slice(0, 1)),
    "heads, round 1": ("head", slice(0, 1)),
    "heads, rounds 1 to 3": ("head", slice(0, 3)),
}
"""Fingerprints: what of a client, and of which rounds."""

Seen = dict[str, NDArray[np.float32]]
"""By what it is, (rounds, clients, k)."""


class SharedHead(Docstrings):
    """The same goals, whose classes share the first logits: a goal's first class is 0 for all. The others are idle."""

    def losses(self, output: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of the one goal that an example is labelled for."""
        shared = output[:, : max(self.goals.values())]
        return F.cross_entropy(shared, targets.max(dim=1).values, reduction="none")


def federation(task: Docstrings, data: FederatedData, seed: int, steps: int) -> Seen:
    """Some rounds of FedAvg: each client's update of B and of the heads, and its gradient of B at the first batch."""
    torch.manual_seed(seed)
    heads = None if isinstance(task, SharedHead) else task.goals
    module = LoraClassifier(
        task.input_shape, task.num_classes, task.vocab_size, task.padding_id, heads,
        pretrained=MODEL, rank=RANK, alpha=2.0 * RANK,
    )  # fmt: skip
    model, arrays = ResidentModel(module, arrays_of(module)), dict(arrays_of(module))
    trainer = SGD(batch_size=BATCH, lr=RATE, device="cpu")
    once = SGD(batch_size=16, lr=1.0, device="cpu")
    seen: dict[str, list[NDArray[np.float32]]] = {"B": [], "head": [], "gradient": []}
    for number in range(ROUNDS):
        found: dict[str, list[NDArray[np.float32]]] = {name: [] for name in seen}
        total = np.zeros(model.layout.size)
        for client in range(CLIENTS):
            shuffle = integer(seed, "local", number, client)
            job = FitJob(
                client,
                arrays,
                {},
                data.train(client),
                shuffle,
                {},
                {"local-steps": steps},
            )
            delta = trainer.fit_one(job, model, task).sections[DELTA]
            total += delta.vector
            views = delta.layout.views(delta.vector)
            found["B"].append(_chosen(views, lambda name: name.endswith(SUFFIX)))
            found["head"].append(_chosen(views, lambda name: name.startswith("head")))
            if number == 0:
                first = FitJob(
                    client, arrays, {}, data.train(client), shuffle, {}, {"local-steps": 1}
                )
                one = once.fit_one(first, model, task).sections[DELTA]
                found["gradient"].append(
                    _chosen(one.layout.views(one.vector), lambda name: name.endswith(SUFFIX))
                )
        step = model.layout.views(total / CLIENTS)
        arrays = {
            name: array + step[name].astype(np.float32) if name in step else array
            for name, array in arrays.items()
        }
        for name, rows in found.items():
            if rows:
                seen[name].append(np.stack(rows))
    return {name: np.stack(rounds) for name, rounds in seen.items()}


def _chosen(
    views: Mapping[str, NDArray[np.floating]], wanted: Callable[[str], bool]
) -> NDArray[np.float32]:
    return np.concatenate([view.ravel() for name, view in views.items() if wanted(name)]).astype(
        np.float32
    )


def judged(rows: NDArray[np.float32], truth: NDArray[np.int64]) -> list[float]:
    """ARI of the three methods, and whether more than one group is said.

    Args:
        rows: (rounds, n, k).
        truth: (n,) tasks.
    """
    directions = np.sum([units(each.astype(np.float64)) for each in rows], axis=0)
    prints = fingerprints(directions)
    found = (
        agglomerative(distances(prints), MOST)[0],
        k_means(prints, 3, least=3)[0],
        hdbscan(prints)[0],
    )
    several = one_group(directions, MOST) <= 0.05
    return [*(adjusted_rand_score(truth, labels) for labels in found), float(several)]


def main() -> None:
    """Runs all seeds and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0-9")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    first, last = map(int, given.seeds.split("-"))
    torch.set_num_threads(1)
    settings = {"tokenizer": MODEL, "max_length": 32}
    cases = {
        "own heads": Docstrings(goals=GOALS, **settings),  # type: ignore[arg-type]
        "shared head": SharedHead(goals=GOALS, **settings),  # type: ignore[arg-type]
        "one goal": Docstrings(goals=("kind",), **settings),  # type: ignore[arg-type]
    }
    print(
        versions(),
        f"seeds {given.seeds}, {given.steps} steps of {BATCH} texts, lr {RATE}",
        flush=True,
    )
    figures: dict[tuple[str, int, str], list[list[float]]] = {}
    began = time.process_time()
    for seed in range(first, last + 1):
        for case, task in cases.items():
            data = FederatedData(task, CLIENTS, seed=seed)
            seen = federation(task, data, seed, given.steps)
            for clients in (12, 9):
                truth = np.arange(clients) % 3
                for name, (what, rounds) in SEES.items():
                    row = judged(seen[what][rounds, :clients], truth)
                    figures.setdefault((case, clients, name), []).append(row)
        if given.save:
            named = {" | ".join(map(str, key)): np.array(rows) for key, rows in figures.items()}
            np.savez(given.save, **named)  # type: ignore[arg-type]
        print(f"seed {seed}: {time.process_time() - began:.0f} s of CPU so far", flush=True)
    _print(figures)


def _print(figures: Mapping[tuple[str, int, str], list[list[float]]]) -> None:
    print(
        "\n| federation | clients | fingerprint | agglomerative | 3-means | HDBSCAN | several, % |"
    )
    print("|---|---|---|---|---|---|---|")
    for (case, clients, name), rows in sorted(
        figures.items(), key=lambda item: (item[0][0], -item[0][1])
    ):
        found = np.array(rows)
        cells = [
            f"{column.mean():.2f} ({column.min():.2f}–{column.max():.2f})" for column in found.T[:3]
        ]
        if case == "one goal":
            cells = ["–"] * 3
        print(
            f"| {case} | {clients} | {name} | {' | '.join(cells)} | {100 * found[:, 3].mean():.0f} |"
        )


if __name__ == "__main__":
    main()
