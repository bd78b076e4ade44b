"""Encrypted predictions over HTTP: a real server process, real images, and whatever else strangers may send."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from clients.encrypted.inference_key import InferenceKey
from clients.encrypted.model_file import TrainedModel, load
from clients.tasks.mnist import Mnist
from fl_app.cli.main import main
from fl_app.encrypted_service.client import EncryptedClient, ServiceError
from fl_app.encrypted_service.description import Description
from fl_app.encrypted_service.messages import (
    LARGEST_HEAD,
    MEDIA_TYPE,
    Answer,
    MessageError,
    Request,
    Sizes,
)
from tests.support.polynomial import logits, trained

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "fl_app.cli"]
BINARY = {"Content-Type": MEDIA_TYPE}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network with one hidden layer: requests of 1.2 MB."""
    network = trained(Mnist(), features="pool", number=9, hidden=(4,))
    found = tmp_path_factory.mktemp("served") / "model.safetensors"
    found.write_bytes(TrainedModel.of(network, 8.0, "a test").to_bytes())
    return found


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@contextmanager
def serving(path: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A service that must live to the end of the test, and end cleanly when it is interrupted."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*COMMAND, "serve-encrypted", str(path), "--port", "0", *options],
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


@pytest.fixture(scope="module")
def url(path: Path) -> Iterator[str]:
    options = ("--waiting", "1", "--max-body-mb", "1.5", "--body-seconds", "1.5")
    with serving(path, *options) as (found, _):
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[EncryptedClient]:
    with EncryptedClient(url) as found:
        yield found


@pytest.fixture(scope="module")
def good(client: EncryptedClient) -> bytes:
    """The body of a good request."""
    key = InferenceKey(client.description.terms())
    return Request(3, *key.encrypt(np.ones((3, 9)))).to_bytes(client.sizes)


def answers(client: EncryptedClient) -> None:
    """The service lives and says what the network says."""
    images = Mnist().test().inputs[:8]
    found = client.predict(images)
    assert np.abs(found.logits - client.expected(images)).max() < 0.05  # type: ignore[attr-defined]


@pytest.fixture(autouse=True, scope="module")
def expected(client: EncryptedClient, path: Path) -> None:
    network = load(path).network
    client.expected = lambda images: logits(network, images)  # type: ignore[attr-defined]


# -- what it is for --


def test_a_thousand_images_get_the_networks_own_labels(client: EncryptedClient, path: Path) -> None:
    images = Mnist().test().inputs
    found, network = client.predict(images), load(path).network
    assert (found.labels == logits(network, images).argmax(axis=1)).all()
    assert found.labels.shape == (1000,)
    assert found.logits.shape == (1000, 10)


def test_more_images_than_slots_take_several_requests(client: EncryptedClient) -> None:
    images = Mnist().train().inputs[:4000].repeat(2, 1, 1, 1)[:4100]
    found = client.predict(images.numpy())
    assert np.abs(found.logits - client.expected(images)).max() < 0.05  # type: ignore[attr-defined]


def test_what_a_client_needs_and_no_weight_is_told(url: str, path: Path) -> None:
    model = load(path)
    told = httpx.get(f"{url}/v1/model").json()
    assert Description.model_validate_json(json.dumps(told)) == Description.of(model)
    assert told["samples"] == 4096
    assert told["request_bytes"] == 9 * (2 * 8192 * 8 + 64)
    assert len(json.dumps(told)) < 1000
    health = httpx.get(f"{url}/health").json()
    assert health == {"status": "ok", "model": model.digest, "requests": 0}


def test_requests_hold_first_halves_and_seeds_and_no_room_for_a_key(
    client: EncryptedClient, good: bytes
) -> None:
    sizes = client.sizes
    head = len(good) - sizes.request_bytes
    told = json.loads(good[12:head])
    assert set(told) == {"model", "samples"}
    assert sizes.request_bytes == 9 * (2 * sizes.degree * 8 + 64)
    assert not any(b"key" in name.encode() for name in Request.__dataclass_fields__)


def test_the_command_prints_labels(
    client: EncryptedClient, url: str, tmp_path: Path, capsys
) -> None:
    images = Mnist().test().inputs[:5].numpy()
    np.save(tmp_path / "images.npy", images)
    assert main(["predict-encrypted", url, str(tmp_path / "images.npy")]) == 0
    expected = client.expected(Mnist().test().inputs[:5]).argmax(axis=1)  # type: ignore[attr-defined]
    assert capsys.readouterr().out.split() == list(map(str, expected))


# -- what strangers send --


def post(url: str, body: bytes, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/predict", content=body, headers=BINARY | headers, timeout=30)


def with_head(body: bytes, text: bytes, size: int | None = None) -> bytes:
    """The body with another head."""
    old = int.from_bytes(body[8:12], "little")
    length = (len(text) if size is None else size).to_bytes(4, "little")
    return body[:8] + length + text + body[12 + old :]


def head(body: bytes, **changes: object) -> bytes:
    old = int.from_bytes(body[8:12], "little")
    return with_head(body, json.dumps(json.loads(body[12 : 12 + old]) | changes).encode())


BAD = {
    "empty": (lambda body: b"", 400, "truncated"),
    "no message": (lambda body: os.urandom(1000), 400, "malformed"),
    "another magic word": (lambda body: b"X" + body[1:], 400, "malformed"),
    "pickle": (lambda body: b"\x80\x04\x95" + body, 400, "malformed"),
    "a key's file": (lambda body: b"trellis-ckks-1\n" + body, 400, "malformed"),
    "only a head": (lambda body: body[:20], 400, "truncated"),
    "a head that has no end": (lambda body: with_head(body, b"{}", 2**32 - 1), 400, "malformed"),
    "a long head": (lambda body: with_head(body, b" " * 1025)[:9000], 400, "malformed"),
    "a head of brackets": (lambda body: with_head(body, b"[" * LARGEST_HEAD), 400, "malformed"),
    "a head that is a list": (lambda body: with_head(body, b"[]"), 400, "malformed"),
    "a head with more": (lambda body: head(body, secret_key="AAAA"), 400, "malformed"),
    "another model": (lambda body: head(body, model="0" * 32), 409, "other_model"),
    "a model that is a list": (lambda body: head(body, model=[]), 409, "other_model"),
    "no samples": (lambda body: head(body, samples=0), 422, "bad_samples"),
    "too many samples": (lambda body: head(body, samples=4097), 422, "bad_samples"),
    "samples true": (lambda body: head(body, samples=True), 422, "bad_samples"),
    "samples by halves": (lambda body: head(body, samples=1.5), 422, "bad_samples"),
    "samples NaN": (lambda body: head(body, samples=float("nan")), 422, "bad_samples"),
    "one byte less": (lambda body: body[:-1], 400, "truncated"),
    "half of it": (lambda body: body[: len(body) // 2], 400, "truncated"),
    "one byte more": (lambda body: body + b"\0", 400, "too_long"),
    "a residue out of range": (
        lambda body: body[:-4096] + b"\xff" * 8 + body[-4088:],
        422,
        "bad_residues",
    ),
    "residues of ones": (
        lambda body: body[:100] + b"\xff" * (len(body) - 100),
        422,
        "bad_residues",
    ),
}


@pytest.mark.parametrize(("broken", "status", "code"), BAD.values(), ids=BAD)
def test_a_bad_body_is_told_why_and_the_next_good_one_is_served(
    client: EncryptedClient, url: str, good: bytes, broken, status: int, code: str
) -> None:
    found = post(url, broken(good))
    assert (found.status_code, found.json()["error"]["code"]) == (status, code)
    assert found.json()["error"]["message"]
    answers(client)


def test_residues_that_are_no_ciphertext_get_an_answer_that_means_nothing(
    client: EncryptedClient, url: str, good: bytes
) -> None:
    start = len(good) - client.sizes.request_bytes
    zeros = post(url, good[:start] + bytes(len(good) - start))
    assert zeros.status_code == 200
    assert len(zeros.content) <= client.sizes.answer_bytes + LARGEST_HEAD
    answers(client)


def raw(url: str, text: bytes) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(text)
    return connection


def request_line(length: str) -> bytes:
    return (
        f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: {MEDIA_TYPE}\r\n{length}\r\n\r\n"
    ).encode()


def reply(connection: socket.socket) -> tuple[int, str]:
    """Status and the error's code."""
    with connection, http.client.HTTPResponse(connection) as response:
        response.begin()
        return response.status, json.loads(response.read())["error"]["code"]


@pytest.mark.parametrize("length", [str(2**22), str(10**14), str(10**19)])
def test_a_body_that_is_too_large_is_refused_before_it_is_read(
    client: EncryptedClient, url: str, length: str
) -> None:
    assert reply(raw(url, request_line(f"Content-Length: {length}"))) == (413, "too_large")
    answers(client)


def test_a_body_in_pieces_is_cut_off_where_it_is_too_long(
    client: EncryptedClient, url: str
) -> None:
    connection = raw(url, request_line("Transfer-Encoding: chunked"))
    piece = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    for _ in range(client.sizes.largest_request // (1 << 16) + 1):
        connection.sendall(piece)
    assert reply(connection) == (413, "too_large")
    answers(client)


def test_who_sends_it_all_the_same_is_told_too(
    client: EncryptedClient, url: str, good: bytes
) -> None:
    for body in (bytes(20_000_000), iter([bytes(1 << 20)] * 20)):
        found = httpx.post(f"{url}/v1/predict", content=body, headers=BINARY, timeout=30)
        assert (found.status_code, found.json()["error"]["code"]) == (413, "too_large")
    answers(client)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Content-Encoding": "gzip"}, "encoded"),
        ({"Content-Type": "application/json"}, "media_type"),
    ],
)
def test_another_kind_of_body_is_refused(
    client: EncryptedClient, url: str, good: bytes, headers: dict[str, str], code: str
) -> None:
    found = post(url, good, **headers)
    assert (found.status_code, found.json()["error"]["code"]) == (415, code)
    answers(client)


def test_a_client_that_goes_in_the_middle_leaves_no_trace(
    client: EncryptedClient, url: str, good: bytes
) -> None:
    for _ in range(5):
        raw(url, request_line(f"Content-Length: {len(good)}") + good[:5000]).close()
    until(lambda: httpx.get(f"{url}/health").json()["requests"] == 0)
    answers(client)


def test_slow_ones_are_ended_and_meanwhile_others_are_told_to_come_again(
    client: EncryptedClient, url: str, good: bytes
) -> None:
    slow = [raw(url, request_line(f"Content-Length: {len(good)}")) for _ in range(2)]
    until(lambda: httpx.get(f"{url}/health").json()["requests"] == 2)
    busy = post(url, good)
    assert (busy.status_code, busy.json()["error"]["code"]) == (503, "busy")
    assert busy.headers["retry-after"] == "1"
    with pytest.raises(ServiceError, match="503 busy") as refused:
        client.predict(Mnist().test().inputs[:1])
    assert (refused.value.status, refused.value.code) == (503, "busy")
    assert [reply(connection) for connection in slow] == [(408, "slow")] * 2
    answers(client)


@pytest.mark.parametrize(
    ("method", "place", "status"),
    [("GET", "/v1/predict", 405), ("POST", "/v1/model", 405), ("GET", "/../etc/passwd", 404),
     ("GET", "/docs", 404), ("GET", "/openapi.json", 404)],
)  # fmt: skip
def test_what_is_not_there_is_told_in_the_same_form(
    url: str, method: str, place: str, status: int
) -> None:
    found = httpx.request(method, url + place)
    assert (found.status_code, found.json()["error"]["code"]) == (status, "http")


def until(true, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


SMALL = Sizes("m", 2, (97, 193), 8, 4, 3, 3, 4)


@given(
    cut=st.integers(0, 400), at=st.integers(0, 300), put=st.binary(max_size=40), more=st.binary()
)
def test_no_bytes_do_more_than_be_refused(cut: int, at: int, put: bytes, more: bytes) -> None:
    rng = np.random.default_rng(cut)
    residues = rng.integers(0, 97, (2, 2, 8), np.uint64)
    whole = Request(2, residues, rng.integers(0, 256, (2, 4), np.uint8)).to_bytes(SMALL)
    found = Request.from_bytes(whole, SMALL)
    assert (found.first == residues).all()
    broken = (whole[:at] + put + whole[at + len(put) :])[:cut] + more
    for kind in (Request, Answer):
        try:
            kind.from_bytes(broken, SMALL)
        except MessageError as error:
            assert error.code  # noqa: PT017 - not to fail is as good


# -- what a client takes from a stranger --


@pytest.fixture
def stranger() -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """A server that answers what a test has put down for a path."""
    said: dict[str, tuple[int, bytes]] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = said[self.path]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", said
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": [60, 60, 60, 60, 60]}, "128-bit secure"),
        ({"degree": 2048, "bits": [54]}, "CKKS degree 2048"),
        ({"degree": 2**40}, "CKKS degree"),
        ({"format": "trellis-encrypted-inference-9"}, "format"),
        ({"secret_key": "please"}, "secret_key"),
        ({"components": 100}, "components"),
        ({"logit_bits": 4000}, "logits at"),
        ({"bound": -1.0}, "bound"),
        ({"classes": 10**9}, "classes"),
        ({"classes": 1 << 14}, "bytes: 1073741824 are the most"),
        ({"model": "x" * 65}, "model"),
    ],
    ids=str,
)
def test_a_description_that_can_not_be_trusted_makes_no_key(
    stranger, path: Path, changes: dict[str, object], said: str
) -> None:
    url, told = stranger
    whole = Description.of(load(path)).model_dump(mode="json") | changes
    told["/v1/model"] = (200, json.dumps(whole).encode())
    with pytest.raises(ServiceError, match=said):
        EncryptedClient(url)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, b"hello", "describes no model"),
        (200, b"x" * (1 << 17), "an answer of more than"),
        (500, b"<html>", "answered 500$"),
        (503, b'{"error": {"code": "busy", "message": "later"}}', "answered 503 busy: later"),
    ],
)
def test_what_is_no_service_is_told(stranger, status: int, body: bytes, said: str) -> None:
    url, told = stranger
    told["/v1/model"] = (status, body)
    with pytest.raises(ServiceError, match=said):
        EncryptedClient(url)


def test_a_wrong_answer_is_told(stranger, path: Path) -> None:
    url, told = stranger
    found = Description.of(load(path))
    told["/v1/model"] = (200, found.model_dump_json().encode())
    sizes = found.sizes()
    shape = (sizes.classes, sizes.components, len(sizes.primes), sizes.degree)
    right = Answer(np.zeros(shape, np.uint64)).to_bytes(sizes)
    image = np.zeros((1, 1, 28, 28), np.float32)
    with EncryptedClient(url) as client:
        for body, said in [
            (right[:-8], "bytes follow the head"),
            (right[:-8] + b"\xff" * 8, "not below its prime"),
            (right + bytes(1 << 17), "an answer of more than"),
            (b"<html>", "are no message"),
        ]:
            told["/v1/predict"] = (200, body)
            with pytest.raises(ServiceError, match=said):
                client.predict(image)


def test_inputs_of_another_shape_or_size_are_not_sent(client: EncryptedClient) -> None:
    with pytest.raises(ValueError, match=r"the model takes \(n, \(1, 28, 28\)\)"):
        client.predict(np.zeros((2, 784), np.float32))
    with pytest.raises(ValueError, match="the model takes"):
        client.predict(np.zeros((0, 1, 28, 28), np.float32))
    with pytest.raises(ValueError, match="room up to 8"):
        client.predict(np.full((1, 1, 28, 28), 9.0, np.float32))


def test_nobody_at_the_address_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ServiceError, match=f"http://127.0.0.1:{port}"):
        EncryptedClient(f"http://127.0.0.1:{port}")


# -- the command --


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_cleanly_after_what_it_is_at(
    client: EncryptedClient, good: bytes, path: Path, number: int
) -> None:
    with serving(path) as (url, process):
        connection = raw(url, request_line(f"Content-Length: {len(good)}") + good[:-100])
        until(lambda: httpx.get(f"{url}/health").json()["requests"] == 1)
        process.send_signal(number)
        connection.sendall(good[-100:])
        with connection:
            data = b"".join(iter(lambda: connection.recv(1 << 20), b""))
        assert data.startswith(b"HTTP/1.1 200 OK")
        Answer.from_bytes(data.partition(b"\r\n\r\n")[2], client.sizes)
        assert process.wait(timeout=30) == 0


def test_an_address_that_is_taken_ends_with_code_1(path: Path, url: str, capsys) -> None:
    port = url.rpartition(":")[2]
    assert main(["serve-encrypted", str(path), "--port", port]) == 1
    assert f"127.0.0.1:{port} can't be served" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["none.safetensors"], "can't be read: No such file"),
        (["MODEL", "--max-body-mb", "1"], "raise --max-body-mb"),
        (["MODEL", "--workers", "0"], "Limits.workers = 0"),
        (["MODEL", "--port", "70000"], "must be from 0 to 65535"),
        (["MODEL", "--bound", "3"], "a model's file has its own"),
        (["."], "it holds no run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_ends_with_code_2(
    path: Path, options: list[str], said: str, capsys, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(path) if one == "MODEL" else one for one in options]
    assert main(["serve-encrypted", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_model_is_written_again_as_it_was(path: Path, tmp_path: Path, capsys) -> None:
    target = tmp_path / "again.safetensors"
    assert main(["serve-encrypted", str(path), "--export", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert target.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "can't be read as .npy"), (b"\x80\x04N.", "can't be read as .npy"), (None, "No such")],
)
def test_data_that_are_no_array_end_with_code_2(
    url: str, tmp_path: Path, content: bytes | None, said: str, capsys
) -> None:
    data = tmp_path / "data.npy"
    if content is not None:
        data.write_bytes(content)
    assert main(["predict-encrypted", url, str(data)]) == 2
    assert said in capsys.readouterr().err


def test_data_of_another_shape_and_a_service_that_is_none(url: str, tmp_path: Path, capsys) -> None:
    data = tmp_path / "data.npy"
    np.save(data, np.zeros((2, 3), np.float32))
    assert main(["predict-encrypted", url, str(data)]) == 2
    assert "the model takes" in capsys.readouterr().err
    assert main(["predict-encrypted", "http://127.0.0.1:9", str(data)]) == 1
    assert main(["predict-encrypted", url, str(data), "--timeout", "0"]) == 2


# -- from a run --


def run(folder: Path, *overrides: str) -> Path:
    known = ["task=digits", "num_clients=1", "task.partition=iid", "rounds=2", "runtime.workers=1"]
    assert main(["run", *known, f"output_dir={folder}", *overrides]) == 0
    (found,) = folder.iterdir()
    return found


def test_the_model_of_a_run_is_served_as_it_was_trained(tmp_path: Path, capsys) -> None:
    folder = run(tmp_path / "runs", "model=encrypted_mlp", "client=fedsgd", "server=adam")
    before = sorted(folder.rglob("*"))
    target = tmp_path / "model.safetensors"
    arguments = ["serve-encrypted", str(folder), "--export", str(target), "--bound", "9"]
    assert main(arguments) == 0
    model, weights = load(target), load_file(folder / "model.safetensors")
    assert model.trained_by.startswith(folder.name)
    assert model.bound == 9
    state = model.network.state_dict()
    assert state.keys() == weights.keys()
    assert all((state[name].numpy() == weights[name]).all() for name in weights)
    assert sorted(folder.rglob("*")) == before


def test_a_run_of_another_model_is_refused(tmp_path: Path, capsys) -> None:
    folder = run(tmp_path / "runs", "model=linear")
    assert main(["serve-encrypted", str(folder)]) == 2
    assert (
        "Linear can't be evaluated on ciphertexts: model=encrypted_mlp" in capsys.readouterr().err
    )
