"""The proxy between real sockets: what it does to bytes, and that it loses none."""

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import fields

import pytest

from phalanx.testing.tcp_proxy import Direction, Link, TcpProxy

GUARD_S = 20.0
DATA = bytes(range(256)) * 1024


class EchoServer:
    """Sends back what it is sent, then its end."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._echo, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    @staticmethod
    def _echo(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    connection.sendall(data)
            except OSError:
                return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in (self._accepting, *self._threads):
            thread.join(GUARD_S)


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    server = EchoServer()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: EchoServer) -> Iterator[TcpProxy]:
    with TcpProxy(echo.address) as proxy:
        yield proxy


def dial(proxy: TcpProxy) -> socket.socket:
    host, port = proxy.address.split(":")
    return socket.create_connection((host, int(port)), timeout=GUARD_S)


def receive(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count and (data := connection.recv(min(count, 65536))):
        parts.append(data)
        count -= len(data)
    return b"".join(parts)


def exchange(connection: socket.socket, data: bytes) -> bytes:
    sender = threading.Thread(target=connection.sendall, args=(data,))
    sender.start()
    received = receive(connection, len(data))
    sender.join(GUARD_S)
    return received


@pytest.mark.parametrize(
    "link",
    [
        Link(),
        Link(latency_s=0.02, jitter_s=0.03),
        Link(bytes_per_s=4_000_000),
        Link(slice_bytes=1000),
        Link(latency_s=0.01, bytes_per_s=8_000_000, slice_bytes=7777, slice_pause_s=0.0001),
    ],
)
def test_whatever_a_link_does_every_byte_arrives_once_and_in_order(
    proxy: TcpProxy, link: Link
) -> None:
    proxy.disturb(both=link)
    with dial(proxy) as connection:
        assert exchange(connection, DATA) == DATA
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert proxy.passed_bytes(Direction.TO_SERVER) == len(DATA)
    assert proxy.passed_bytes(Direction.TO_CLIENT) == len(DATA)
    assert proxy.resets == 0


def test_one_of_two_clients_is_cut_off_until_it_heals(proxy: TcpProxy) -> None:
    with dial(proxy) as cut, dial(proxy) as other:
        for connection in (cut, other):
            assert exchange(connection, b"before") == b"before"
        own = cut.getsockname()[1]
        proxy.disturb(both=Link(black_hole=True), client_ports=[own])
        cut.sendall(b"meanwhile")
        assert exchange(other, DATA) == DATA
        cut.setblocking(False)
        with pytest.raises(BlockingIOError):
            cut.recv(1)
        cut.settimeout(GUARD_S)
        with dial(proxy) as later:
            assert exchange(later, b"later") == b"later"
        proxy.heal()
        assert receive(cut, len(b"meanwhile")) == b"meanwhile"


def test_latency_and_bandwidth_take_at_least_the_time_that_they_say(proxy: TcpProxy) -> None:
    # Lower bounds hold on any machine, however busy.
    loop_time = time.monotonic
    with dial(proxy) as connection:
        proxy.disturb(to_client=Link(latency_s=0.1))
        began_s = loop_time()
        exchange(connection, b"x")
        assert loop_time() - began_s >= 0.1
        proxy.disturb(to_server=Link(bytes_per_s=100_000), to_client=Link())
        began_s = loop_time()
        exchange(connection, bytes(20_000))
        assert loop_time() - began_s >= 0.2


@pytest.mark.parametrize("direction", list(Direction))
def test_a_black_hole_holds_one_direction_and_heals_without_loss(
    proxy: TcpProxy, direction: Direction
) -> None:
    with dial(proxy) as connection:
        assert exchange(connection, b"before") == b"before"
        hole = Link(black_hole=True)
        if direction is Direction.TO_SERVER:
            proxy.disturb(to_server=hole)
        else:
            proxy.disturb(to_client=hole)
        connection.sendall(b"during")
        other = {Direction.TO_SERVER: 6, Direction.TO_CLIENT: 12}[direction]
        with pytest.raises(TimeoutError):
            connection.settimeout(0.1)
            connection.recv(1)
        connection.settimeout(GUARD_S)
        assert proxy.passed_bytes(Direction.TO_SERVER) == other
        assert proxy.passed_bytes(Direction.TO_CLIENT) == 6
        proxy.heal()
        assert receive(connection, 6) == b"during"
    assert proxy.resets == 0


def test_reset_breaks_what_is_open_and_new_connections_work(proxy: TcpProxy) -> None:
    with dial(proxy) as first, dial(proxy) as second:
        for connection in (first, second):
            assert exchange(connection, b"x") == b"x"
        assert proxy.connections == 2
        assert proxy.reset() == 2
        for connection in (first, second):
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
    with dial(proxy) as third:
        assert exchange(third, b"y") == b"y"
    assert proxy.resets == 2


def test_a_connection_is_reset_in_the_middle_of_its_bytes(proxy: TcpProxy) -> None:
    proxy.disturb(to_client=Link(reset_after_bytes=1000))
    with dial(proxy) as connection:
        connection.sendall(bytes(5000))
        received = 0
        with pytest.raises(ConnectionResetError):
            while data := connection.recv(65536):
                received += len(data)
        assert received <= 1000
    assert proxy.passed_bytes(Direction.TO_CLIENT) == 1000
    assert proxy.resets == 1


def test_refused_connections_are_reset_until_healed(proxy: TcpProxy) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionResetError), dial(proxy) as connection:
        connection.recv(1)
    proxy.heal()
    with dial(proxy) as connection:
        assert exchange(connection, b"x") == b"x"
    assert (proxy.accepted, proxy.resets) == (2, 1)


def test_a_target_that_is_not_there_resets_and_another_can_be_set(
    proxy: TcpProxy, echo: EchoServer
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        host, port = unused.getsockname()
    proxy.target = f"{host}:{port}"
    with pytest.raises(ConnectionResetError), dial(proxy) as connection:
        connection.recv(1)
    proxy.target = echo.address
    with dial(proxy) as connection:
        assert exchange(connection, b"x") == b"x"


def test_closing_leaves_no_thread_and_no_port(echo: EchoServer) -> None:
    before = threading.active_count()
    with TcpProxy(echo.address) as proxy:
        connection = dial(proxy)
        assert exchange(connection, b"x") == b"x"
    with connection, pytest.raises(ConnectionResetError):
        connection.recv(1)
    host, port = proxy.address.split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=GUARD_S)
    proxy.close()
    # The echo server's thread for this connection may still be ending.
    assert not any(thread.name == "tcp-proxy" for thread in threading.enumerate()), before


def test_a_proxy_that_cannot_listen_says_why(echo: EchoServer) -> None:
    with (
        pytest.raises(Exception, match="did not start") as caught,
        TcpProxy(echo.address, listen=echo.address),
    ):
        pass
    assert isinstance(caught.value.__cause__, OSError)


def test_every_disturbance_is_off_by_default() -> None:
    assert not any(getattr(Link(), field.name) for field in fields(Link))
