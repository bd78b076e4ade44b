"""A small model's service in a process of its own, and what is sent to it past any client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from clients.encrypted.inference_key import InferenceKey
from clients.encrypted.model_file import TrainedModel
from clients.tasks.mnist import Mnist
from fl_app.encrypted_service.description import Description
from fl_app.encrypted_service.messages import MEDIA_TYPE, Request
from tests.support.polynomial import trained

ROOT = Path(__file__).resolve().parents[2]


def write_model(folder: Path) -> Path:
    """A network with one hidden layer: requests of 1.2 MB."""
    network = trained(Mnist(), features="pool", number=9, hidden=(4,))
    found = folder / "model.safetensors"
    found.write_bytes(TrainedModel.of(network, 8.0, "a test").to_bytes())
    return found


def good_request(model: TrainedModel) -> bytes:
    """The body of a request of three samples."""
    features = model.network.featurise(Mnist().test().inputs[:3]).numpy()
    request = Request(3, *InferenceKey(model.plan.terms).encrypt(features))
    return request.to_bytes(Description.of(model).sizes())


@contextmanager
def serving(path: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A service that must live to the end of the test, and end cleanly when it is interrupted."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fl_app.cli", "serve-encrypted", str(path), "--port", "0", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=path.parent,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        process.stdout.readline()
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), process.communicate(timeout=20)
        yield url, process
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0
        assert errors.splitlines()[-1] == "ended"
        assert "Traceback" not in errors, errors
    finally:
        process.kill()
        process.wait()


def post(url: str, body: bytes | Iterator[bytes], **headers: str) -> httpx.Response:
    """One request for a prediction."""
    headers = {"Content-Type": MEDIA_TYPE} | headers
    return httpx.post(f"{url}/v1/predict", content=body, headers=headers, timeout=30)


def raw(url: str, length: str, body: bytes = b"") -> socket.socket:
    """A connection on which a request with this header of its length, and so much of its body, has been sent."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    head = f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: {MEDIA_TYPE}\r\n{length}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def until(true, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
