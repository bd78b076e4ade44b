"""The certificate authority that a node trusts, and the key by which a SuperLink knows it.

Flower reads the key with `cryptography`'s OpenSSH loader, without a passphrase, and takes any elliptic-curve key;
those of `trellis certs node`, and Flower's own, are on NIST P-384. Of a private key no more is said than its public
half.
"""

from __future__ import annotations

import base64
import hashlib
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
)

from fl_app.checks.check import Finding, together

SOON: Final = 30
"""Days before the end of a certificate at which it warns."""
_CURVES: Final = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


def authority(path: Path, now: datetime | None = None) -> Finding:
    """Whether the file of `--root-certificates` holds an authority that is valid, and for how long.

    Args:
        path: PEM, one certificate or several.
        now: the present time by default.
    """
    try:
        found = x509.load_pem_x509_certificates(path.expanduser().read_bytes())
    except OSError as error:
        return Finding(
            "failed", f"{path}: {error.strerror}", "name the ca.pem that the server's operator gave"
        )
    except ValueError:
        return Finding(
            "failed", f"{path} holds no certificate in PEM", "copy the server's ca.pem anew"
        )
    return together([_authority(one, now or datetime.now(UTC)) for one in found])


def _authority(certificate: x509.Certificate, now: datetime) -> Finding:
    name = certificate.subject.rfc4514_string() or "a certificate without a name"
    try:
        signs = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        signs = certificate.issuer == certificate.subject
    if not signs:
        mend = "name the authority's ca.pem, not the server's own certificate"
        return Finding("failed", f"{name} may not sign others", mend)
    return validity(
        name,
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        now,
        "trellis certs authority DIR --renew on the server, and copy ca.pem here",
    )


def validity(name: str, begins: datetime, ends: datetime, now: datetime, mend: str) -> Finding:
    """Whether a certificate holds at this moment, and for how long.

    Args:
        name: whose it is.
        begins: from when it holds.
        ends: until when.
        now: the moment.
        mend: how it is renewed.
    """
    if now < begins:
        said = (
            f"{name} is valid from {begins:%Y-%m-%d %H:%M} UTC on, and it is {now:%Y-%m-%d %H:%M}"
        )
        return Finding("failed", said, "set this machine's clock, or wait")
    if now >= ends:
        return Finding("failed", f"{name} expired on {ends:%Y-%m-%d %H:%M} UTC", mend)
    days = (ends - now).days
    said = f"{name} is valid until {ends:%Y-%m-%d}, {days} days"
    return Finding("warning", said, mend) if days < SOON else Finding("ok", said)


def node_key(path: Path) -> Finding:
    """Whether the file of `--auth-supernode-private-key` is one that Flower takes and nobody else can read."""
    path = path.expanduser()
    again = "make one with `trellis certs node`, and register its public half with the server"
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        data = path.read_bytes()
    except OSError as error:
        return Finding("failed", f"{path}: {error.strerror}", again)
    try:
        key = load_ssh_private_key(data, None)
    except TypeError:
        said = f"{path} needs a passphrase, which Flower can't give"
        return Finding("failed", said, f"ssh-keygen -p -N '' -f {path}")
    except (ValueError, UnsupportedAlgorithm):
        return Finding("failed", f"{path} holds no private key in OpenSSH's form", again)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        kind = type(key).__name__.strip("_").removesuffix("PrivateKey")
        said = f"{path} holds a key of type {kind}, and Flower takes elliptic curves"
        return Finding("failed", said, again)
    if not isinstance(key.curve, _CURVES):
        return Finding("failed", f"{path} is on {key.curve.name}, not on a NIST curve", again)
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1]
    digest = hashlib.sha256(base64.b64decode(public)).digest()
    said = f"{key.curve.name}, SHA256:{base64.b64encode(digest).decode().rstrip('=')}"
    if mode & 0o077:
        return Finding(
            "failed", f"{path} has mode {mode:04o}: others may read it", f"chmod 600 {path}"
        )
    return Finding("ok", said)
