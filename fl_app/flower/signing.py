"""What an authority signs: its own certificate and a server's (RFC 5280), for the names that it has (RFC 6125).

Each certificate names the key that signed it and what its own key may be used for, so that the strictest readers take
it. Nothing here knows of files.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LOCAL_HOSTS = ("localhost", "127.0.0.1")
"""In every server certificate: the SuperLink's own programs reach it there."""

_BACK = timedelta(hours=1)  # a machine whose clock is slow takes a new certificate all the same
_HOST = re.compile(
    r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*"
)


def sign_authority(key: ec.EllipticCurvePrivateKey, days: int) -> x509.Certificate:
    """A certificate of an authority's own key, that it may sign servers' with.

    Raises:
        ValueError: it would be valid for less than a day, or for more than a century.
    """
    # Named by its key: two authorities of one name would be taken for each other where certificates are looked up.
    mark = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest.hex()[:16]
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Trellis authority {mark}")])
    builder = _builder(name, name, key.public_key(), key.public_key(), _end(days))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return builder.add_extension(_usage(authority=True), critical=True).sign(key, hashes.SHA384())


def sign_server(
    public: ec.EllipticCurvePublicKey,
    authority: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
    days: int,
) -> x509.Certificate:
    """A server's certificate.

    Args:
        public: the server's key.
        authority: who signs.
        key: the authority's.
        hosts: names and addresses of the server, beside :data:`LOCAL_HOSTS`.
        days: how long it is valid.

    Raises:
        ValueError: a host is neither a name nor an address, or it would outlive the authority.
    """
    end = _end(days)
    if end > authority.not_valid_after_utc:
        raise ValueError(
            f"{days} days from now the authority has expired ({authority.not_valid_after_utc:%Y-%m-%d}): "
            "ask for fewer days, or renew the authority first"
        )
    named = host_names(hosts)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Trellis SuperLink")])
    builder = _builder(subject, authority.subject, public, key.public_key(), end)
    builder = builder.add_extension(
        x509.BasicConstraints(ca=False, path_length=None), critical=True
    )
    builder = builder.add_extension(_usage(authority=False), critical=True)
    purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    builder = builder.add_extension(purpose, critical=False)
    alternatives = x509.SubjectAlternativeName([_alternative(host) for host in named])
    return builder.add_extension(alternatives, critical=False).sign(key, hashes.SHA384())


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    end: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - _BACK)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _end(days: int) -> datetime:
    if not 1 <= days <= 36500:
        raise ValueError(f"{days} days: a certificate is valid for 1 to 36500")
    return datetime.now(UTC) + timedelta(days=days)


def host_names(hosts: Sequence[str]) -> list[str]:
    """Those and :data:`LOCAL_HOSTS`, each once, as a certificate writes them.

    Raises:
        ValueError: one is neither a name nor an address.
    """
    found = list(LOCAL_HOSTS)
    for host in hosts:
        written = str(_alternative(host).value)
        if written not in found:
            found.append(written)
    return found


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        name = host.lower()
    # 10.0.0.256 or a port behind a name would make a certificate that fits nothing.
    if not _HOST.fullmatch(name) or name.rpartition(".")[2].isdecimal():
        raise ValueError(f"{host!r} is neither a host's name nor an address, without a port")
    return x509.DNSName(name)
