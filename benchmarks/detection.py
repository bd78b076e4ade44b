"""Which attackers are flagged, and how many honest clients with them.

    python benchmarks/detection.py [--seeds 100-109] [--rounds 10] [--clients 20] [--model mlp] [--runs]

Federated averaging on MNIST, IID and with Dirichlet(0.5) label skew. In every round of every seed each attack is judged
on the same honest updates, by a detector of its own that remembers that attack's rounds; the attackers are others for
each seed. The model follows the mean of the honest updates, as it does once the attackers are shut out, so that all
attacks are asked of the same models. The thresholds were chosen on seeds 0 to 23 and 50 to 52.

Prints, for each attack and partition: how many of the attackers' updates were flagged, by which test most often, and
how many of the honest clients' were. With --runs instead: the accuracy of whole runs in which 4 of 20 clients lie,
their updates averaged, with and without quarantine.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from common import trellis, versions

from clients.poisoning import LabelFlip
from clients.resident import ResidentModel, arrays_of
from clients.trainers.sgd import FitJob
from clients.trainers.together import fit_together
from fl_app.assembly import Assembly
from fl_app.compose import compose
from strategies.attacks import (
    Alie,
    Attack,
    Attacker,
    Collusion,
    Gaussian,
    Ipm,
    Mimic,
    MinMax,
    Omniscient,
    Scaling,
    SignFlip,
    Zero,
)
from strategies.attacks.omniscient import Memory, Sight
from strategies.detection.detector import Detector
from strategies.detection.scores import grams, score
from strategies.seeds import generator, integer
from strategies.server_models import SGD, ServerModel
from strategies.update import DELTA, Section, Update

PARTITIONS = {
    "IID": "task.partition=iid",
    "Dirichlet(0.5)": "task.alpha=0.5",
    "Dirichlet(0.1)": "task.alpha=0.1",
}
"""Settings of the task, whose partition is Dirichlet's."""


CASES: dict[str, tuple[Attack | None, int]] = {
    "none": (None, 0),
    "scaling × 1000": (Scaling(), 1),
    "scaling × 10": (Scaling(factor=10.0), 1),
    "sign_flip": (SignFlip(), 1),
    "gaussian, σ = 1": (Gaussian(), 1),
    "gaussian, σ = 0.01": (Gaussian(sigma=0.01), 1),
    "label_flip": (LabelFlip(), 1),
    "zero": (Zero(), 1),
    "collusion": (Collusion(), 5),
    "collusion, cosine 0.9": (Collusion(jitter=1 / 3), 5),
    "sign_flip ": (SignFlip(), 5),
    "label_flip ": (LabelFlip(), 5),
    "alie": (Alie(), 1),
    "alie ": (Alie(), 5),
    "mimic": (Mimic(), 1),
    "mimic ": (Mimic(), 5),
    "min_max": (MinMax(), 1),
    "min_max ": (MinMax(), 5),
    "ipm ": (Ipm(), 5),
}
"""Attacks with the number of those who lie."""


@dataclass
class Tally:
    """Flags of one attack on one partition."""

    judged: int = 0
    found: int = 0
    honest: int = 0
    flagged: int = 0
    by_test: Counter[str] = field(default_factory=Counter)

    def count(self, liars: set[int], clients: int, flags: Mapping[int, list[str]]) -> None:
        """Adds one round."""
        self.judged, self.honest = self.judged + len(liars), self.honest + clients - len(liars)
        self.flagged += len(flags.keys() - liars)
        for client in liars:
            self.found += client in flags
            self.by_test.update({reason.split()[0] for reason in flags.get(client, [])})

    def cells(self) -> str:
        """Percentages."""
        found = f"{100 * self.found / self.judged:.1f}" if self.judged else "–"
        return f"{found} | {100 * self.flagged / self.honest:.2f}"

    def tests(self) -> str:
        """The tests that found it, with percentages."""
        each = self.by_test.most_common()
        return ", ".join(f"{name} {100 * count / self.judged:.0f}" for name, count in each) or "–"


class Federation:
    """Twenty clients that train on the engine's parts, each also on flipped labels."""

    def __init__(self, partition: str, seed: int, clients: int, model: str) -> None:
        settings = [f"model={model}", f"num_clients={clients}", partition]
        self._assembly = Assembly(compose(["task=mnist", f"seed={seed}", *settings]))
        self._seed, self.clients = seed, clients
        self._data = self._assembly.data(clients)
        module = self._assembly.module()
        self.model = ServerModel(arrays_of(module), SGD())
        self._resident = ResidentModel(module, arrays_of(module), "cpu")

    def round(self, number: int, poisoned: Sequence[int]) -> tuple[list[Update], dict[int, Update]]:
        """Honest updates of all clients, and those of some on flipped labels."""
        honest = [(client, self._data.train(client)) for client in range(self.clients)]
        task, flip = self._assembly.task, LabelFlip()
        rng = generator(self._seed, "poisoned examples")
        lying = [(client, flip.corrupt(self._data.train(client), task, rng)) for client in poisoned]
        arrays = self.model.arrays()
        jobs = [
            FitJob(
                client, arrays, {}, examples, integer(self._seed, "train", number, client), {}, {}
            )
            for client, examples in [*honest, *lying]
        ]
        updates = []
        for job, fit in zip(
            jobs, fit_together(self._assembly.trainer, jobs, self._resident, task), strict=True
        ):
            if isinstance(fit, Exception):
                raise fit
            weight = float(fit.num_examples)
            updates.append(Update(fit.sections, weight, (job.client,), number - 1))
        return updates[: self.clients], dict(zip(poisoned, updates[self.clients :], strict=True))

    def follow(self, updates: Sequence[Update]) -> None:
        """The server's step on the mean of the honest."""
        weights = np.array([update.weight for update in updates])
        rows = np.stack([update.delta.vector for update in updates])
        mean = (weights / weights.sum() @ rows).astype(np.float32)
        section = Section(mean, updates[0].delta.layout)
        self.model.apply(replace(updates[0], sections={DELTA: section}))


class Trial:
    """One attack throughout one seed: its attackers, what they remember, and the detector that they face."""

    def __init__(self, attack: Attack | None, liars: int, seed: int, clients: int) -> None:
        self._attack = None if attack is None else replace(attack, fraction=liars / clients)
        self._seed, self._clients = seed, clients
        self.liars = set() if self._attack is None else set(self._attack.attackers(clients, seed))
        self._detector = Detector()
        self._memory: Memory = {}

    def judge(
        self, number: int, honest: Sequence[Update], flipped: Mapping[int, Update]
    ) -> dict[int, list[str]]:
        """The flags of a round in which the attackers replace their updates."""
        told = {}
        if isinstance(self._attack, Omniscient):
            seen = [update for update in honest if update.members[0] not in self.liars]
            sight = Sight(seen, tuple(sorted(self.liars)), number, self._seed)
            told = self._attack.plot(sight, self._memory)
        sent = list(honest)
        for client in self.liars:
            if isinstance(self._attack, LabelFlip):
                sent[client] = flipped[client]
            elif self._attack is not None:
                attacker = Attacker(client, number, self._clients, self._seed, told)
                sent[client] = self._attack.tell(honest[client], attacker)
        return self._detector.judge(range(len(sent)), score(grams(sent)))


def measure(
    partition: str, seeds: Sequence[int], rounds: int, clients: int, model: str
) -> dict[str, Tally]:
    """Each attack's tally over all rounds of all seeds."""
    tallies = {name: Tally() for name in CASES}
    for seed in seeds:
        federation = Federation(partition, seed, clients, model)
        trials = {
            name: Trial(attack, liars, seed, clients) for name, (attack, liars) in CASES.items()
        }
        poisoned = sorted(trials["label_flip"].liars | trials["label_flip "].liars)
        for number in range(1, rounds + 1):
            honest, flipped = federation.round(number, poisoned)
            for name, trial in trials.items():
                flags = trial.judge(number, honest, flipped)
                tallies[name].count(trial.liars, clients, flags)
            federation.follow(honest)
    return tallies


def table(tallies: Mapping[str, Mapping[str, Tally]]) -> str:
    """The figures of each attack, in Markdown; columns by partition."""
    names = "".join(f" {name}: found % | honest flagged % |" for name in tallies)
    last = list(tallies.values())[-1]
    lines = [f"| attack | by |{names} tests, {list(tallies)[-1]} |"]
    lines.append(f"|---|---|{'---|---|' * len(tallies)}---|")
    for name, (_, liars) in CASES.items():
        cells = "".join(f" {each[name].cells()} |" for each in tallies.values())
        lines.append(f"| {name.strip()} | {liars} |{cells} {last[name].tests()} |")
    return "\n".join(lines)


def runs(options: Sequence[str]) -> str:
    """Final accuracy of whole runs, and who was shut out, in Markdown."""
    lines = [
        "| attack | accuracy, quarantine=none | quarantine=strikes | liars of 4 shut out | honest of 16 |"
    ]
    lines.append("|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        for attack in (
            "none",
            "scaling",
            "sign_flip",
            "gaussian",
            "label_flip",
            "collusion",
            "alie",
        ):
            chosen = [
                *options,
                f"attack={attack}",
                "model=mlp",
                "num_clients=20",
                "rounds=20",
                "seed=100",
            ]
            plain, _ = trellis(Path(folder), *chosen)
            watched, _ = trellis(Path(folder), *chosen, "quarantine=strikes")
            out = {row["client"] for row in watched["quarantine"] if row["times"]}
            liars = Attack(fraction=0.2).attackers(20, 100) if attack != "none" else frozenset()
            accuracy = [f"{summary['final']['accuracy']:.3f}" for summary in (plain, watched)]
            lines.append(
                f"| {attack} | {' | '.join(accuracy)} | {len(out & liars)} | {len(out - liars)} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="100-109", help="FIRST-LAST")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--partitions", default=",".join(PARTITIONS))
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--runs", action="store_true", help="whole runs instead")
    options = parser.parse_args()
    if options.runs:
        print(versions(), "mlp, seed 100, 20 rounds, combiner=mean\n")
        print(runs(["runtime.workers=1"]))
        return
    first, last = map(int, options.seeds.split("-"))
    torch.set_num_threads(1)
    seeds, rounds = range(first, last + 1), options.rounds
    chosen = {name: PARTITIONS[name] for name in options.partitions.split(",")}
    print(versions(), f"{options.model}, seeds {options.seeds}, {rounds} rounds each\n")
    tallies = {
        name: measure(partition, seeds, rounds, options.clients, options.model)
        for name, partition in chosen.items()
    }
    print(table(tallies))


if __name__ == "__main__":
    main()
