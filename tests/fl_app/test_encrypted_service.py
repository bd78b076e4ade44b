"""Encrypted predictions over HTTP: a real server process, real images, and whatever else strangers may send."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from torch import Tensor

from clients.encrypted.model_file import TrainedModel, load
from clients.tasks.mnist import Mnist
from fl_app.cli.main import main
from fl_app.encrypted_service.client import EncryptedClient, ServiceError
from fl_app.encrypted_service.description import Description
from fl_app.encrypted_service.messages import LARGEST_HEAD, Request
from tests.support.polynomial import logits
from tests.support.serving import good_request, post, raw, serving, until, write_model


@dataclass
class Served:
    """A service, one client of it, and the model that it has.

    Attributes:
        url: of the service.
        client: with a key.
        model: as the file says it.
        good: body of a good request.
    """

    url: str
    client: EncryptedClient
    model: TrainedModel
    good: bytes

    def answers(self, images: Tensor | None = None) -> None:
        """It lives, and says what the network says."""
        images = Mnist().test().inputs[:8] if images is None else images
        found, expected = self.client.predict(images), logits(self.model.network, images)
        assert np.abs(found.logits - expected).max() < 0.05


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = write_model(tmp_path_factory.mktemp("served"))
    options = ("--waiting", "1", "--max-body-mb", "1.5", "--body-seconds", "1.5")
    model = load(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        with serving(path, *options) as (url, _), EncryptedClient(url) as client:
            yield Served(url, client, model, good_request(model))


# -- what it is for --


def test_a_thousand_images_get_the_networks_own_labels(served: Served) -> None:
    images = Mnist().test().inputs
    found, network = served.client.predict(images), served.model.network
    assert (found.labels == logits(network, images).argmax(axis=1)).all()
    assert found.labels.shape == (1000,)
    assert found.logits.shape == (1000, 10)


def test_more_images_than_slots_take_several_requests(served: Served) -> None:
    images = Mnist().train().inputs[:4000].repeat(2, 1, 1, 1)[:4100]
    served.answers(images)


def test_what_a_client_needs_and_no_weight_is_told(served: Served) -> None:
    model = served.model
    told = httpx.get(f"{served.url}/v1/model").json()
    assert Description.model_validate_json(json.dumps(told)) == Description.of(model)
    assert told["samples"] == 4096
    assert told["request_bytes"] == 9 * (2 * 8192 * 8 + 64)
    assert len(json.dumps(told)) < 1000
    health = httpx.get(f"{served.url}/health").json()
    assert health == {"status": "ok", "model": model.digest, "requests": 0}


def test_requests_hold_first_halves_and_seeds_and_no_room_for_a_key(served: Served) -> None:
    sizes = served.client.sizes
    head = len(served.good) - sizes.request_bytes
    told = json.loads(served.good[12:head])
    assert set(told) == {"model", "samples"}
    assert sizes.request_bytes == 9 * (2 * sizes.degree * 8 + 64)
    assert not any(b"key" in name.encode() for name in Request.__dataclass_fields__)


def test_the_command_prints_labels(served: Served, tmp_path: Path, capsys) -> None:
    images = Mnist().test().inputs[:5]
    np.save(tmp_path / "images.npy", images.numpy())
    assert main(["predict-encrypted", served.url, str(tmp_path / "images.npy")]) == 0
    expected = logits(served.model.network, images).argmax(axis=1)
    assert capsys.readouterr().out.split() == list(map(str, expected))


# -- what strangers send --


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
    served: Served, broken, status: int, code: str
) -> None:
    found = post(served.url, broken(served.good))
    assert (found.status_code, found.json()["error"]["code"]) == (status, code)
    assert found.json()["error"]["message"]
    served.answers()


def test_residues_that_are_no_ciphertext_get_an_answer_that_means_nothing(served: Served) -> None:
    start = len(served.good) - served.client.sizes.request_bytes
    zeros = post(served.url, served.good[:start] + bytes(len(served.good) - start))
    assert zeros.status_code == 200
    assert len(zeros.content) <= served.client.sizes.answer_bytes + LARGEST_HEAD
    served.answers()


def reply(connection: socket.socket) -> tuple[int, str]:
    """Status and the error's code."""
    with connection, http.client.HTTPResponse(connection) as response:
        response.begin()
        return response.status, json.loads(response.read())["error"]["code"]


@pytest.mark.parametrize("length", [str(2**22), str(10**14), str(10**19)])
def test_a_body_that_is_too_large_is_refused_before_it_is_read(served: Served, length: str) -> None:
    assert reply(raw(served.url, f"Content-Length: {length}")) == (413, "too_large")
    served.answers()


def test_a_body_in_pieces_is_cut_off_where_it_is_too_long(served: Served) -> None:
    connection = raw(served.url, "Transfer-Encoding: chunked")
    piece = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    for _ in range(served.client.sizes.largest_request // (1 << 16) + 1):
        connection.sendall(piece)
    assert reply(connection) == (413, "too_large")
    served.answers()


def test_who_sends_it_all_the_same_is_told_too(served: Served) -> None:
    for body in (bytes(20_000_000), iter([bytes(1 << 20)] * 20)):
        found = post(served.url, body)
        assert (found.status_code, found.json()["error"]["code"]) == (413, "too_large")
    served.answers()


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Content-Encoding": "gzip"}, "encoded"),
        ({"Content-Type": "application/json"}, "media_type"),
    ],
)
def test_another_kind_of_body_is_refused(
    served: Served, headers: dict[str, str], code: str
) -> None:
    found = post(served.url, served.good, **headers)
    assert (found.status_code, found.json()["error"]["code"]) == (415, code)
    served.answers()


def test_a_client_that_goes_in_the_middle_leaves_no_trace(served: Served) -> None:
    for _ in range(5):
        raw(served.url, f"Content-Length: {len(served.good)}", served.good[:5000]).close()
    until(lambda: httpx.get(f"{served.url}/health").json()["requests"] == 0)
    served.answers()


def test_slow_ones_are_ended_and_meanwhile_others_are_told_to_come_again(served: Served) -> None:
    slow = [raw(served.url, f"Content-Length: {len(served.good)}") for _ in range(2)]
    until(lambda: httpx.get(f"{served.url}/health").json()["requests"] == 2)
    busy = post(served.url, served.good)
    assert (busy.status_code, busy.json()["error"]["code"]) == (503, "busy")
    assert busy.headers["retry-after"] == "1"
    with pytest.raises(ServiceError, match="503 busy") as refused:
        served.client.predict(Mnist().test().inputs[:1])
    assert (refused.value.status, refused.value.code) == (503, "busy")
    assert [reply(connection) for connection in slow] == [(408, "slow")] * 2
    served.answers()


@pytest.mark.parametrize(
    ("method", "place", "status"),
    [("GET", "/v1/predict", 405), ("POST", "/v1/model", 405), ("GET", "/../etc/passwd", 404),
     ("GET", "/docs", 404), ("GET", "/openapi.json", 404)],
)  # fmt: skip
def test_what_is_not_there_is_told_in_the_same_form(
    served: Served, method: str, place: str, status: int
) -> None:
    found = httpx.request(method, served.url + place)
    assert (found.status_code, found.json()["error"]["code"]) == (status, "http")
