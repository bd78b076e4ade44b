"""Every kind of file that Trellis reads back, changed in any way: refused in its own words, or read, and never run.

A kind is what writes it with the project's own code, what reads it, and what the reader may raise. Whatever else comes
out of a reader fails the test. Readers that go on without a torn file (a client's own state, a round's record) must not
raise at all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from safetensors import SafetensorError

from clients.dp_ledger import ClientLedger
from clients.encrypted.keys import OwnerKeys
from clients.encrypted.ledger import Charge, ReleaseLedger
from clients.encrypted.ring import Ring
from clients.store import ClientStore
from fl_app.compose import compose
from fl_app.config.schema import Config
from fl_app.folder import RunFolder
from fl_app.services.checkpoint import dump, read
from fl_app.services.summary import read_summary
from strategies.ckks.key import KeyFileError, SharedKey
from strategies.ckks.parameters import CkksParameters
from strategies.collectors.once import Once
from strategies.privacy.events import GaussianRelease
from strategies.privacy.ledger import Ledger
from strategies.secagg.keys import Identity
from strategies.secagg.policy import Roster
from strategies.secagg.vault import Vault
from strategies.timings import Timings
from strategies.update import DELTA, Layout, Section, Update
from strategies.wire import Refused
from tests.fuzz.mutations import NASTY, changed, mutations
from tests.support.examples import many

LAYOUT = Layout.of({"w": np.zeros((2, 3), np.float32)})
SESSION = b"s" * 16


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        write: puts a good one, and whatever it needs, into a folder; returns its path.
        read: what a later process does with it.
        refuses: what that may raise.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    refuses: tuple[type[Exception], ...] = ()


def _checkpoint(folder: Path) -> Path:
    path = folder / "version-00000001.safetensors"
    state = {"model": {"w": np.ones(5, np.float32)}, "round": 1, "timings": Timings().state_dict()}
    path.write_bytes(dump(state))
    return path


def _roster(folder: Path) -> Path:
    Roster({0: Identity.generate().public, 1: Identity.generate().public}).save(folder / "roster")
    return folder / "roster"


def _identity(folder: Path) -> Path:
    (folder / "identity.pem").write_bytes(Identity.generate().to_pem())
    return folder / "identity.pem"


def _shared_key(folder: Path) -> Path:
    _SHARED.save(folder / "ckks.key")
    return folder / "ckks.key"


def _owners_key(folder: Path) -> Path:
    _OWNERS.save(folder / "owner.key")
    return folder / "owner.key"


_SHARED = SharedKey.generate(CkksParameters())
_OWNERS = OwnerKeys.generate(Ring(4096, (36, 36)))


def _store(folder: Path) -> Path:
    ClientStore(folder).propose(0, 0, 1, {"m": np.ones(4, np.float32)})
    (path,) = folder.rglob("client-0*.safetensors")
    return path


def _in_store(path: Path) -> None:
    store = ClientStore(path.parent)
    for vector in store.load(0, 1).values():
        assert isinstance(vector, np.ndarray)
    store.propose(0, 1, 2, {"m": np.ones(4, np.float32)})


def _ledger(folder: Path) -> Path:
    ledger = Ledger(folder / "ledger.jsonl", "central gaussian")
    ledger.charge(GaussianRelease(1.0), 1)
    ledger.charge(GaussianRelease(1.0), 2)
    return folder / "ledger.jsonl"


def _client_ledger(folder: Path) -> Path:
    ClientLedger(folder, 0).add(GaussianRelease(1.0), 3)
    return ClientLedger(folder, 0).path


def _release_ledger(folder: Path) -> Path:
    ledger = ReleaseLedger(folder / "owner.key", "f" * 32)
    (folder / "owner.key").touch(0o600)
    ledger.charge(Charge("one", 0.1, 100, 2.0))
    return ledger.path


def _book(folder: Path) -> Path:
    once = Once(folder)
    once.begin(b"m" * 32, SESSION)
    section = Section(np.ones(6, np.float32), LAYOUT)
    once.keep(b"m" * 32, SESSION, Update({DELTA: section}, 1.0, (0, 1), 0))
    (path,) = folder.glob("*.json")
    return path


def _sums(folder: Path) -> Path:
    _book(folder)
    (path,) = folder.glob("*.safetensors")
    return path


def _in_book(path: Path) -> None:
    once = Once(path.parent)
    assert len(once.run) == 16
    once.void(b"m" * 32)
    once.recall(b"m" * 32, {DELTA: LAYOUT})


def _vault(folder: Path) -> Path:
    vault = Vault(folder, 0)
    (folder / "client-0").mkdir(mode=0o700)
    vault.keep(SESSION, {"keys": b"k" * 32, "members": [1, 2]})
    return next((folder / "client-0").glob("*.json"))


def _summary(folder: Path) -> Path:
    (folder / "summary.json").write_text(
        '{"run_id": "a", "status": "completed", "rounds_completed": 3}'
    )
    return folder / "summary.json"


def _run_config(folder: Path) -> Path:
    run = RunFolder(_config(folder))
    with run.opened():
        run.earlier(10, "data")
    (run.path / "summary.json").write_text('{"config_hash": "another"}')
    return run.path / "config.yaml"


_CONFIG = compose(["task=digits", "run_name=run"])


def _config(folder: Path) -> Config:
    return _CONFIG.within(folder)


def _resumed(path: Path) -> None:
    run = RunFolder(_config(path.parents[2]))
    with run.opened():
        run.earlier(10, "data")


KINDS = {
    "checkpoint": Kind(_checkpoint, read, (ValueError, OSError, SafetensorError)),
    "roster": Kind(_roster, Roster.load, (ValueError,)),
    "identity": Kind(_identity, lambda path: Identity.from_pem(path.read_bytes()), (ValueError,)),
    "shared CKKS key": Kind(_shared_key, SharedKey.load, (KeyFileError,)),
    "owner's key": Kind(_owners_key, OwnerKeys.load, (KeyFileError,)),
    "client's state": Kind(_store, _in_store),
    "ledger": Kind(
        _ledger, lambda path: Ledger(path, "central gaussian").charges, (ValueError, OSError)
    ),
    "client's ledger": Kind(
        _client_ledger, lambda path: ClientLedger(path.parent, 0).charges(), (ValueError,)
    ),
    "owner's ledger": Kind(
        _release_ledger,
        lambda path: ReleaseLedger(path.with_suffix(""), "f" * 32).check(),
        (Refused, ValueError),
    ),
    "sessions' book": Kind(_book, _in_book),
    "sums": Kind(_sums, _in_book),
    "session's secrets": Kind(
        _vault, lambda path: Vault(path.parent.parent, 0).recall(SESSION), (Refused, ValueError)
    ),
    "summary": Kind(_summary, read_summary),
    "a run's configuration": Kind(_run_config, _resumed, (ValueError,)),
}


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


def _hold(kind: Kind, path: Path, data: bytes) -> None:
    """Reads a file of these bytes."""
    path.write_bytes(data)
    with suppress(*kind.refuses):
        kind.read(path)


def _fresh(tmp_path: Path) -> Path:
    folder = tmp_path / os.urandom(6).hex()
    folder.mkdir(mode=0o700)
    return folder


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_file_of_something_else_is_refused_or_passed_over(kind, tmp_path):
    for piece in NASTY:
        path = kind.write(_fresh(tmp_path))
        _hold(kind, path, path.read_bytes())  # a good one, first
        _hold(kind, path, piece)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@settings(max_examples=many(30), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=mutations)
def test_a_changed_file_is_refused_or_read(kind, steps, tmp_path):
    path = kind.write(_fresh(tmp_path))
    _hold(kind, path, changed(path.read_bytes(), steps))
