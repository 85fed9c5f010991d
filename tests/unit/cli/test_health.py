"""`phalanx health`, with servers of this very process."""

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest

from phalanx.cli.commands import health
from phalanx.keys.caller import Service
from phalanx.rpc.credentials import ServerKeys
from phalanx.rpc.server import Server
from phalanx.testing.keys import KeyRing

SERVICE = "phalanx.v1.JobService"


class Running:
    """A server in an event loop of its own."""

    def __init__(self, keys: ServerKeys | None = None) -> None:
        self._keys = keys
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.server = self._run(self._start())

    async def _start(self) -> Server:
        server = Server(
            listen="127.0.0.1:0", metrics_listen=None, service_names=[SERVICE], keys=self._keys
        )
        await server.start()
        return server

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def set_serving(self, serving: bool, service: str = "") -> None:
        async def say() -> None:
            self.server.set_serving(serving, service)

        self._run(say())

    def close(self) -> None:
        self._run(self.server.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()


@pytest.fixture
def running() -> Iterator[Running]:
    made = Running()
    yield made
    made.close()


def test_a_process_is_well_once_it_serves(offline, running):
    address = running.server.address
    outcome = offline("--json", "health", address)
    assert outcome.code == 4
    assert outcome.error()["reason"] == "NOT_SERVING"
    assert offline("health", address, "--service", "liveness").code == 0
    running.set_serving(True)
    outcome = offline("--json", "health", address)
    assert outcome.code == 0
    assert outcome.json() == {"addresses": [address], "service": "", "serving": True}
    assert offline("health", address).out == f"{address}: serving\n"


def test_one_service_is_asked_by_its_name(offline, running):
    running.set_serving(True)
    running.set_serving(False, SERVICE)
    assert offline("health", running.server.address).code == 0
    assert offline("health", running.server.address, "--service", SERVICE).code == 4
    outcome = offline("health", running.server.address, "--service", "phalanx.v1.Nothing")
    assert outcome.code == 3
    assert "phalanx.v1.Nothing" in outcome.err


def test_without_an_address_whatever_listens_here_is_asked(offline, running, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        unused = closed.getsockname()[1]
    port = int(running.server.address.rpartition(":")[2])
    usual = {unused: Service.STORAGE, port: Service.CONTROL}
    monkeypatch.setattr(health, "USUAL_PORTS", usual)
    assert offline("health").code == 4
    running.set_serving(True)
    assert offline("health").out == f"127.0.0.1:{port}: serving\n"
    monkeypatch.setattr(health, "USUAL_PORTS", {unused: Service.STORAGE})
    outcome = offline("health")
    assert outcome.code == 4
    assert f"nothing listens on the ports {unused}" in outcome.err


def test_a_process_that_does_not_answer_is_not_well(offline):
    """One that is stopped still accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        outcome = offline("--timeout", "0.3", "health", address)
    assert outcome.code == 4
    assert f"{address} does not answer" in outcome.err


def test_an_address_that_is_none_is_said_to_be_none(offline):
    assert offline("health", "coordinator").code == 2


@pytest.fixture
def ring(tmp_path) -> KeyRing:
    return KeyRing(tmp_path / "keys")


@pytest.fixture
def encrypted(ring) -> Iterator[Running]:
    made = Running(ring.server("worker"))
    made.set_serving(True)
    yield made
    made.close()


def own_keys(ring, name, prefix="PHALANX"):
    return {
        f"{prefix}_TLS_CA": str(ring.ca),
        f"{prefix}_TLS_CERTIFICATE": str(ring.path / f"{name}.pem"),
        f"{prefix}_TLS_KEY": str(ring.path / f"{name}.key"),
    }


@pytest.mark.parametrize("prefix", ["PHALANX", "PHALANX_WORKER"])
def test_in_a_container_it_proves_itself_as_the_process_does(
    offline, ring, encrypted, monkeypatch, prefix
):
    """Certificates of workers name no host, and the port demands one of whoever calls."""
    port = int(encrypted.server.address.rpartition(":")[2])
    monkeypatch.setattr(health, "USUAL_PORTS", {port: Service.WORKER})
    assert offline("--timeout", "0.5", "health").code == 4
    for name, value in own_keys(ring, "worker", prefix).items():
        monkeypatch.setenv(name, value)
    outcome = offline("health")
    assert (outcome.code, outcome.out) == (0, f"127.0.0.1:{port}: serving\n")
    assert offline("health", "--service", "liveness").code == 0
    encrypted.set_serving(False)
    assert offline("health").code == 4
    assert offline("health", "--service", "liveness").code == 0


def test_people_say_which_kind_of_process_they_expect(offline, ring, encrypted):
    """A certificate and no token: health takes none."""
    people = ("--ca", str(ring.ca), "--cert", str(ring.path / "client.pem"))
    people += ("--key", str(ring.path / "client.key"), "--timeout", "0.5")
    ask = (*people, "health", encrypted.server.address)
    assert offline(*ask, "--kind", "worker").code == 0
    assert offline(*ask, "--kind", "storage").code == 4
    assert offline(*ask).code == 4, "the certificate names no host"
    outcome = offline(*ask, "--kind", "coordinator")
    assert outcome.code == 2
    assert "--kind 'coordinator': it is one of control, aggregator" in outcome.err


def test_keys_that_cannot_be_read_are_said_to_be(offline, ring, encrypted, monkeypatch):
    for name, value in own_keys(ring, "nobody").items():
        monkeypatch.setenv(name, value)
    outcome = offline("--json", "health", encrypted.server.address)
    assert outcome.code == 2
    assert outcome.error()["reason"] == "KEYS_UNUSABLE"
