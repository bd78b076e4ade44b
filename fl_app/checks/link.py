"""The way to a SuperLink: can it be reached, is it who it says it is, does it answer, and does its clock agree.

Flower's node authentication signs the node's own time. flwr 1.41 takes a signature whose age, by the server's clock, is
between -5 s and 305 s (`SYSTEM_TIME_TOLERANCE`, `TIMESTAMP_TOLERANCE` of `flwr.common.constant`): a node's clock may be
minutes slow, and only seconds fast. Its clock is held against the Date that the SuperLink's HTTP server sends (RFC
9110, section 6.6.1), which is of whole seconds and needs no NTP.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final

from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

from fl_app.checks.check import Finding
from fl_app.checks.credentials import validity

_PATIENCE: Final = 5.0
"""Seconds for each step of the way."""
_SLOW: Final = 60.0
_FAST: Final = SYSTEM_TIME_TOLERANCE / 2
"""Seconds behind and ahead of the server past which it warns."""
_RESOLUTION: Final = 1.0
"""Of a Date header: whole seconds, and a server may make it once a second."""
_MENDS: Final = {
    9: "set this machine's clock",
    10: "renew the server's certificate: trellis certs server --renew",
    18: "give the authority's certificate with --ca, and to the SuperNode as --root-certificates",
    19: "give the ca.pem of this very server with --ca",
    20: "give the ca.pem of this very server with --ca",
    62: "name the host as the certificate does, or make one for it: trellis certs server --host",
    64: "name the host as the certificate does, or make one for it: trellis certs server --host",
}
"""By OpenSSL's code of what was wrong with a certificate."""


class AddressError(ValueError):
    """Not HOST:PORT."""


@dataclass(frozen=True)
class Answer:
    """What the SuperLink said when it was asked for its health.

    Attributes:
        status: of HTTP.
        date: of its Date header; None where it sent none.
        sent: seconds since 1970 by this machine's clock, when it was asked.
        received: likewise, when it answered.
    """

    status: int
    date: datetime | None
    sent: float
    received: float


class Link:
    """One SuperLink, by its Fleet API's address.

    Args:
        address: `HOST:PORT`.
        ca: file of the authority that its certificate must be of; None for the system's authorities, or none at all
            where the server speaks plain HTTP.

    Raises:
        AddressError: the address is none.
    """

    def __init__(self, address: str, ca: Path | None) -> None:
        host, colon, port = address.rpartition(":")
        host = host.strip("[]")
        if not colon or not host or "/" in host or not port.isdecimal() or int(port) > 65535:
            raise AddressError(f"{address!r} is not HOST:PORT, as in fl.example.org:9092")
        self.host, self.port, self._ca = host, int(port), ca
        self._plain = False
        self.answer: Answer | None = None

    def tcp(self) -> Finding:
        """Whether anybody listens there."""
        began = time.perf_counter()
        where = f"{self.host}:{self.port}"
        try:
            with socket.create_connection((self.host, self.port), timeout=_PATIENCE) as reached:
                peer = reached.getpeername()[0]
        except socket.gaierror as error:
            said = f"{self.host} has no address: {error.strerror}"
            return Finding("failed", said, "mend the name, or this machine's DNS")
        except TimeoutError:
            said = f"{where} does not answer within {_PATIENCE:g} s"
            return Finding(
                "failed", said, "look at the firewalls on the way, and whether the host is up"
            )
        except OSError as error:
            said = f"{where}: {error.strerror}"
            return Finding("failed", said, "start the SuperLink, or mend host and port")
        took = (time.perf_counter() - began) * 1000
        return Finding("ok", f"{where} ({peer}) is reached in {took:.3g} ms")

    def tls(self) -> Finding:
        """Whether the server proves to be who it should, and for how long."""
        if self._ca is None and self._speaks_plain():
            self._plain = True
            mend = "give both ends TLS (trellis certs), or keep to a network that nobody else is in"
            return Finding(
                "warning", "plain HTTP: whoever is on the way reads and changes it", mend
            )
        context = self._context()
        try:
            with (
                socket.create_connection((self.host, self.port), timeout=_PATIENCE) as raw,
                context.wrap_socket(raw, server_hostname=self.host) as secured,
            ):
                certificate, protocol = secured.getpeercert() or {}, secured.version()
        except ssl.SSLCertVerificationError as error:
            said = f"the server's certificate does not hold: {error.verify_message}"
            return Finding(
                "failed", said, _MENDS.get(error.verify_code, "look at --ca and the host")
            )
        except ssl.SSLError as error:
            said = f"no TLS there: {error.reason or error}"
            return Finding(
                "failed", said, "start the SuperLink with --ssl-certfile, or leave --ca out"
            )
        except OSError as error:
            return Finding("failed", f"TLS: {error}", "look whether the SuperLink is overloaded")
        begins, ends = (_moment(certificate, key) for key in ("notBefore", "notAfter"))
        mend = "renew the server's certificate: trellis certs server --renew"
        found = validity("the server's certificate", begins, ends, datetime.now(UTC), mend)
        return Finding(found.state, f"{protocol}, {found.said}", found.mend)

    def health(self) -> Finding:
        """Whether Flower answers there."""
        try:
            self.answer = self._ask()
        except (OSError, http.client.HTTPException) as error:
            said = f"/health: {type(error).__name__}: {error}"
            return Finding("failed", said, "look whether a SuperLink of Flower 1.41 listens there")
        if self.answer.status != 200:
            said = f"/health answers {self.answer.status}"
            return Finding(
                "failed", said, "look whether a SuperLink, not something else, listens there"
            )
        took = (self.answer.received - self.answer.sent) * 1000
        return Finding("ok", f"/health answers 200 in {took:.3g} ms")

    def clock(self) -> Finding:
        """How far this machine's clock is from the server's."""
        if self.answer is None or self.answer.date is None:
            return Finding("skipped", "the server sends no Date to hold the clock against")
        return skew(self.answer)

    def _speaks_plain(self) -> bool:
        self._plain = True
        try:
            return self._ask().status > 0
        except (OSError, http.client.HTTPException):
            return False
        finally:
            self._plain = False

    def _ask(self) -> Answer:
        connection = (
            http.client.HTTPConnection(self.host, self.port, timeout=_PATIENCE)
            if self._plain
            else http.client.HTTPSConnection(
                self.host, self.port, timeout=_PATIENCE, context=self._context()
            )
        )
        try:
            connection.connect()  # first: the clock is read beside the question, not the handshake
            sent = time.time()
            connection.request("GET", "/health")
            response = connection.getresponse()
            received = time.time()
            response.read(1 << 16)
        finally:
            connection.close()
        return Answer(response.status, _date(response.getheader("Date")), sent, received)

    def _context(self) -> ssl.SSLContext:
        # Flower's client likewise trusts this file alone, where there is one.
        return ssl.create_default_context(
            cafile=None if self._ca is None else str(self._ca.expanduser())
        )


def skew(answer: Answer) -> Finding:
    """This machine's clock against the Date of an answer, and what Flower makes of the difference."""
    assert answer.date is not None
    server = answer.date.timestamp() + _RESOLUTION / 2
    ahead = (answer.sent + answer.received) / 2 - server
    unsure = _RESOLUTION + (answer.received - answer.sent) / 2
    way = "ahead of" if ahead > 0 else "behind"
    said = (
        f"{abs(ahead):.0f} s {way} the SuperLink, give or take {unsure:.1f} s, by its Date header;"
        f" node authentication bears {SYSTEM_TIME_TOLERANCE} s ahead and"
        f" {TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE} s behind"
    )
    mend = "set the clock: timedatectl set-ntp true, or chronyc makestep"
    if ahead - unsure >= SYSTEM_TIME_TOLERANCE or (
        -ahead - unsure >= TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
    ):
        return Finding("failed", said, mend)
    if ahead - unsure > _FAST or -ahead > _SLOW:
        return Finding("warning", said, mend)
    return Finding("ok", said)


def _date(text: str | None) -> datetime | None:
    try:
        found = None if text is None else parsedate_to_datetime(text)
    except ValueError:
        return None
    return None if found is None or found.tzinfo is None else found


def _moment(certificate: object, key: str) -> datetime:
    text = certificate.get(key) if isinstance(certificate, dict) else None
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(text)), UTC)
