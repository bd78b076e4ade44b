"""One run of `dp_accuracy.py`: its settings, as a user would ask for them, and what is kept of it.

Settings were chosen in a simulation on fold 0 of five; the runs are on folds 1 to 3. 1,000 clients hold four images of
MNIST each, of which a round asks each by a coin of its own (Poisson sampling), 200 on average.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.run import run_engine
from fl_app.services.summary import read_summary
from strategies.privacy import Guarantee
from strategies.privacy.accountants import calibrate
from strategies.privacy.events import GaussianRelease

CLIENTS, RATE = 1_000, 0.2
COHORT = round(CLIENTS * RATE)
DELTA = CLIENTS**-1.1
FOLDS = (1, 2, 3)
EPSILONS = (1.0, 3.0, 8.0)
LONG_ROUNDS = 1_000


@dataclass(frozen=True)
class Setting:
    """What loses least for one model and ε, of what was tried.

    Attributes:
        rounds: of the run.
        server_lr: by which the released mean is multiplied.
        norm: clip of a client's update, in units of the parameters.
        momentum: of the server.
    """

    rounds: int
    server_lr: float
    norm: float
    momentum: float = 0.0


@dataclass(frozen=True)
class Model:
    """A model and its clients' training, the same for every ε.

    Attributes:
        overrides: that choose it.
        lr: of the clients.
        epochs: local ones; a client's four images are one batch.
        settings: by ε; 0 stands for no noise. Its clip stays, since without one less was reached.
    """

    overrides: tuple[str, ...]
    lr: float
    epochs: int
    settings: dict[float, Setting]


MODELS = {
    "hog": Model(
        ("model=hog",),
        lr=5.0,
        epochs=3,
        settings={
            0.0: Setting(200, 8.0, 1.0, 0.9),
            1.0: Setting(200, 3.0, 1.0),
            3.0: Setting(200, 7.0, 1.0),
            8.0: Setting(200, 16.0, 1.0),
        },
    ),
    "cnn": Model(
        ("model=cnn", "model.width=2"),
        lr=1.0,
        epochs=1,
        settings={
            0.0: Setting(100, 1.0, 0.3, 0.9),
            1.0: Setting(100, 4.0, 0.3),
            3.0: Setting(100, 4.0, 0.3),
            8.0: Setting(100, 4.0, 0.3),
        },
    ),
}


@dataclass(frozen=True)
class Population:
    """A deployment that is larger than what is simulated.

    Attributes:
        clients: N.
        cohort: expected in a round.
    """

    clients: int
    cohort: int

    @property
    def delta(self) -> float:
        """N^−1.1."""
        return float(self.clients**-1.1)

    def noise(self, epsilon: float, rounds: int) -> float:
        """The noise multiplier for ε after so many rounds, over the clip's bound on the sum of the real cohort."""
        rate = self.cohort / self.clients
        return calibrate(
            "pld",
            epsilon,
            self.delta,
            lambda z: [(GaussianRelease(z, rate, "poisson"), rounds)],
        )


POPULATIONS = (
    Population(100_000, 1_000),
    Population(1_000_000, 10_000),
    Population(10_000_000, 100_000),
)

Cell = tuple[str, str, float, int]
"""What is asked (`dp`, `ftrl`, a population's size, or `long`), the model, ε (0: none), the fold."""


def run(cell: Cell) -> dict[str, Any]:
    """One run: its cell, its accuracy, what it says of privacy, and the milliseconds of each round's charge."""
    torch.set_num_threads(1)
    extra, told = _overrides(cell)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, _charges() as charges:
        with Path(os.devnull).open("w") as nowhere:
            result = run_engine(
                compose([*extra, f"output_dir={folder}", "run_name=one"]), PlainConsole(nowhere)
            )
        summary = read_summary(Path(result.summary_path))
    if summary is None or result.status != "completed":
        raise RuntimeError(f"{cell}: {result.status}, {result.reason}")
    history = summary["history"]
    return {
        "cell": list(cell),
        "accuracy": summary["final"]["accuracy"],
        "rounds": summary["rounds_completed"],
        "privacy": summary["privacy"],
        "charge_ms": [round(1e3 * seconds, 3) for seconds in charges],
        "round_ms": round(1e3 * sum(row["seconds"] for row in history) / len(history), 1),
        "seconds": round(time.monotonic() - began, 1),
        **told,
    }


def _overrides(cell: Cell) -> tuple[list[str], dict[str, Any]]:
    """What a user would write for a cell, and what else is to be told of it."""
    kind, name, epsilon, fold = cell
    if kind == "long":
        return _long(epsilon), {}
    model = MODELS[name]
    # So little noise is left of a large cohort's that the steps are those without noise.
    setting = model.settings[epsilon if kind in ("dp", "ftrl") else 0.0]
    common = [
        *model.overrides,
        "task=mnist",
        "task.test_fraction=0",
        "task.partition=iid",
        f"task.fold={fold}",
        f"seed={fold}",
        f"num_clients={CLIENTS}",
        f"rounds={setting.rounds}",
        f"evaluate.every={setting.rounds}",
        f"client.lr={model.lr}",
        f"client.local_epochs={model.epochs}",
        "client.batch_size=4",
        "server=momentum",
        f"server.lr={setting.server_lr}",
        f"server.momentum={setting.momentum}",
        f"clip.norm={setting.norm}",
        "runtime.workers=1",
        "runtime.batch_clients=256",
    ]
    if not epsilon:
        plain = ["strategy=fedavg", "clip=fixed", "combiner=uniform_mean", "sampler=poisson"]
        return [*plain, *common, f"sampler.fraction={RATE}"], {}
    if kind == "ftrl":
        return [*common, *_ftrl(epsilon, setting.rounds)], {}
    common += ["strategy=dp", f"sampler.fraction={RATE}"]
    if kind == "dp":
        return [*common, f"privacy.target_epsilon={epsilon}", f"privacy.delta={DELTA}"], {}
    found = next(one for one in POPULATIONS if str(one.clients) == kind)
    z = found.noise(epsilon, setting.rounds)
    scaled = [
        "privacy.target_epsilon=null",
        "privacy.reproducible_noise=true",
        f"privacy.noise_multiplier={z * COHORT / found.cohort}",
    ]
    return [*common, *scaled], {"z": z}


def _ftrl(epsilon: float, rounds: int) -> list[str]:
    """DP-FTRL with cohorts of the same size: every client comes each fifth round, and no chance is claimed."""
    separation = CLIENTS // COHORT
    return [
        "strategy=dp_ftrl",
        f"sampler.fraction={RATE}",
        f"sampler.separation={separation}",
        f"sampler.participations={-(-rounds // separation)}",
        f"privacy.target_epsilon={epsilon}",
        f"privacy.delta={DELTA}",
    ]


def _long(epsilon: float) -> list[str]:
    """Many rounds of few and small clients."""
    return [
        "strategy=dp",
        "task=digits",
        "task.partition=iid",
        "task.test_fraction=0",
        "model=linear",
        "num_clients=20",
        "sampler.fraction=0.5",
        f"rounds={LONG_ROUNDS}",
        f"evaluate.every={LONG_ROUNDS}",
        f"privacy.target_epsilon={epsilon}",
        "privacy.delta=1e-5",
        "client.local_epochs=1",
        "runtime.workers=1",
    ]


@contextmanager
def _charges() -> Iterator[list[float]]:
    """Seconds of each charge of the runs inside: composing, and the line that is synced to the disk."""
    seconds: list[float] = []
    charge = Guarantee.charge

    def timed(self: Guarantee, round_number: int) -> None:
        began = time.perf_counter()
        charge(self, round_number)
        seconds.append(time.perf_counter() - began)

    Guarantee.charge = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Guarantee.charge = charge  # type: ignore[method-assign]
