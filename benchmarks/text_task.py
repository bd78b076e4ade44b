"""What the models for text reach on docstrings, beside a bag of words on all the data in one place.

    make models
    python benchmarks/text_task.py

Federated: FedAvg, 10 clients, Dirichlet(0.5) label skew, 15 rounds on the in-process engine. Centralised: sklearn's
logistic regression on the first 64 words of each text, weighted by TF-IDF. All on fold 0, whose test modules nobody
trains on. Prints the accuracy of each seed and the median.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version

from common import versions
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from clients.tasks import Docstrings
from clients.tasks.docstrings import PACKAGES
from fl_app.cli.console import PlainConsole
from fl_app.compose import compose
from fl_app.run import run_engine

SEEDS = (0, 1, 2)
MOST = 200
SETTINGS = ["task=docstrings", f"task.max_per_package={MOST}", "num_clients=10", "rounds=15"]
ENGINE = ["runtime.workers=1", "evaluate.every=15"]


def federated(seed: int, *overrides: str) -> float:
    """Test accuracy after the last round."""
    with tempfile.TemporaryDirectory() as folder:
        where = [f"output_dir={folder}", f"seed={seed}"]
        config = compose([*SETTINGS, *ENGINE, *where, *overrides])
        result = run_engine(config, PlainConsole(io.StringIO()))
        summary = json.loads(result.summary_path.read_text())
    accuracy: float = summary["final"]["accuracy"]
    return accuracy


def bag_of_words(seed: int) -> float:
    """Test accuracy of the centralised baseline; the seed changes nothing, since it has one optimum."""
    task = Docstrings(max_per_package=MOST)
    train, test = ([" ".join(text.split()[:64]) for text in texts] for texts in task.texts)
    vectorizer = TfidfVectorizer(max_features=5_000)
    model = LogisticRegression(C=10, max_iter=1_000, random_state=seed)
    model.fit(vectorizer.fit_transform(train), task.train().targets.numpy())
    score: float = model.score(vectorizer.transform(test), task.test().targets.numpy())
    return score


def main() -> None:
    """Runs all three on each seed."""
    task = Docstrings(max_per_package=MOST)
    installed = ", ".join(f"{name} {version(_DISTRIBUTIONS.get(name, name))}" for name in PACKAGES)
    print(versions(), f"transformers {version('transformers')}; seeds {SEEDS}")
    print(f"docstrings of {installed}")
    print(
        f"{len(task.train())} to train on, {len(task.test())} to test on, {task.num_classes} classes"
    )
    rows: dict[str, Callable[[int], float]] = {
        "gru, federated": lambda seed: federated(
            seed, "model=gru", "client.lr=2", "client.local_epochs=2", "client.max_grad_norm=1"
        ),
        "minilm head, federated": lambda seed: federated(seed, "model=minilm", "client.lr=1"),
        "bag of words, centralised": bag_of_words,
    }
    for name, measure in rows.items():
        began = time.monotonic()
        found = [measure(seed) for seed in SEEDS]
        each = " ".join(f"{accuracy:.1%}" for accuracy in found)
        seconds = time.monotonic() - began
        print(
            f"{name:<26} median {statistics.median(found):.1%}  ({each})  {seconds:.0f} s",
            flush=True,
        )


_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


if __name__ == "__main__":
    main()
