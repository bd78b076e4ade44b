"""The proxy that fails for the other tests fails as it says."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.proxy import Proxy

pytestmark = pytest.mark.chaos


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """A server that sends back what it is sent."""

    def answer(end: socket.socket) -> None:
        with end:
            try:
                while data := end.recv(1 << 16):
                    end.sendall(data)
            except OSError:
                return

    def serve() -> None:
        while True:
            try:
                end, _ = door.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(end,), daemon=True).start()

    door = socket.create_server(("127.0.0.1", 0))
    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    yield door.getsockname()
    door.shutdown(socket.SHUT_RDWR)
    door.close()
    serving.join()


@pytest.fixture
def proxy(echo: tuple[str, int]) -> Iterator[Proxy]:
    with Proxy(echo) as proxy:
        yield proxy


def connected(proxy: Proxy) -> socket.socket:
    host, port = proxy.address.split(":")
    end = socket.create_connection((host, int(port)), timeout=5)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return end


def received(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = end.recv(size - len(data))
        assert more, f"the connection ended after {data!r}"
        data += more
    return data


def silent(end: socket.socket, seconds: float = 0.3) -> bool:
    end.settimeout(seconds)
    try:
        return end.recv(1) is None
    except TimeoutError:
        return True
    finally:
        end.settimeout(5)


def test_bytes_go_through_both_ways_and_are_counted(proxy):
    sent = bytes(range(256)) * 4096
    with connected(proxy) as end:
        threading.Thread(target=end.sendall, args=(sent,)).start()
        assert received(end, len(sent)) == sent
    assert proxy.passed == {"up": len(sent), "down": len(sent)}


def test_what_is_held_comes_later_and_whole(proxy):
    with connected(proxy) as end:
        end.sendall(b"before")
        assert received(end, 6) == b"before"
        proxy.set("hold")
        end.sendall(b"during")
        assert silent(end)
        with connected(proxy) as other:
            other.sendall(b"new")
            assert silent(other)
            proxy.set("forward")
            assert received(end, 6) == b"during"
            assert received(other, 3) == b"new"


def test_what_is_dropped_never_comes_and_its_connection_ends_when_the_network_is_back(proxy):
    with connected(proxy) as end, connected(proxy) as idle:
        for one in (end, idle):
            one.sendall(b"before")
            assert received(one, 6) == b"before"
        proxy.set("drop")
        end.sendall(b"during")
        assert silent(end)
        proxy.set("forward")
        with pytest.raises(ConnectionResetError):
            end.recv(1)
        idle.sendall(b"after")  # lost nothing, and goes on as TCP would
        assert received(idle, 5) == b"after"


def test_connections_are_reset_and_refused(proxy):
    with connected(proxy) as end:
        end.sendall(b"before")
        assert received(end, 6) == b"before"
        proxy.set("reset")
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    with pytest.raises(ConnectionResetError), connected(proxy) as end:
        end.recv(1)
    proxy.set("forward")
    with connected(proxy) as end:
        end.sendall(b"again")
        assert received(end, 5) == b"again"


def test_a_slow_network_takes_its_time(echo):
    with Proxy(echo, rate=2000) as proxy, connected(proxy) as end:
        proxy.set("slow")
        began = time.monotonic()
        end.sendall(b"x" * 600)
        assert received(end, 600) == b"x" * 600
        assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_pattern_sets_a_failure_off_wherever_it_is_cut(proxy, cut):
    caught = proxy.catch(rb"U.LOAD", "up", lambda: proxy.set("hold"))
    with connected(proxy) as end:
        for part in (b"some UPLOAX, then ", b"UPLOAD"[:cut]):
            end.sendall(part)
            received(end, len(part))
        assert not caught.is_set()
        end.sendall(b"UPLOAD"[cut:])
        assert caught.wait(5)
        assert proxy.mode == "hold"
        assert silent(end)
        proxy.set("forward")
        assert received(end, 6 - cut) == b"UPLOAD"[cut:]
