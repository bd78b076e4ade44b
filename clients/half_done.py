"""Half-done local training, on the client's own disk: a process that is killed goes on from there in the next one.

    <root>/client-3.half-done    one file a logical client: weights, moments, generators, order, losses (a `Point`)

A deployed client is a process a message. When the same request comes again (same run, round, model and seed), training
goes on and comes to the same bits as one that nobody disturbed. What belongs to anything else, or is torn, is removed;
so is what has become a reply; what is never asked for again goes by its age (`clients.leftovers`). Written at most
every so many seconds, atomically, with a checksum, and for this user only: what lies there was trained on the examples
and has no noise. Nothing is unpickled.

Trainers with a loop of their own keep nothing here. DP-SGD's in particular: the key of its coins and noise would have
to lie on the disk, for others to read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clients.durable import replace_durably
from clients.leftovers import take_up
from clients.trainers.course import Point
from clients.trainers.sgd import FitJob
from strategies import plain_json
from strategies.configuration import KEPT
from strategies.wire import REPLY_BYTES, SENT

log = logging.getLogger(__name__)

_BESIDE = frozenset({"attempt", "phase", "phases", KEPT, REPLY_BYTES, SENT})
"""Settings of a request that may differ when it is asked again, and change nothing of what is trained."""


class HalfDoneFits:
    """Half-done work of the logical clients of one process.

    Args:
        root: folder of one run's; it is made when something is first written.
        run: what tells the run from another: hashes of its configuration and code.
        every: seconds between two writes, at least.
        clock: seconds.
    """

    def __init__(
        self,
        root: Path,
        run: str,
        *,
        every: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root, self._run = root, run
        self._every, self._clock = every, clock

    def of(self, job: FitJob) -> HalfDoneFit:
        """Where one job's half-done work lies."""
        return HalfDoneFit(self._path(job.client), self._run, job, self._every, self._clock)

    def drop(self, client: int) -> None:
        """Removes what a client was in the middle of."""
        _drop(self._path(client))

    def _path(self, client: int) -> Path:
        return self._root / f"client-{int(client)}.half-done"


class HalfDoneFit:
    """One job's, as a `Keeper`; see `HalfDoneFits`."""

    def __init__(
        self, path: Path, run: str, job: FitJob, every: float, clock: Callable[[], float]
    ) -> None:
        self._path, self._run, self._job = path, run, job
        self._every, self._clock = every, clock
        self._written = clock()
        self._named: dict[str, Any] | None = None

    def load(self) -> Point | None:
        """What lies there of this very job; whatever else lies there is removed."""
        take_up(self._path)
        try:
            with safe_open(self._path, framework="pt") as file:
                told = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
            content = plain_json.loads(told["half-done"])
            if told["sha256"] != _digest(told["half-done"], tensors):
                raise ValueError("its checksum is another")
            job, figures = content["job"], content["figures"]
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("half-done work of client %d can't be read: %s", self._job.client, error)
            self.drop()
            return None
        if job != self._name:
            self.drop()
            return None
        log.info("client %d goes on behind local step %s", self._job.client, figures.get("taken"))
        return Point(tensors, figures)

    def due(self) -> bool:
        """Whether the last write is long enough ago."""
        return self._clock() - self._written >= self._every

    def save(self, point: Point) -> None:
        """Writes a point; where that fails, a log says so and training goes on: it would be lost only if it died."""
        content = json.dumps({"job": self._name, "figures": dict(point.figures)})
        tensors = dict(point.tensors)
        told = {"half-done": content, "sha256": _digest(content, tensors)}
        try:
            replace_durably(self._path, lambda file: save_file(tensors, file, told))
        except (OSError, SafetensorError) as error:
            log.warning("half-done work of client %d is not kept: %s", self._job.client, error)
        self._written = self._clock()

    def drop(self) -> None:
        """Removes what lies there."""
        _drop(self._path)

    @property
    def _name(self) -> dict[str, Any]:
        """What tells this job from others; made when something is there to be compared, or to be written."""
        if self._named is None:
            job = self._job
            settings = {key: value for key, value in job.settings.items() if key not in _BESIDE}
            self._named = {
                "run": self._run,
                "client": job.client,
                "round": job.settings.get("server-round"),
                "model": _digest_of(job.arrays),
                "seed": job.seed,
                "examples": list(job.examples.inputs.shape),
                "beside": _digest_of(job.broadcast) + _digest_of(job.state),
                "settings": hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest(),
            }
        return self._named


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return hashlib.sha256(f"{text}\0{_digest_of(arrays)}".encode()).hexdigest()


def _digest_of(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256, in hex, over names, shapes and numbers."""
    hashed = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        hashed.update(f"{name} {array.dtype} {array.shape}\0".encode())
        hashed.update(np.ascontiguousarray(array).data)
    return hashed.hexdigest()


def _drop(path: Path) -> None:
    """Removes a file, and what a process that was killed in the middle of writing it has left."""
    path.unlink(missing_ok=True)
    for part in path.parent.glob(f"{path.name}.*.part"):
        part.unlink(missing_ok=True)
