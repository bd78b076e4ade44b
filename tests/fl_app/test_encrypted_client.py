"""What a client takes from a service that is a stranger, what messages are, and the two commands."""

from __future__ import annotations

import http.server
import json
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from clients.encrypted.model_file import load
from fl_app.cli.main import main
from fl_app.encrypted_service.client import EncryptedClient, ServiceError
from fl_app.encrypted_service.description import Description
from fl_app.encrypted_service.messages import Answer, MessageError, Request, Sizes
from tests.support.serving import good_request, raw, serving, until, write_model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


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


def test_inputs_of_another_shape_or_size_are_not_sent(stranger, path: Path) -> None:
    url, told = stranger
    told["/v1/model"] = (200, Description.of(load(path)).model_dump_json().encode())
    with EncryptedClient(url) as client:
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
def test_an_interrupt_ends_it_cleanly_after_what_it_is_at(path: Path, number: int) -> None:
    model = load(path)
    good = good_request(model)
    with serving(path) as (url, process):
        connection = raw(url, f"Content-Length: {len(good)}", good[:-100])
        until(lambda: httpx.get(f"{url}/health").json()["requests"] == 1)
        process.send_signal(number)
        connection.sendall(good[-100:])
        with connection:
            data = b"".join(iter(lambda: connection.recv(1 << 20), b""))
        assert data.startswith(b"HTTP/1.1 200 OK")
        Answer.from_bytes(data.partition(b"\r\n\r\n")[2], Description.of(model).sizes())
        assert process.wait(timeout=30) == 0


def test_an_address_that_is_taken_ends_with_code_1(path: Path, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve-encrypted", str(path), "--port", str(port)]) == 1
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
    tmp_path: Path, content: bytes | None, said: str, capsys
) -> None:
    data = tmp_path / "data.npy"
    if content is not None:
        data.write_bytes(content)
    assert main(["predict-encrypted", "http://127.0.0.1:9", str(data)]) == 2
    assert said in capsys.readouterr().err


def test_data_of_another_shape_and_a_service_that_is_none(
    stranger, path: Path, tmp_path: Path, capsys
) -> None:
    url, told = stranger
    told["/v1/model"] = (200, Description.of(load(path)).model_dump_json().encode())
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
