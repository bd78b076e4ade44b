"""The keys and certificates of a deployment: an authority, the SuperLink's certificate, a key pair for each SuperNode.

    <folder>/ca.pem  ca.key           the authority; ca.pem goes to every machine, ca.key to none
    <folder>/server.pem  server.key   what the SuperLink shows; its hosts are in the certificate (RFC 5280, RFC 6125)
    <folder>/nodes/NAME  NAME.pub     a SuperNode's own key, in OpenSSH's form, and what the SuperLink registers of it

Curves are NIST's P-384, which is what Flower signs a SuperNode's requests with. Files have mode 0600, folders that are
made here 0700. A key is replaced only when that is asked for, since what it unlocks is lost with it; a renewed
certificate is of the same key, so that renewing is the exchange of one file. Nothing here knows of Flower's programs.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

from fl_app.flower.signing import host_names, sign_authority, sign_server
from strategies import secret_file

AUTHORITY_DAYS, SERVER_DAYS = 3650, 365
_MOST_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Certificates:
    """Where a deployment's files are.

    Attributes:
        folder: that holds them.
    """

    folder: Path

    @property
    def authority(self) -> Path:
        """Certificate of the authority."""
        return self.folder / "ca.pem"

    @property
    def authority_key(self) -> Path:
        """Private key of the authority."""
        return self.folder / "ca.key"

    @property
    def server(self) -> Path:
        """Certificate of the SuperLink."""
        return self.folder / "server.pem"

    @property
    def server_key(self) -> Path:
        """Private key of the SuperLink."""
        return self.folder / "server.key"

    def node_key(self, name: str) -> Path:
        """Private key of a SuperNode."""
        return self.folder / "nodes" / name

    def node_public(self, name: str) -> Path:
        """Public key of a SuperNode."""
        return self.folder / "nodes" / f"{name}.pub"


def make_authority(folder: Path, *, days: int = AUTHORITY_DAYS, force: bool = False) -> None:
    """Make a new authority: a key and its own certificate.

    Args:
        folder: where ca.key and ca.pem go.
        days: how long it is valid.
        force: replace one that is there.

    Raises:
        ValueError: there is one already, or ``days`` is below 1.
        OSError: the folder can't be written.
    """
    files = Certificates(folder)
    lost = "every machine that trusts it refuses a server certificate of another"
    _absent((files.authority_key, files.authority), lost, force)
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = sign_authority(key, days)
    _folder(folder)
    _put(files.authority_key, _private(key))
    _put(files.authority, _pem(certificate))


def renew_authority(folder: Path, *, days: int = AUTHORITY_DAYS) -> None:
    """Give the authority's key a new certificate; what it has signed stays valid.

    Raises:
        ValueError: the key can't be read, or ``days`` is below 1.
        OSError: there is no authority.
    """
    files = Certificates(folder)
    _put(files.authority, _pem(sign_authority(_load_key(files.authority_key), days)))


def make_server(
    folder: Path, hosts: Sequence[str] = (), *, days: int = SERVER_DAYS, force: bool = False
) -> None:
    """Make the SuperLink's key, and have the authority sign its certificate.

    Args:
        folder: holds the authority; server.key and server.pem go there.
        hosts: names and addresses by which SuperNodes reach the SuperLink, beside those of this machine.
        days: how long the certificate is valid.
        force: replace one that is there.

    Raises:
        ValueError: a host is none; there is a certificate already; it would outlive the authority.
        OSError: there is no authority, or the folder can't be written.
    """
    files = Certificates(folder)
    lost = "a SuperLink that is running keeps it until its restart; nothing else depends on it"
    _absent((files.server_key, files.server), lost, force)
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = _sign_server(files, key.public_key(), hosts, days)
    _put(files.server_key, _private(key))
    _put(files.server, _pem(certificate))


def renew_server(
    folder: Path, hosts: Sequence[str] | None = None, *, days: int = SERVER_DAYS
) -> None:
    """Give the SuperLink's key a new certificate of the same authority.

    Args:
        folder: holds the authority and the server's key.
        hosts: as for :func:`make_server`; ``None`` for those of the present certificate.
        days: how long it is valid.

    Raises:
        ValueError: as for :func:`make_server`.
        OSError: there is no authority or no key.
    """
    files = Certificates(folder)
    key = _load_key(files.server_key)
    named = describe(files.server).hosts if hosts is None else hosts
    _put(files.server, _pem(_sign_server(files, key.public_key(), named, days)))


def make_node(folder: Path, name: str, *, force: bool = False) -> None:
    """Make a SuperNode's key pair.

    Args:
        folder: the pair goes to its sub-folder ``nodes``.
        name: of the node: letters, digits, dots, dashes, underscores.
        force: replace a pair that is there.

    Raises:
        ValueError: the name is none, or there is such a pair.
        OSError: the folder can't be written.
    """
    if not _NAME.fullmatch(name) or name.endswith(".pub"):
        raise ValueError(f"{name!r} is no name for a node: up to 64 of A-Z a-z 0-9 . _ -")
    files = Certificates(folder)
    lost = (
        "a SuperLink knows the node by it, and must be told of a new one (flwr supernode register)"
    )
    _absent((files.node_key(name), files.node_public(name)), lost, force)
    key = ec.generate_private_key(ec.SECP384R1())
    _folder(folder)
    _folder(folder / "nodes")
    _put(files.node_key(name), _private(key, serialization.PrivateFormat.OpenSSH))
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    _put(files.node_public(name), public + f" {name}\n".encode())


def make_missing(folder: Path, hosts: Sequence[str], nodes: Sequence[str]) -> list[Path]:
    """Make what a deployment lacks, and leave what is there.

    Args:
        folder: where all goes.
        hosts: as for :func:`make_server`.
        nodes: names of SuperNodes.

    Returns:
        The files that were made.

    Raises:
        ValueError: a host or a name is none; a server certificate is there that lacks one of the hosts.
        OSError: the folder can't be written.
    """
    files = Certificates(folder)
    before = set(folder.rglob("*"))
    if not files.authority.exists():
        make_authority(folder)
    if not files.server.exists():
        make_server(folder, hosts)
    elif lacking := set(host_names(hosts)) - set(present := describe(files.server).hosts):
        named = " ".join(f"--host {host}" for host in host_names([*present, *hosts])[2:])
        raise ValueError(
            f"{files.server} is not for {', '.join(sorted(lacking))}: "
            f"trellis certs server {folder} --renew {named}"
        )
    for name in nodes:
        if not files.node_key(name).exists():
            make_node(folder, name)
    return sorted(path for path in set(folder.rglob("*")) - before if path.is_file())


@dataclass(frozen=True)
class Description:
    """What a file holds; never a secret.

    Attributes:
        kind: ``authority``, ``server``, ``private key`` or ``public key``.
        fingerprint: of a certificate SHA-256 in hexadecimal; of a key as ``ssh-keygen -l`` shows its public half.
        hosts: names and addresses that a server certificate is for.
        begins, ends: of a certificate's validity.
        issuer: fingerprint-free name of who signed a certificate.
    """

    kind: str
    fingerprint: str
    hosts: tuple[str, ...] = ()
    begins: datetime | None = None
    ends: datetime | None = None
    issuer: str = ""


def describe(path: Path) -> Description:
    """Say what a certificate or key is.

    Raises:
        ValueError: the file holds neither.
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES)
    if b"CERTIFICATE-----" not in data:
        return _describe_key(path, data)
    try:
        certificate = x509.load_pem_x509_certificate(data)
        extensions = certificate.extensions
    except ValueError as error:
        raise ValueError(f"{path} holds no certificate that can be read: {error}") from None
    hosts: tuple[str, ...] = ()
    authority = False
    for extension in extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            hosts = tuple(str(name.value) for name in extension.value)
        if isinstance(extension.value, x509.BasicConstraints):
            authority = extension.value.ca
    return Description(
        kind="authority" if authority else "server",
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        hosts=hosts,
        begins=certificate.not_valid_before_utc,
        ends=certificate.not_valid_after_utc,
        issuer=certificate.issuer.rfc4514_string(),
    )


def _describe_key(path: Path, data: bytes) -> Description:
    public: PublicKeyTypes
    try:
        if b"PRIVATE KEY-----" in data:
            kind, public = "private key", _read_private(data).public_key()
        else:
            kind, public = "public key", serialization.load_ssh_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{path} holds no certificate or key that can be read: {error}") from None
    line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return Description(kind, "SHA256:" + base64.b64encode(digest).decode().rstrip("="))


def _read_private(data: bytes) -> PrivateKeyTypes:
    if b"OPENSSH" in data:
        return serialization.load_ssh_private_key(data, None)
    return serialization.load_pem_private_key(data, None)


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    data = secret_file.load(path, _MOST_BYTES)
    try:
        key = _read_private(data)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # The reader's own words may quote what it has read.
        raise ValueError(f"{path} holds no private key that can be read") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path} holds no key on an elliptic curve")
    return key


def _sign_server(
    files: Certificates, public: ec.EllipticCurvePublicKey, hosts: Sequence[str], days: int
) -> x509.Certificate:
    key = _load_key(files.authority_key)
    authority = x509.load_pem_x509_certificate(files.authority.read_bytes())
    if authority.public_key() != key.public_key():
        raise ValueError(
            f"{files.authority} is not of the key {files.authority_key}: "
            f"trellis certs authority {files.folder} --renew"
        )
    return sign_server(public, authority, key, hosts, days)


def _absent(paths: Sequence[Path], lost: str, force: bool) -> None:
    there = [path for path in paths if path.exists()]
    if there and not force:
        raise ValueError(
            f"{there[0]} is there already. With --force it is replaced, and lost: {lost}"
        )


def _folder(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def _private(
    key: ec.EllipticCurvePrivateKey,
    form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _put(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, over one that is there."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    secret_file.save(part, data)
    part.replace(path)
