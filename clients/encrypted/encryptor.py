"""Encrypts mini-batches in processes of the owner's own, several at once: SEAL's bindings hold the interpreter's lock.

Each process is started afresh for one mini-batch, is told where the owner's key file lies, and writes its ciphertexts
to the owner's disk (`half_done`), where whoever started it finds them. So the secret key goes from its file to the
processes that need it, over no pipe; features come in by standard input, and nothing goes out but an exit code.
A start costs about half a second: it is worth it for mini-batches of hundreds of ciphertexts.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from clients.encrypted.half_done import OwnerFolder
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.owner import INPUTS, LABELS, PACKED, Owner
from clients.encrypted.plan import Plan, plan_of
from clients.encrypted.spec import Spec
from strategies import plain_json

log = logging.getLogger(__name__)

WORTH: Final = 128
"""Ciphertexts of a mini-batch from which a process of its own is worth its start."""


class EncryptionError(RuntimeError):
    """A process that encrypts has failed."""


@dataclass(frozen=True)
class Pending:
    """A mini-batch that is not encrypted yet.

    Attributes:
        number: among the owner's mini-batches.
        features: (n, d).
        targets: classes (n,).
    """

    number: int
    features: NDArray[np.floating]
    targets: NDArray[np.int64]


def fresh(owner: Owner, plan: Plan, pending: Pending) -> dict[str, NDArray[np.generic]]:
    """A mini-batch's fresh ciphertexts, as they travel."""
    found = owner.inputs(pending.features).to_arrays(INPUTS)
    found |= owner.packed(pending.features).to_arrays(PACKED)
    if plan.spec.loss == "squared":
        found |= owner.labels(pending.targets).to_arrays(LABELS)
    return found


def encrypt_all(
    plan: Plan, key: Path, folder: OwnerFolder, data: str, batches: Sequence[Pending]
) -> None:
    """Encrypts mini-batches at once, a process each, onto the owner's disk.

    Args:
        plan: of the ciphertexts.
        key: the owner's key file.
        folder: the owner's own.
        data: name of examples, key and plan.
        batches: as many as there are processors, at the most.

    Raises:
        EncryptionError: one has failed; what the others made is kept.
    """
    began = time.monotonic()
    running = [(batch, _start(plan, key, folder, data, batch)) for batch in batches]
    failed = [batch.number for batch, process in running if process.wait() != 0]
    if failed:
        raise EncryptionError(
            f"mini-batches {failed} could not be encrypted: the lines above say why"
        )
    numbers = ", ".join(str(batch.number) for batch in batches)
    log.info("encrypted mini-batches %s in %.1f s", numbers, time.monotonic() - began)


def _start(
    plan: Plan, key: Path, folder: OwnerFolder, data: str, batch: Pending
) -> subprocess.Popen[bytes]:
    told = {
        "spec": asdict(plan.spec), "key": str(key), "folder": str(folder.path.parent), "client": folder.client,
        "data": data, "number": batch.number,
    }  # fmt: skip
    content = BytesIO()
    np.savez(content, told=json.dumps(told), features=batch.features, targets=batch.targets)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "clients.encrypted.encryptor"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment,
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as pipe:  # it ended at once, and says why
        pipe.write(content.getbuffer())
    return process


def main(arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """One mini-batch, in its own process."""
    told = plain_json.loads(str(arrays["told"]))
    plan = plan_of(Spec(**told["spec"]))
    owner = Owner(plan, OwnerKeys.load(Path(told["key"])))
    targets = arrays["targets"].astype(np.int64)
    pending = Pending(told["number"], arrays["features"].astype(np.float64), targets)
    folder = OwnerFolder(Path(told["folder"]), told["client"])
    folder.keep_ciphertexts(told["data"], pending.number, fresh(owner, plan, pending))


if __name__ == "__main__":
    with np.load(BytesIO(sys.stdin.buffer.read()), allow_pickle=False) as content:
        main(dict(content))
