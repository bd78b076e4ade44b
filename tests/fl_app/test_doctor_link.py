"""The way to a SuperLink, and credentials: servers of this machine, each with one fault."""

import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

from fl_app.checks import credentials
from fl_app.checks.link import AddressError, Answer, Link, skew
from fl_app.cli.main import main

NOW = datetime.now(UTC)


# ---- the link: a server on this machine, its certificate, its clock ----


class Authority:
    """An authority, and the certificates that it signs, in a folder."""

    def __init__(self, folder: Path, name: str = "authority", *, ends: timedelta = timedelta(365)):
        self.folder, self._name = folder, name
        self._key = ec.generate_private_key(ec.SECP384R1())
        self.file = folder / f"{name}.pem"
        made = self._certificate(self._key, name, NOW - timedelta(400), NOW + ends, ca=True)
        self.file.write_bytes(made.public_bytes(serialization.Encoding.PEM))

    def server(self, host: str = "127.0.0.1", *, ends: timedelta = timedelta(300)) -> Path:
        """A file with a server's key and certificate."""
        key = ec.generate_private_key(ec.SECP384R1())
        made = self._certificate(key, host, NOW - timedelta(399), NOW + ends, host=host)
        file = self.folder / f"{self._name}-{host}-{ends.days}.pem"
        file.write_bytes(pem(key) + made.public_bytes(serialization.Encoding.PEM))
        return file

    def _certificate(self, key, name, begins, ends, *, ca=False, host=None) -> x509.Certificate:
        def called(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

        builder = (
            x509.CertificateBuilder()
            .subject_name(called(name))
            .issuer_name(called(self._name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(ends)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if host is not None:
            try:
                known = x509.IPAddress(ip_address(host))
            except ValueError:
                known = x509.DNSName(host)
            builder = builder.add_extension(x509.SubjectAlternativeName([known]), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def pem(key, form=serialization.PrivateFormat.PKCS8) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


@contextmanager
def serving(*, certificate: Path | None = None, ahead: timedelta = timedelta(), status: int = 200):
    """The address of a server that says that it is well, by a clock that is `ahead` of this machine's."""

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() + ahead.total_seconds())

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(
            self, *_: object
        ) -> None:  # whoever speaks another protocol is turned away
            pass

    with Server(("127.0.0.1", 0), Health) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_a_closed_port_and_a_name_without_address_are_told_apart():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = Link(f"127.0.0.1:{free.getsockname()[1]}", None).tcp()
    assert closed.state == "failed"
    assert "refused" in closed.said
    nowhere = Link("nobody.invalid:8000", None).tcp()
    assert nowhere.state == "failed"
    assert "DNS" in nowhere.mend


@pytest.mark.parametrize("address", ["fl.example.org", "http://here:80", "here:seventy", ":80"])
def test_what_is_no_address_is_a_wrong_command(address, capsys):
    with pytest.raises(AddressError):
        Link(address, None)
    assert main(["doctor", "--superlink", address, "task=digits"]) == 2
    assert "HOST:PORT" in capsys.readouterr().err


def test_a_server_without_tls_answers_and_warns():
    with serving() as address:
        link = Link(address, None)
        found = [link.tcp(), link.tls(), link.health(), link.clock()]
    assert [one.state for one in found] == ["ok", "warning", "ok", "ok"]
    assert "plain HTTP" in found[1].said


def test_a_server_with_the_right_certificate_is_known(tmp_path):
    authority = Authority(tmp_path)
    with serving(certificate=authority.server()) as address:
        link = Link(address, authority.file)
        found = [link.tcp(), link.tls(), link.health(), link.clock()]
    assert [one.state for one in found] == ["ok"] * 4
    assert "TLSv1.3" in found[1].said


def test_certificates_that_do_not_hold_are_refused_with_the_reason(tmp_path):
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    wrong = {
        "expired": (authority.server(ends=timedelta(days=-1)), authority.file),
        "mismatch": (authority.server("10.1.2.3"), authority.file),
        "unable to get local issuer": (other.server(), authority.file),
    }
    for said, (certificate, trusted) in wrong.items():
        with serving(certificate=certificate) as address:
            found = Link(address, trusted).tls()
        assert found.state == "failed", said
        assert said in found.said
        assert found.mend
    with serving(certificate=authority.server(ends=timedelta(days=9))) as address:
        soon = Link(address, authority.file).tls()
    assert soon.state == "warning"
    assert "8 days" in soon.said
    with serving() as address:
        assert Link(address, authority.file).tls().state == "failed"


def test_what_is_no_superlink_is_told():
    with serving(status=500) as address:
        link = Link(address, None)
        link.tls()
        assert link.health().state == "failed"
        assert "500" in link.health().said


@pytest.mark.parametrize(
    ("ahead", "state"),
    [
        (timedelta(0), "ok"),
        (timedelta(hours=8), "failed"),
        (timedelta(hours=-8), "failed"),
        (timedelta(seconds=100), "warning"),
        (timedelta(seconds=-20), "failed"),
    ],
)
def test_a_clock_is_held_against_the_servers(ahead, state):
    """A server's clock that is ahead makes this one's late, which Flower bears for 305 s; early it bears for 5."""
    with serving(ahead=ahead) as address:
        link = Link(address, None)
        link.tls()
        link.health()
        found = link.clock()
    assert found.state == state, found
    assert "Date header" in found.said


@pytest.mark.parametrize("way", [1, -1])
def test_the_window_of_a_clock_is_flowers_own(way):
    """Sure of no more than a second and a half: past that, outside of Flower's window is a no-go and inside is none."""
    limit = SYSTEM_TIME_TOLERANCE if way > 0 else TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
    assert limit == (5 if way > 0 else 305)
    moment = datetime(2026, 1, 1, tzinfo=UTC)

    def found(ahead: float) -> str:
        own = moment.timestamp() + 0.5 + ahead
        return skew(Answer(200, moment, own, own)).state

    assert found(way * (limit + 1.6)) == "failed"
    assert found(way * (limit - 0.1)) == "warning"
    assert found(way * min(2.0, limit)) == "ok"


# ---- credentials ----


def test_an_authority_is_read_and_its_end_foreseen(tmp_path):
    assert credentials.authority(Authority(tmp_path).file).state == "ok"
    expired = credentials.authority(Authority(tmp_path, "old", ends=timedelta(days=-1)).file)
    assert expired.state == "failed"
    assert "expired" in expired.said
    soon = credentials.authority(Authority(tmp_path, "soon", ends=timedelta(days=20)).file)
    assert soon.state == "warning"
    leaf = credentials.authority(Authority(tmp_path).server())
    assert leaf.state == "failed"
    assert "may not sign" in leaf.said
    (tmp_path / "text.pem").write_text("nothing")
    assert credentials.authority(tmp_path / "text.pem").state == "failed"
    assert credentials.authority(tmp_path / "absent.pem").state == "failed"


def test_only_a_key_that_flower_takes_and_nobody_else_reads_is_good(tmp_path):
    form = serialization.PrivateFormat.OpenSSH
    curve = ec.generate_private_key(ec.SECP384R1())
    wrong = {
        "others may read it": (pem(curve, form), 0o644),
        "OpenSSH's form": (pem(curve), 0o600),
        "elliptic curves": (pem(ed25519.Ed25519PrivateKey.generate(), form), 0o600),
        "type RSA": (pem(rsa.generate_private_key(65537, 2048), form), 0o600),
    }
    file = tmp_path / "key"
    for said, (content, mode) in wrong.items():
        file.write_bytes(content)
        file.chmod(mode)
        found = credentials.node_key(file)
        assert found.state == "failed", said
        assert said in found.said
        assert found.mend
    file.write_bytes(pem(curve, form))
    file.chmod(0o600)
    good = credentials.node_key(file)
    assert good.state == "ok"
    assert "secp384r1" in good.said
    assert credentials.node_key(tmp_path / "absent").state == "failed"


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")
def test_a_key_with_a_passphrase_is_refused(tmp_path):
    file = tmp_path / "key"
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "a secret", "-f", str(file)]
    subprocess.run(command, check=True, timeout=60)
    found = credentials.node_key(file)
    assert found.state == "failed"
    assert "passphrase" in found.said
