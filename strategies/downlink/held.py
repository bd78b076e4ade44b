"""The client's half: the models that it holds, on its own disk, and how a request gets its model back.

Files are named by the digest of the model that they hold, so that it does not matter who wrote one, nor when: the
processes of a machine that plays many clients share a folder, and write the same bytes under the same name. Each is
written beside its place and moved there; what is torn or altered does not have its digest, and counts as absent. Only
the last few are kept. A client that can't restore a model refuses the request by one word (`held`), at which the server
sends it the whole.
"""

from __future__ import annotations

import json
import logging
import os
from copy import copy
from pathlib import Path
from typing import Final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from strategies import plain_json
from strategies.downlink.coding import REASON, unpack
from strategies.downlink.messages import HELD, digest_in, packed_in, plain
from strategies.records import record_in
from strategies.secagg.terms import ModelDigest
from strategies.wire import ARRAYS, Refused, pack_model, unpack_model

log = logging.getLogger(__name__)

_IN_MEMORY: Final = 2
"""Models that are held in memory too: a process that plays many clients needs the same one again and again."""


class HeldModels:
    """Models by digest, and requests as they were before the server shrank them.

    Args:
        folder: where the models are; made when the first is kept.
        keep: files that stay, the last ones sent. A device needs a few, for replies that are lost on the way; clients
            that share a folder as many as the server remembers.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self._folder, self._keep = folder, keep
        self._memory: dict[bytes, ArrayRecord] = {}
        self._digest = ModelDigest()

    def restored(self, content: RecordDict) -> RecordDict:
        """The request with its model in it, which is kept; what says nothing of a model to keep stays as it is.

        Requests for the same model are given the same record.

        Raises:
            Refused: `held`, where the model can't be restored, or is another than the request says.
        """
        said = record_in(content, HELD, ConfigRecord)
        if said is None:
            return content
        digest = digest_in(said, "model")
        model = self._known(digest)
        if model is None:
            model = record_in(content, ARRAYS, ArrayRecord) or self._changed(content, said)
            if self._digest.of({ARRAYS: model}) != digest:
                raise Refused(REASON, "the model is not the one that the request names")
        self._keep_model(digest, model)
        return plain(content, model)

    def whole(self, message: Message) -> Message:
        """A message with its request restored: a copy, where it is not whole as it is.

        Raises:
            Refused: as `restored`.
        """
        content = self.restored(message.content)
        if content is message.content:
            return message
        whole = copy(message)  # the one that came may be somebody else's too
        whole.content = content
        return whole

    def _changed(self, content: RecordDict, said: ConfigRecord) -> ArrayRecord:
        packed = packed_in(content, said)
        base = self._known(digest_in(said, "base"))
        if base is None:
            raise Refused(REASON, "the model that the change is for is not here")
        return pack_model(unpack(unpack_model(base), packed))

    def _known(self, digest: bytes) -> ArrayRecord | None:
        """A model that is held, whole."""
        if digest in self._memory:
            return self._memory[digest]
        path = self._path(digest)
        try:
            with safe_open(path, framework="numpy") as file:
                names = plain_json.loads((file.metadata() or {})["names"])
                model = pack_model({name: file.get_tensor(str(n)) for n, name in enumerate(names)})
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the model in %s can't be read: %s", path, error)
            return None
        if self._digest.of({ARRAYS: model}) != digest:
            log.warning("the model in %s is not the one of its name", path)
            return None
        return model

    def _keep_model(self, digest: bytes, model: ArrayRecord) -> None:
        first = digest not in self._memory
        self._memory.pop(digest, None)
        self._memory[digest] = model
        for old in list(self._memory)[:-_IN_MEMORY]:
            del self._memory[old]
        if not first:
            return
        try:
            self._write(self._path(digest), model)
            self._prune()
        except OSError as error:  # a full disk: this request is served, the next model comes whole
            log.warning("the model can't be kept: %s", error)

    def _write(self, path: Path, model: ArrayRecord) -> None:
        if path.exists():
            os.utime(path)  # it is the last one sent
            return
        arrays = unpack_model(model)
        tensors = {str(n): np.asarray(array) for n, array in enumerate(arrays.values())}
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.{os.urandom(4).hex()}.part")
        try:
            save_file(tensors, temporary, {"names": json.dumps(list(arrays))})
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _prune(self) -> None:
        """Removes all but the last ones; another process may do the same, or have done it."""
        ages: list[tuple[int, Path]] = []
        for path in self._folder.glob("*.safetensors"):
            try:
                ages.append((path.stat().st_mtime_ns, path))
            except FileNotFoundError:
                continue
        for _, path in sorted(ages)[: -self._keep]:
            path.unlink(missing_ok=True)

    def _path(self, digest: bytes) -> Path:
        return self._folder / f"{digest.hex()}.safetensors"
