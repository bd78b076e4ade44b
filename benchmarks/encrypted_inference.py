"""What encrypted predictions cost and whether they are the network's own: CPU, latency, bytes, labels of 1,000 images.

    python benchmarks/encrypted_inference.py             # all networks, about two minutes of an idle core
    python benchmarks/encrypted_inference.py --networks square --repeats 5

Networks are trained in the clear on MNIST's 4,000 training images; labels are compared on the 1,000 test images. CPU is
of one process, its threads included, and so for one core with OMP_NUM_THREADS=1 (which this sets); a batch fills every
slot. Latency is over HTTP on loopback to a service in a process of its own, from images to labels, of one image and of
a full batch. Medians of the repeats. Figures of a busy machine mean nothing: the load is printed beside them.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import versions
from torch.nn.functional import cross_entropy

from clients.encrypted.inference import EncryptedInference
from clients.encrypted.inference_key import InferenceKey
from clients.encrypted.model_file import TrainedModel
from clients.encrypted.network import PolynomialNet
from clients.tasks.mnist import Mnist
from fl_app.encrypted_service.client import EncryptedClient
from fl_app.encrypted_service.description import Description

NETWORKS: dict[str, dict[str, Any]] = {
    "logistic": {"hidden": ()},
    "square": {"hidden_scale": 0.5, "logit_scale": 0.1},
    "square-dct": {"features": "dct", "hidden_scale": 0.5, "logit_scale": 0.1},
    "cubic": {"activation": "cubic", "hidden_scale": 0.5, "logit_scale": 0.1},
    "two-hidden": {"hidden": (32, 16), "hidden_scale": 0.5, "logit_scale": 0.1},
    "raw": {"features": "raw", "hidden_scale": 0.5, "logit_scale": 0.1},
}
BOUND = 8.0


def trained(task: Mnist, steps: int = 60, **settings: Any) -> PolynomialNet:
    """A network after some steps of Adam on batches of 512."""
    torch.manual_seed(0)
    network = PolynomialNet(task.input_shape, task.num_classes, **{"features": "hog"} | settings)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.02, betas=(0.7, 0.95), eps=1e-3)
    train, rng = task.train(), np.random.default_rng(0)
    for _ in range(steps):
        rows = torch.from_numpy(rng.permutation(len(train.targets))[:512])
        optimiser.zero_grad()
        cross_entropy(network(train.inputs[rows]), train.targets[rows]).backward()
        optimiser.step()
    return network.eval()


@dataclass(frozen=True)
class Figures:
    """Of one network; seconds are CPU seconds of a full batch, and wall seconds where latency is said."""

    accuracy: float
    agreement: float
    error: float
    samples: int
    server: float
    encrypting: float
    decrypting: float
    one: float
    batch: float
    request: int
    answer: int


def spent(repeats: int, work: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Median seconds by a clock."""
    found = []
    for _ in range(repeats):
        began = clock()
        work()
        found.append(clock() - began)
    return median(found)


@contextmanager
def serving(model: TrainedModel) -> Iterator[str]:
    """The service's address."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(model.to_bytes())
        command = [sys.executable, "-m", "fl_app.cli", "serve-encrypted", str(path), "--port", "0"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        try:
            process.stdout.readline()
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
            process.wait()


def measured(network: PolynomialNet, task: Mnist, repeats: int) -> Figures:
    """One network's figures."""
    test, model = task.test(), TrainedModel.of(network, BOUND)
    with torch.no_grad():
        expected = network(test.inputs).numpy()
    with serving(model) as url, EncryptedClient(url) as client:
        found = client.predict(test.inputs)
        most = client.sizes.samples
        images = test.inputs.repeat(-(-most // len(test.inputs)), 1, 1, 1)[:most]
        one = spent(repeats, lambda: client.predict(images[:1]), time.perf_counter)
        batch = spent(repeats, lambda: client.predict(images), time.perf_counter)
    features, clock = network.featurise(images).numpy(), time.process_time
    key, inference = (
        InferenceKey(model.plan.terms),
        EncryptedInference(model.polynomial, model.plan),
    )
    fresh = key.encrypt(features)
    answer = inference(*fresh)
    told = Description.of(model)
    return Figures(
        accuracy=float((expected.argmax(1) == test.targets.numpy()).mean()),
        agreement=float((found.labels == expected.argmax(1)).mean()),
        error=float(np.abs(found.logits - expected).max()),
        samples=most,
        server=spent(repeats, lambda: inference(*fresh), clock),
        encrypting=spent(repeats, lambda: key.encrypt(features), clock),
        decrypting=spent(repeats, lambda: key.decrypt(answer, most), clock),
        one=one,
        batch=batch,
        request=told.request_bytes,
        answer=told.answer_bytes,
    )


def shown(name: str, network: PolynomialNet, found: Figures) -> str:
    """A line of the table."""
    each = 1e3 / found.samples
    cells = (
        f"{name}, {'-'.join(map(str, network.sizes))}",
        f"{found.samples}",
        f"{found.accuracy:.1%}",
        f"{found.agreement:.1%}",
        f"{found.error:.1e}",
        f"{found.server * each:.3f}",
        f"{(found.encrypting + found.decrypting) * each:.3f}",
        f"{found.one:.2f}",
        f"{found.batch:.2f}",
        f"{found.request / 1e6:.1f}",
        f"{found.answer / 1e6:.1f}",
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = Mnist()
    print(versions(), f"tenseal {version('tenseal')}; load {os.getloadavg()[0]:.1f}")
    print(
        "\n| network | samples a batch | accuracy | labels as in the clear | largest error of a logit"
        " | server, CPU ms a sample | owner, CPU ms a sample | one image, s | a batch, s | request, MB | answer, MB |"
    )
    print("|---" + "|--:" * 10 + "|")
    for name in options.networks:
        network = trained(task, **NETWORKS[name])
        print(shown(name, network, measured(network, task, options.repeats)), flush=True)
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
