"""A client of the service: public features, a key of its own, ciphertexts up, logits that only it can read.

    with EncryptedClient("http://127.0.0.1:8000") as client:
        labels, logits = client.predict(images)

The key is made for this object and never leaves it. Logits must not be sent back to the server, nor be shown where the
server's owner can read them to the last bit: with them it could compute the key (Li and Micciancio 2021, "On the
Security of Homomorphic Encryption on Approximate Numbers"). The server is a stranger: what it says of its model is
checked, and no answer is read that is longer than it must be.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, NamedTuple

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from clients.encrypted.inference_key import InferenceKey
from fl_app.encrypted_service.description import Description
from fl_app.encrypted_service.messages import MEDIA_TYPE, Answer, Request
from strategies import plain_json
from strategies.ckks.streams import CiphertextError

_LARGEST_TEXT = 1 << 16
"""Bytes of a description or an error that are read."""


class ServiceError(RuntimeError):
    """The service refused, failed, or is none.

    Args:
        text: what went wrong.
        status: of HTTP; 0 where there was no answer.
        code: the service's word for it.
    """

    def __init__(self, text: str, status: int = 0, code: str = "") -> None:
        super().__init__(text)
        self.status, self.code = status, code


class Prediction(NamedTuple):
    """What a model says of some inputs.

    Attributes:
        labels: (n,) int64.
        logits: (n, classes) float64: for the owner of the inputs alone.
    """

    labels: NDArray[np.int64]
    logits: NDArray[np.float64]


class EncryptedClient:
    """One owner of data, with a new key.

    Args:
        url: of the service, http:// or https://.
        timeout: seconds for each step of a request: to connect, to send, to wait for an answer.

    Raises:
        ServiceError: there is no such service there, or what it says of its model can't be trusted.
    """

    def __init__(self, url: str, *, timeout: float = 60.0) -> None:
        self._http = httpx.Client(base_url=url, timeout=timeout)
        try:
            found = Description.model_validate_json(self._exchange("GET", "/v1/model"))
            self.description, self.sizes = found, found.sizes()
            self._map = found.features.map()
            self._key = InferenceKey(found.terms())
        except (ValidationError, ValueError) as error:
            self.close()
            raise ServiceError(f"{url} describes no model that can be used: {error}") from error
        except BaseException:
            self.close()
            raise

    def predict(self, images: NDArray[np.floating] | torch.Tensor) -> Prediction:
        """Labels and logits of inputs (n, *input_shape) as the model's task gives them, n at least 1.

        More than one request holds are sent in several.

        Raises:
            ValueError: inputs of another shape, or features that are not finite or beyond the model's bound.
            ServiceError: the service refused or failed.
        """
        inputs = torch.as_tensor(images, dtype=torch.float32)
        shape = self.description.features.input_shape
        if tuple(inputs.shape[1:]) != shape or not len(inputs):
            raise ValueError(
                f"inputs of shape {tuple(inputs.shape)}, and the model takes (n, {shape})"
            )
        with torch.no_grad():
            features = self._map(inputs).numpy()
        most = self.sizes.samples
        parts = [self._logits(features[at : at + most]) for at in range(0, len(features), most)]
        logits = np.concatenate(parts)
        return Prediction(logits.argmax(axis=1), logits)

    def _logits(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        first, seeds = self._key.encrypt(features)
        body = Request(len(features), first, seeds).to_bytes(self.sizes)
        data = self._exchange("POST", "/v1/predict", body)
        try:
            return self._key.decrypt(Answer.from_bytes(data, self.sizes).residues, len(features))
        except (ValueError, CiphertextError) as error:
            raise ServiceError(f"the service's answer is none: {error}") from error

    def _exchange(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """The body of a good answer."""
        most = _LARGEST_TEXT if body is None else self.sizes.answer_bytes + _LARGEST_TEXT
        headers = {} if body is None else {"Content-Type": MEDIA_TYPE}
        headers["Accept-Encoding"] = "identity"
        try:
            with self._http.stream(method, path, content=body, headers=headers) as response:
                if response.status_code != httpx.codes.OK:
                    raise _refusal(response)
                return _read(response, most)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServiceError(f"{self._http.base_url}: {error or type(error).__name__}") from error

    def close(self) -> None:
        """Ends the connection; the key goes with the object."""
        self._http.close()

    def __enter__(self) -> EncryptedClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _read(response: httpx.Response, most: int) -> bytes:
    """An answer's bytes as they came, without decompression."""
    data = bytearray()
    for part in response.iter_raw():
        data += part
        if len(data) > most:
            raise ServiceError(f"an answer of more than {most} bytes", response.status_code)
    return bytes(data)


def _refusal(response: httpx.Response) -> ServiceError:
    status = response.status_code
    try:
        told: Any = plain_json.loads(_read(response, _LARGEST_TEXT))
        code, text = str(told["error"]["code"]), str(told["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ServiceError(f"the service answered {status}", status)
    return ServiceError(f"the service answered {status} {code}: {text}", status, code)
