"""What `trellis certs` makes: a chain that strict readers take, for its hosts and time, and nobody else's to read."""

from __future__ import annotations

import importlib
import socket
import ssl
import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from hypothesis import given
from hypothesis import strategies as st

from fl_app.cli.certs import main
from fl_app.flower import certificates, signing
from fl_app.flower.certificates import Certificates, describe

# VERIFY_X509_STRICT is what Python 3.13 asks for by default.
STRICT = ssl.VerifyFlags.VERIFY_X509_STRICT | ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert main(["all", str(tmp_path / "certs"), "--host", "fl.example.org", "--nodes", "2"]) == 0
    return tmp_path / "certs"


def greet(folder: Path, host: str, authority: Path | None = None) -> str:
    """Connect to a server of this folder's as a client that knows it by `host`; what the server says."""
    files = Certificates(folder)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(files.server, files.server_key)
    asking = ssl.create_default_context(cafile=str(authority or files.authority))
    asking.verify_flags |= STRICT
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            plain, _ = listener.accept()
            try:
                with serving.wrap_socket(plain, server_side=True) as secure:
                    secure.sendall(b"welcome")
            except (ssl.SSLError, ConnectionError):
                plain.close()

        server = threading.Thread(target=serve)
        server.start()
        try:
            with (
                socket.create_connection(listener.getsockname()) as plain,
                asking.wrap_socket(plain, server_hostname=host) as secure,
            ):
                return secure.recv(100).decode()
        finally:
            server.join()


class TestChain:
    @pytest.mark.parametrize("host", ["fl.example.org", "localhost", "127.0.0.1"])
    def test_a_client_of_the_authority_takes_the_server_by_each_of_its_names(
        self, folder: Path, host: str
    ) -> None:
        assert greet(folder, host) == "welcome"

    @pytest.mark.parametrize("host", ["example.org", "a.fl.example.org", "10.0.0.1"])
    def test_another_host_is_refused(self, folder: Path, host: str) -> None:
        with pytest.raises(ssl.SSLCertVerificationError, match="is not valid for"):
            greet(folder, host)

    def test_another_authority_is_refused(self, folder: Path, tmp_path: Path) -> None:
        certificates.make_authority(tmp_path / "other")
        with pytest.raises(ssl.SSLCertVerificationError, match=r"unable to get (local )?issuer"):
            greet(folder, "localhost", Certificates(tmp_path / "other").authority)

    def test_an_expired_certificate_is_refused(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Earlier(datetime):
            @classmethod
            def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
                return datetime.now(UTC) - timedelta(days=3)

        with monkeypatch.context() as patch:
            patch.setattr(signing, "datetime", Earlier)
            certificates.renew_server(folder, days=2)
        with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
            greet(folder, "localhost")
        assert main(["show", str(Certificates(folder).server)]) == 1
        assert "none: expired" in capsys.readouterr().out
        assert main(["server", str(folder), "--renew"]) == 0
        assert greet(folder, "fl.example.org") == "welcome"

    def test_a_server_cannot_sign_for_another(self, folder: Path, tmp_path: Path) -> None:
        mine, forged = Certificates(folder), Certificates(tmp_path / "forged")
        forged.folder.mkdir(mode=0o700)
        forged.authority_key.write_bytes(mine.server_key.read_bytes())
        forged.authority_key.chmod(0o600)
        forged.authority.write_bytes(mine.server.read_bytes())
        certificates.make_server(forged.folder, ["bank.example.org"], days=1)
        chain = forged.server.read_bytes() + mine.server.read_bytes()
        forged.server.write_bytes(chain)
        with pytest.raises(ssl.SSLCertVerificationError):
            greet(forged.folder, "bank.example.org", mine.authority)


class TestRenewal:
    def test_it_keeps_authority_key_and_hosts(self, folder: Path) -> None:
        files = Certificates(folder)
        kept = [files.authority, files.authority_key, files.server_key]
        before = [path.read_bytes() for path in kept]
        old = describe(files.server)
        certificates.renew_server(folder, days=500)
        new = describe(files.server)
        assert [path.read_bytes() for path in kept] == before
        assert (new.hosts, new.issuer) == (old.hosts, old.issuer)
        assert new.ends is not None
        assert old.ends is not None
        assert abs((new.ends - old.ends) - timedelta(days=135)) < timedelta(minutes=5)
        assert new.fingerprint != old.fingerprint

    def test_it_can_name_other_hosts(self, folder: Path) -> None:
        assert main(["server", str(folder), "--renew", "--host", "10.1.2.3"]) == 0
        assert describe(Certificates(folder).server).hosts == ("localhost", "127.0.0.1", "10.1.2.3")

    def test_what_an_authority_has_signed_outlasts_its_renewal(
        self, folder: Path, tmp_path: Path
    ) -> None:
        old = tmp_path / "old.pem"
        old.write_bytes(Certificates(folder).authority.read_bytes())
        assert main(["authority", str(folder), "--renew", "--days", "5000"]) == 0
        assert greet(folder, "localhost") == "welcome"
        assert greet(folder, "localhost", old) == "welcome"

    def test_a_certificate_that_would_outlive_its_authority_is_refused(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        certificates.make_authority(tmp_path, days=10)
        assert main(["server", str(tmp_path), "--days", "11"]) == 2
        assert "11 days from now the authority has expired" in capsys.readouterr().err
        assert not Certificates(tmp_path).server_key.exists()


class TestFiles:
    def test_nobody_else_can_read_them(self, folder: Path) -> None:
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
        assert len(modes) == 10  # with the folder and its sub-folder
        assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
        assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}

    @pytest.mark.parametrize(
        ("command", "lost"),
        [
            (["authority"], "every machine that trusts it"),
            (["server"], "until its restart"),
            (["node", "node-1"], "flwr supernode register"),
        ],
    )
    def test_nothing_is_overwritten_unless_asked_for_and_the_loss_is_named(
        self, folder: Path, capsys: pytest.CaptureFixture[str], command: list[str], lost: str
    ) -> None:
        kind, *rest = command
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert main([kind, str(folder), *rest]) == 2
        said = capsys.readouterr().err
        assert "is there already" in said
        assert lost in said
        assert {path: path.read_bytes() for path in before} == before
        assert main([kind, str(folder), *rest, "--force"]) == 0
        assert {path: path.read_bytes() for path in before} != before

    def test_all_makes_what_is_missing_only(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        capsys.readouterr()
        assert main(["all", str(folder), "--host", "fl.example.org", "--nodes", "3"]) == 0
        made = [Path(line).name for line in capsys.readouterr().out.splitlines()]
        assert made == ["node-2", "node-2.pub"]
        assert {path: path.read_bytes() for path in before} == before

    def test_all_says_how_a_host_is_added(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["all", str(folder), "--host", "10.0.0.9"]) == 2
        mend = capsys.readouterr().err.strip().rpartition("trellis certs ")[2]
        assert mend.endswith("--host fl.example.org --host 10.0.0.9")
        assert main(mend.split()) == 0
        assert main(["all", str(folder), "--host", "10.0.0.9"]) == 0

    def test_an_authority_whose_key_others_can_read_signs_nothing(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Certificates(folder).authority_key.chmod(0o644)
        assert main(["server", str(folder), "--renew"]) == 2
        assert "others can read" in capsys.readouterr().err

    def test_private_keys_are_never_printed(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        assert main(["show", *map(str, paths)]) == 0
        said = capsys.readouterr().out
        for path in paths:
            text = path.read_text()
            if "PRIVATE" in text:
                assert not [line for line in text.splitlines()[1:-1] if line in said]


class TestNodeKeys:
    def test_flower_takes_both_halves(self, folder: Path) -> None:
        flower = importlib.import_module("flwr.supernode.cli.flower_supernode")
        files = Certificates(folder)
        options = flower._parse_args_run_supernode().parse_args(
            ["--auth-supernode-private-key", str(files.node_key("node-0"))]
        )
        keys = flower._try_setup_client_authentication(options)
        assert keys is not None
        assert public_key_to_bytes(keys[1]) == try_load_public_key(files.node_public("node-0"))

    def test_the_fingerprint_is_the_one_of_ssh_keygen(self, folder: Path) -> None:
        files = Certificates(folder)
        both = {describe(files.node_key("node-0")), describe(files.node_public("node-0"))}
        assert {one.kind for one in both} == {"private key", "public key"}
        (fingerprint,) = {one.fingerprint for one in both}
        try:
            told = subprocess.run(
                ["ssh-keygen", "-lf", files.node_public("node-0")], capture_output=True, check=True
            )
        except FileNotFoundError:
            pytest.skip("this machine has no ssh-keygen")
        assert told.stdout.decode().split()[1:3] == [fingerprint, "node-0"]

    @pytest.mark.parametrize("name", ["", "../ca", "a/b", ".hidden", "a b", "x.pub", "n" * 65])
    def test_a_name_that_is_no_file_of_the_folder_is_refused(self, folder: Path, name: str) -> None:
        before = set(folder.rglob("*"))
        assert main(["node", str(folder), name]) == 2
        assert set(folder.rglob("*")) == before


class TestHosts:
    @pytest.mark.parametrize(
        "host",
        ["", "fl.example.org:9092", "10.0.0.256", "*.org", "-a.org", "a..b", "a_b", "x" * 64],
    )
    def test_what_is_no_host_is_refused_by_name(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], host: str
    ) -> None:
        certificates.make_authority(tmp_path)
        capsys.readouterr()
        assert main(["server", str(tmp_path), f"--host={host}"]) == 2
        assert repr(host) in capsys.readouterr().err

    @given(
        st.lists(
            st.ip_addresses() | st.from_regex(r"[a-z]{1,9}(\.[a-z]{2,5}){0,3}", fullmatch=True)
        )
    )
    def test_hosts_are_listed_once_and_the_local_ones_first(self, hosts: list[object]) -> None:
        written = [str(host) for host in hosts]
        found = signing.host_names([*written, *written])
        assert found[:2] == ["localhost", "127.0.0.1"]
        assert len(found) == len(set(found))
        assert set(found) == {"localhost", "127.0.0.1", *written}


class TestCommand:
    def test_help_comes_without_anything_heavy(self) -> None:
        script = "import sys; from fl_app.cli.certs import main; main(['--help']); sys.exit('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
        assert (done.returncode, b"examples:" in done.stdout) == (0, True)

    def test_a_slip_is_met_with_a_guess(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["sever", "x"])
        assert ended.value.code == 2
        assert "did you mean server?" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["authority", "{}", "--renew", "--force"], "one of them"),
            (["authority", "{}", "--days", "0"], "1 to 36500"),
            (["all", "{}", "--nodes", "-1"], "0 or more"),
            (["server", "{}"], "ca.key"),
            (["show", "{}/none"], "is not there"),
        ],
    )
    def test_what_cannot_be_done_says_why(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
    ) -> None:
        assert main([word.format(tmp_path) for word in words]) == 2
        assert said in capsys.readouterr().err

    @pytest.mark.parametrize("text", ["", "hello", "-----BEGIN CERTIFICATE-----\nx\n"])
    def test_a_file_that_is_neither_certificate_nor_key_is_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
    ) -> None:
        (tmp_path / "file").write_text(text)
        assert main(["show", str(tmp_path / "file")]) == 2
        assert f"{tmp_path}/file holds no certificate" in capsys.readouterr().err
