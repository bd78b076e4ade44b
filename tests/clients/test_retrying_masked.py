"""Under masks a training may be tried again, an upload never: what was put under masks once is sent, or nothing is."""

import resource
from contextlib import contextmanager
from typing import ClassVar

import pytest

from clients.client import Client
from clients.retrying import Retry
from clients.store import ClientStore
from clients.trainers import SGD
from fl_app.engine.flwr_internals import claim_identity
from strategies.collectors import PlainClient
from strategies.wire import Refused
from tests.clients.test_client import TASK, data, module, request
from tests.support.masked import cohort

SIZE = 20_000
"""Elements of an update: 80,000 bytes under the mask, far more than a session's keys and shares."""


@contextmanager
def files_of_at_most(size: int):
    """The kernel refuses to write more into a file: an OSError, as of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def uploaded(clients, asked) -> list[bytes]:
    """What client 0 sends; nothing where its disk is full, or its session past an upload that is not there."""
    try:
        return [bytes(clients.answer(0, asked)["upload"]["masked"].data)]
    except (OSError, Refused) as error:
        if isinstance(error, Refused) and error.reason != "phase":
            raise
        return []


@pytest.mark.parametrize("mode", ["semi-honest", "malicious"])
@pytest.mark.parametrize("room", [0, 700, 6_000, 40_000, 79_000, 200_000])
def test_after_a_full_disk_no_second_vector_goes_under_the_same_masks(mode, room):
    """Whatever could be written; the training after it comes to another update, as one of DP-SGD would."""
    with cohort(5, mode=mode, size=SIZE) as clients:
        asked = clients.run(until="upload").of("upload", 0, "request")
        with files_of_at_most(room):
            first = uploaded(clients, asked)
        assert len(first) == (room > 4 * SIZE)
        kept = [path.read_bytes() for path in clients.folder.rglob("client-0/*.upload")]
        clients.restart()
        clients.vectors[0] = -clients.vectors[0]
        later = uploaded(clients, asked)
        clients.restart()
        last = uploaded(clients, asked)
        assert len({*first, *kept, *later, *last}) <= 1
        assert later == last


class Full(PlainClient):
    """A collector's half that can't write what it would send."""

    calls: ClassVar[list[int]] = []

    def reply(self, update, request):
        self.calls.append(1)
        raise OSError(28, "No space left on device")


def test_a_client_that_tries_again_makes_one_reply_of_one_training(tmp_path):
    claim_identity(1)
    half, retry = Full(), Retry(attempts=3, backoff_seconds=0.0)
    Full.calls.clear()
    ours = Client(TASK, module(), data, SGD(), half=half, store=ClientStore(tmp_path), retry=retry)
    (reply,) = ours.answer([request()])
    assert "No space left on device" in reply.error.reason
    assert len(Full.calls) == 1
