"""What a client keeps: on its own disk, for itself alone, until a session is over; and in no message and no log."""

import base64
import logging
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from strategies.secagg.keys import KEY_BYTES
from strategies.secagg.statements import POINT_BYTES
from strategies.secagg.terms import SECAGG
from strategies.secagg.vault import Vault, forget_all
from strategies.wire import Refused
from tests.support.masked import Cohort, altered, cohort, folder, said

MODES = pytest.mark.parametrize("mode", ["semi-honest", "malicious"])
SECRET = {".json", ".upload", ".part"}
SESSION = bytes(range(16))


def secrets_on(path: Path) -> list[str]:
    return sorted(file.name for file in path.rglob("*") if file.suffix in SECRET)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---- the disk ----


@MODES
def test_folders_and_files_are_the_owners_alone(mode):
    with cohort(5, mode=mode) as clients:
        clients.run(until="unmask")
        assert mode_of(clients.folder) == 0o700
        kinds = set()
        for path in clients.folder.rglob("*"):
            assert mode_of(path) == (0o700 if path.is_dir() else 0o600), path
            kinds.add(path.suffix if path.is_file() else "folder")
        assert kinds == {"folder", "", ".json", ".upload"}  # the ledger and the lock have no suffix


def test_folders_that_were_open_to_others_are_closed(tmp_path):
    own = tmp_path / "secagg" / "client-3"
    own.mkdir(parents=True)
    for path in (own, own.parent):
        path.chmod(0o755)
    with Vault(own.parent, 3).locked():
        assert (mode_of(own), mode_of(own.parent)) == (0o700, 0o700)


@MODES
def test_nothing_but_the_ledger_is_left_of_a_round(mode):
    with cohort(5, mode=mode) as clients:
        clients.run()
        assert secrets_on(clients.folder) == []
        assert all((clients.folder / f"client-{one}" / "ledger").stat().st_size for one in range(5))


@MODES
def test_a_drop_outs_secrets_go_when_the_next_session_begins(mode):
    with cohort(5, mode=mode) as clients:
        first = clients.run(lost={"unmask": [3]})
        session = clients.terms(first).session.hex()
        assert secrets_on(clients.folder) == [f"{session}.json", f"{session}.upload"]
        ledger = (clients.folder / "client-3" / "ledger").read_text()
        clients.model = {"w": clients.model["w"] + 1}
        clients.run(until="shares")
        assert not [name for name in secrets_on(clients.folder) if name.startswith(session)]
        assert (clients.folder / "client-3" / "ledger").read_text().startswith(ledger)


def test_a_machine_that_plays_all_clients_forgets_them_together():
    with cohort(5) as clients:
        clients.run(until="unmask")
        assert len(secrets_on(clients.folder)) == 10
        clients.clients[0].forget()
        assert secrets_on(clients.folder) == []
        assert (clients.folder / "client-4" / "ledger").exists()
        forget_all(clients.folder / "nowhere")


@MODES
def test_an_upload_is_sent_again_byte_for_byte_and_nothing_is_trained(mode):
    """The reply was lost: a new process over the same folder sends the same one."""
    with cohort(5, mode=mode) as clients:
        outcome = clients.run(until=clients.steps[3])
        request, sent = outcome.of("upload", 2, "request"), outcome.of("upload", 2)
        clients.restart()
        trained = list(clients.trained)
        again = clients.answer(2, request)
        assert again["upload"]["masked"].data == sent["upload"]["masked"].data
        assert said(again) == said(sent)
        assert clients.trained == trained


@MODES
def test_a_client_that_dies_before_its_reply_sends_that_very_upload(mode, monkeypatch):
    """It dies once the upload is on the disk: no second update is ever put under the same masks."""

    class Died(BaseException):
        pass

    with cohort(5, mode=mode) as clients:
        request = clients.run(until="upload").of("upload", 0, "request")
        keep = Vault.keep_upload
        written = []

        def dies(vault: Vault, session: bytes, upload: bytes) -> None:
            keep(vault, session, upload)
            written.append(upload)
            raise Died

        with monkeypatch.context() as patch:
            patch.setattr(Vault, "keep_upload", dies)
            with pytest.raises(Died):
                clients.answer(0, request)
        clients.restart()
        clients.vectors[0] = -clients.vectors[0]  # another training would give another update
        assert clients.answer(0, request)["upload"]["masked"].data == written[0]
        assert clients.trained == [0]


@MODES
def test_a_client_that_dies_before_its_upload_is_written_takes_no_further_part(mode, monkeypatch):
    with cohort(5, mode=mode) as clients:
        request = clients.run(until="upload").of("upload", 0, "request")

        def full(vault: Vault, session: bytes, upload: bytes) -> None:
            raise OSError("no space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Vault, "keep_upload", full)
            with pytest.raises(OSError, match="no space"):
                clients.answer(0, request)
        with pytest.raises(Refused, match="phase"):
            clients.answer(0, request)


@MODES
def test_of_two_requests_at_once_one_is_answered(mode):
    """Two threads ask one client to unmask, with another idea of who dropped out each."""
    with cohort(5, mode=mode) as clients:
        request = clients.run(until="unmask", lost={"upload": [4]}).of("unmask", 0, "request")
        other = (
            request if mode == "malicious" else altered(request, alive=[0, 1, 2], dropped=[3, 4])
        )
        replies: list[RecordDict] = []
        refusals: list[Refused] = []
        barrier = threading.Barrier(2)

        def ask(content: RecordDict) -> None:
            barrier.wait()
            try:
                replies.append(clients.answer(0, content))
            except Refused as refused:
                refusals.append(refused)

        threads = [threading.Thread(target=ask, args=(one,)) for one in (request, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(replies) == 1
        assert [refused.reason for refused in refusals] == ["session"]


# ---- the vault by itself ----


def test_a_state_comes_back_as_it_was_kept():
    with folder() as path:
        vault = Vault(path / "all", 3)
        state = {
            "keys": [b"\x00\xff", b""],
            "held": {"7": b"share"},
            "n": 5,
            "text": "é",
            "none": None,
        }
        with vault.locked():
            vault.keep(SESSION, state)
        assert Vault(path / "all", 3).recall(SESSION) == state
        assert vault.upload(SESSION) is None
        with pytest.raises(Refused, match="never began here"):
            vault.recall(bytes(16))
        with pytest.raises(TypeError, match="set cannot be kept"), vault.locked():
            vault.keep(SESSION, {"bad": {1}})
        assert vault.recall(SESSION) == state


def test_a_ledger_line_that_was_cut_off_spoils_no_other():
    with cohort(5) as clients:
        ledger = clients.folder / "client-0" / "ledger"
        clients.run(until="shares")
        with ledger.open("a") as file:
            file.write("\nopened 1234")  # the disk was full here
        clients.run()
        assert [len(line.split()) for line in ledger.read_text().split("\n")] == [0, 4, 2, 4, 4]
        clients.restore()
        assert "reused" in str(clients.run().refusals[0])


def test_a_ledger_that_cannot_be_written_stops_what_it_is_for(monkeypatch):
    with cohort(5) as clients:
        request = clients.run(until="unmask").of("unmask", 0, "request")
        monkeypatch.setattr("strategies.secagg.vault.os.write", lambda handle, data: 3)
        with pytest.raises(OSError, match="could not be written in full"):
            clients.answer(0, request)


# ---- messages and logs ----


def values_of(content: RecordDict) -> Iterator[bytes]:
    """All that a message holds, as bytes."""
    for record in content.values():
        if isinstance(record, ArrayRecord):
            yield from (array.data for array in record.values())
            continue
        for value in record.values():
            for one in value if isinstance(value, list) else [value]:
                yield one if isinstance(one, bytes) else str(one).encode()


def forms(secret: bytes) -> list[bytes]:
    return [secret, secret.hex().encode(), base64.b64encode(secret)[:40], repr(secret).encode()]


class Watch:
    """Collects all secrets that lie on the clients' disks as a run goes on."""

    def __init__(self, clients: Cohort) -> None:
        self._clients = clients
        self.keys: set[bytes] = {one.private for one in clients.identities.values()}
        self.shares: dict[tuple[int, int], tuple[bytes, bytes]] = {}

    def look(self, step: str, client: int, content: RecordDict) -> RecordDict:
        for path in self._clients.folder.glob("client-*/*.json"):
            holder = int(path.parent.name.removeprefix("client-"))
            state = Vault(self._clients.folder, holder).recall(bytes.fromhex(path.stem))
            self.keys |= {state["seed"], state["masking"], *state.get("opens", {}).values()}
            self.keys |= {state["sealing"]} if "sealing" in state else set()
            for owner, share in state.get("held", {}).items():
                begin, middle = POINT_BYTES, POINT_BYTES + KEY_BYTES
                self.shares[int(owner), holder] = share[begin:middle], share[middle:]
        return content


@MODES
def test_no_secret_is_in_any_message_or_log(mode, caplog):
    """A run with drop-outs and refusals; shares are in the replies to the last step only, and those asked for."""
    caplog.set_level(logging.DEBUG)
    with cohort(5, mode=mode) as clients:
        watch = Watch(clients)
        spoilt = {"shares": 3}

        def lie(step: str, client: int, content: RecordDict) -> RecordDict:
            return altered(content, keys=b"") if spoilt.get(step) == client else content

        outcome = clients.run(request=lie, reply=watch.look, lost={"upload": [4]})
        assert outcome.update.members == (0, 1, 2)
        # Identities, three secrets each, and of the four that dealt shares a key for each neighbour's.
        assert len(watch.keys) == 5 + 3 * 5 + 4 * 4
        # 0, 1, 2 and 4 dealt shares; 0, 1 and 2 opened them, each has its own as well, and 4 has only that.
        assert len(watch.shares) == 3 * 4 + 1
        texts = caplog.text.encode()
        texts += b"".join(str(refused).encode() for refused in outcome.refusals.values())
        everything = {watch_share for pair in watch.shares.values() for watch_share in pair}
        for secret in watch.keys | everything:
            assert not any(form in texts for form in forms(secret))
        revealed = 0
        for kind, step, client, content in outcome.sent:
            hidden = set(watch.keys | everything)
            if (kind, step) == ("reply", "unmask"):
                shown = {watch.shares[owner, client][int(owner == 4)] for owner in (0, 1, 2, 4)}
                hidden -= shown
                joined = b"".join(values_of(content))
                assert all(share in joined for share in shown)
                revealed += 1
            for value in values_of(content):
                assert not any(form in value for secret in hidden for form in forms(secret))
        assert revealed == 3


def test_nothing_shows_a_secret_by_its_representation():
    with cohort(5, mode="malicious") as clients:
        policy = clients.policies[0]
        private = clients.identities[0].private
        assert private.hex() not in repr(policy)
        assert repr(private)[2:-1] not in repr(policy) + repr(clients.identities[0])


def test_an_uploads_record_says_what_its_bytes_are():
    with cohort(5) as clients:
        reply = clients.run().of("upload", 0)
        assert isinstance(reply[SECAGG], ConfigRecord)
        assert reply["upload"]["masked"].numpy().shape == (10,)
        assert tuple(reply["upload"]["masked"].shape) == (10,)
