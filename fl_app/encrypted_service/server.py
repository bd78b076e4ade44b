"""The service: a FastAPI application that predicts on ciphertexts, bounded in what a request can make it do.

GET /health and /v1/model answer at once. POST /v1/predict reads a body no longer than the model's requests are, within
a time, and computes in a pool of threads off the event loop; of requests that are read, wait or are computed there is a
most, and one more is told to come again (503). What is wrong is answered by a status and {"error": {"code", "message"}}
and the service lives on.

It has a model and public parameters. It never sees a key, a feature or a logit, and its log says nothing of a request
but how long it took.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Final

from annotated_types import Ge, Gt, Le
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from clients.encrypted.inference import EncryptedInference
from clients.encrypted.model_file import TrainedModel
from fl_app.encrypted_service import messages
from fl_app.encrypted_service.description import Description
from fl_app.encrypted_service.messages import MEDIA_TYPE, Answer, MessageError
from strategies.ckks.streams import CiphertextError
from strategies.ranges import Ranged

log = logging.getLogger(__name__)

_STATUS: Final = {
    "malformed": 400,
    "truncated": 400,
    "too_long": 400,
    "other_model": 409,
    "bad_samples": 422,
    "bad_residues": 422,
}

_UNREAD: Final = (413, 415, 503)
"""With which a request is refused before its body has been read."""
_LINGER_SECONDS: Final = 2.0
_LONGEST_LENGTH: Final = 15
"""Digits of a Content-Length."""


@dataclass(frozen=True)
class Limits(Ranged):
    """What strangers may take.

    Attributes:
        workers: threads that compute, one request each.
        waiting: further requests that are read, or wait for a thread; each holds a body.
        max_body_mb: of a request, in 2^20 bytes.
        body_seconds: within which a body must have come.
    """

    workers: Annotated[int, Ge(1), Le(256)] = 1
    waiting: Annotated[int, Ge(0), Le(1024)] = 4
    max_body_mb: Annotated[float, Gt(0)] = 256.0
    body_seconds: Annotated[float, Gt(0)] = 60.0


class Refused(Exception):  # noqa: N818 - an answer, no fault of ours
    """A request that is answered by an error.

    Args:
        status: of HTTP.
        code: a word for programs.
        text: what is wrong.
    """

    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(text)
        self.status, self.code = status, code


class Service:
    """A model behind its messages, and who may use it now.

    Args:
        model: that is served.
        limits: see there.

    Raises:
        ValueError: no request of this model fits the limits.
    """

    def __init__(self, model: TrainedModel, limits: Limits) -> None:
        self.description = Description.of(model)
        self.sizes = self.description.sizes()
        self.limits, self.active = limits, 0
        self._inference = EncryptedInference(model.polynomial, model.plan)
        most = int(limits.max_body_mb * 2**20)
        if most < self.sizes.largest_request:
            raise ValueError(
                f"a request of this model has {self.sizes.largest_request / 2**20:.1f} MB, and bodies may have"
                f" {limits.max_body_mb:g}: raise --max-body-mb"
            )
        self._pool = ThreadPoolExecutor(limits.workers, "encrypted-inference")

    async def answer(self, request: Request) -> bytes:
        """One prediction, or `Refused`."""
        if self.active >= self.limits.workers + self.limits.waiting:
            raise Refused(503, "busy", "as many requests as there may be are under way: try again")
        self.active += 1
        try:
            body = await self._body(request)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, self._predict, body)
        finally:
            self.active -= 1

    async def _body(self, request: Request) -> bytearray:
        """The body, read no further than a request of this model is long."""
        most, told = self.sizes.largest_request, request.headers.get("content-length")
        too_large = Refused(413, "too_large", f"a request of this model has {most} bytes at most")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refused(415, "encoded", "bodies are taken as they are, without Content-Encoding")
        if request.headers.get("content-type", "").partition(";")[0].strip() != MEDIA_TYPE:
            raise Refused(415, "media_type", f"the body should be {MEDIA_TYPE}")
        if told is not None and (len(told) > _LONGEST_LENGTH or int(told) > most):
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise Refused(408, "slow", "the body did not come in time") from None
        except ClientDisconnect:
            raise Refused(400, "truncated", "the connection ended within the body") from None
        return body

    def _predict(self, body: bytearray) -> bytes:
        began = time.perf_counter()
        try:
            request = messages.Request.from_bytes(body, self.sizes)
            residues = self._inference(request.first, request.seeds)
        except MessageError as error:
            raise Refused(_STATUS[error.code], error.code, str(error)) from error
        except CiphertextError as error:
            raise Refused(422, "bad_residues", str(error)) from error
        log.info("a request answered in %.3f s", time.perf_counter() - began)
        return Answer(residues).to_bytes(self.sizes)

    def close(self) -> None:
        """Ends the threads, once what they compute is done."""
        self._pool.shutdown(cancel_futures=True)


def application(model: TrainedModel, limits: Limits | None = None) -> FastAPI:
    """The application that serves a model.

    Raises:
        ValueError: no request of this model fits the limits.
    """
    service = Service(model, limits or Limits())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/health")
    async def health() -> dict[str, object]:
        return {"status": "ok", "model": service.sizes.model, "requests": service.active}

    @app.get("/v1/model")
    async def describe() -> Description:
        return service.description

    @app.post("/v1/predict")
    async def predict(request: Request) -> Response:
        return Response(await service.answer(request), media_type=MEDIA_TYPE)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        headers = {"Connection": "close"} | ({"Retry-After": "1"} if error.status == 503 else {})
        kind = _Lingering if error.status in _UNREAD else JSONResponse
        return kind(_told(error.code, str(error)), error.status, headers)

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(_told("http", str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=error)
        return JSONResponse(_told("failed", "the service could not answer"), 500)

    return app


def _told(code: str, message: str) -> dict[str, dict[str, str]]:
    return {"error": {"code": code, "message": message}}


class _Lingering(JSONResponse):
    """An answer to a request whose body is not wanted.

    A connection that is closed on bytes that nobody has read is reset, and the answer lost with it: the client is given
    a moment to read it, and what it still sends is thrown away.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        await send({"type": "http.response.body", "body": bytes(self.body), "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b""})
