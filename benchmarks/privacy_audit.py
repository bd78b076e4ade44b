"""What `trellis privacy-audit` finds: canaries against promises, members of runs, pictures from updates.

    python benchmarks/privacy_audit.py                 # all tables of docs/privacy_audit.md, ten minutes on two cores
    python benchmarks/privacy_audit.py inversion       # or known, canaries, membership; draws the figure

* known: one-run audits of Gaussian sums whose ε is known exactly, 200 canaries, 1,000 audits each.
* canaries: 8 clients on small digits, 10 rounds, half of them asked by Poisson sampling, C = 1; 500 canaries, 5 audits.
* membership: 4 clients on MNIST, 4 shadows.
* inversion: MNIST, one image and one step an update, the run's CNN at its initial weights.
"""

from __future__ import annotations

import io
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from statistics import fmean, median

import numpy as np
from common import FIGURES, versions
from scipy.stats import norm

from fl_app.audit.canaries import audit_clients
from fl_app.audit.coins import guess
from fl_app.audit.inversion import invert
from fl_app.audit.membership import audit_examples
from fl_app.audit.pictures import draw
from fl_app.audit.target import Target, load
from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.run import run_engine

CONFIDENCE, DELTA = 0.95, 1e-5
PLAIN = ("strategy=fedavg", "combiner=uniform_mean", "clip=fixed", "sampler.fraction=0.5")
PRIVATE = (
    "strategy=dp",
    "privacy.target_epsilon=null",
    f"privacy.delta={DELTA}",
    "sampler.fraction=0.5",
)


def made(folder: str, *overrides: str) -> Target:
    """A run of its own, read again from its folder."""
    config = compose([f"output_dir={folder}", "runtime.workers=1", *overrides])
    result = run_engine(config, PlainConsole(io.StringIO()))
    if result.status != "completed":
        raise RuntimeError(result.reason)
    return load(result.summary_path.parent)


def silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


def gaussian_epsilon(sigma: float) -> float:
    """ε of one Gaussian release of sensitivity 1 at δ = 1e-5 (Balle and Wang 2018, Theorem 8)."""
    low, high = 0.0, 200.0
    for _ in range(100):
        eps = (low + high) / 2
        left, right = 1 / (2 * sigma) - eps * sigma, -1 / (2 * sigma) - eps * sigma
        spent = norm.cdf(left) - math.exp(eps) * norm.cdf(right)
        low, high = (eps, high) if spent > DELTA else (low, eps)
    return high


def known() -> None:
    """Bounds beside the true ε of mechanisms that have one."""
    print(
        "| σ | ε | mean bound | largest of 1,000 bounds | bounds above ε |\n|---|---|---|---|---|"
    )
    rng = np.random.default_rng(0)
    for sigma in (0.3, 0.5, 1.0, 2.0, 4.0):
        truth, bounds = gaussian_epsilon(sigma), []
        for _ in range(1000):
            coins = rng.integers(0, 2, 200).astype(bool)
            scores = coins + sigma * rng.standard_normal(200) - 0.5
            bounds.append(guess(scores, coins, delta=DELTA, confidence=CONFIDENCE).epsilon_bound)
        above = sum(bound > truth for bound in bounds)
        print(f"| {sigma:g} | {truth:.2f} | {fmean(bounds):.2f} | {max(bounds):.2f} | {above} |")


def canaries() -> None:
    """Bounds beside the promises of runs."""
    print("| noise z | promised ε | bound, every version | bound, last model |\n|---|---|---|---|")
    small = ("task=digits", "num_clients=8", "rounds=10", "evaluate.every=0")
    for z in (None, 0.1, 0.3, 1.0, 3.0):
        chosen = PLAIN if z is None else (*PRIVATE, f"privacy.noise_multiplier={z}")
        with tempfile.TemporaryDirectory() as folder:
            target = made(folder, *small, *chosen)
            found = [
                audit_clients(target, 500, confidence=CONFIDENCE, progress=silent) for _ in range(5)
            ]
        promised = "none" if target.promise is None else f"{target.promise.epsilon:.1f}"
        bounds = [
            " ".join(
                f"{one.epsilon_bound:.2f}" for one in sorted(many, key=lambda g: g.epsilon_bound)
            )
            for many in ([one.versions for one in found], [one.final for one in found])
        ]
        print(
            f"| {'none' if z is None else z} | {promised} | {bounds[0]} | {bounds[1]} |", flush=True
        )
    print(f"\nlargest possible bound: {found[0].versions.most:.2f}")


def membership() -> None:
    """Attacks on the members of three runs."""
    print(
        "| run | accuracy | attack | AUC | TPR at 1% | TPR at 0.1% | ε at least |\n|---|---|---|---|---|---|---|"
    )
    base = ("task=mnist", "model=mlp", "num_clients=4", "rounds=10", "evaluate.every=10")
    runs = {
        "FedAvg, 1 epoch a round": (),
        "FedAvg, 20 epochs a round": ("client.local_epochs=20", "client.lr=0.1"),
        "the same, z = 1": (
            *PRIVATE,
            "privacy.noise_multiplier=1",
            "client.local_epochs=20",
            "client.lr=0.1",
        ),
    }
    for name, overrides in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            target = made(folder, *base, *overrides)
            found = audit_examples(target, 4, confidence=CONFIDENCE, progress=lambda number: silent)
        accuracy = target.summary["final"]["accuracy"]
        for attack, one in (("loss", found.loss), ("LiRA", found.lira)):
            assert one is not None  # there were shadows
            low, high = one.auc_interval
            print(
                f"| {name} | {accuracy:.3f} | {attack} | {one.auc:.3f} ({low:.3f} to {high:.3f}) | "
                f"{one.tpr_at_1:.1%} | {one.tpr_at_01:.1%} | {one.epsilon_bound:.2f} |",
                flush=True,
            )


def inversion() -> None:
    """Pictures from single updates, and the figure."""
    digits_of = {"mse": 3, "psnr": 1, "ssim": 2}
    print("| the server sees | MSE | PSNR, dB | SSIM |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        target = made(folder, "task=mnist", "num_clients=4", "rounds=1", "evaluate.every=0")
        for z in (1.0, 0.1, 0.01, 0.001):
            found = invert(target, 8, progress=silent, multiplier=z)
            if z == 1.0:
                draw(found, FIGURES / "inversion.png")
            for name in found.found if z == 1.0 else ("clipped + noise",):
                figures = found.likeness(name)
                cells = [_spread(figures[key], digits) for key, digits in digits_of.items()]
                label = f"{name}, z = {z:g}" if "noise" in name else name
                print(f"| {label} | {' | '.join(cells)} |", flush=True)


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


PARTS: dict[str, Callable[[], None]] = {
    "known": known,
    "canaries": canaries,
    "membership": membership,
    "inversion": inversion,
}


def main() -> None:
    """Prints the tables that are asked for, all by default."""
    print(versions())
    for name in sys.argv[1:] or PARTS:
        print(f"\n{name}\n", flush=True)
        PARTS[name]()


if __name__ == "__main__":
    main()
