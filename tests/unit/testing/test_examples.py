"""The examples of docs/TESTING.md do what it says."""

from __future__ import annotations

import ast
import asyncio
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phalanx.testing.simulation import Network, World
from phalanx.testing.storage_process import StorageProcess

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "TESTING.md"
GUARD_S = 30.0


def example(word: str) -> str:
    """The one example in which a word occurs."""
    found = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    [block] = [each for each in found if word in each]
    return block


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(compile(code, str(DOCUMENT), "exec"), names)
    return names


async def forever() -> None:
    await asyncio.Event().wait()


def test_a_program_in_a_simulation() -> None:
    names = run(example("trace_hash"), serve=forever, ask=forever)
    assert not names["server"].alive
    assert names["client"].alive
    names["world"].close()


def test_faults_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    world = World(seed=7)
    network = Network(world)
    for name in ("server", "client"):
        world.start(name, forever)
    names = run(example("Schedule"), world=world, network=network)
    world.close()
    assert names["schedule"].fired["cut"] > 3
    assert not network.is_blocked("client", "server")
    assert not network.is_blocked("server", "client")
    assert "'cut'" in capsys.readouterr().out


def test_a_disk_that_fails(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = tmp_path / "folder"
    folder.mkdir()
    names = run(example("FaultyDisk"), folder=folder, elsewhere=elsewhere)
    assert names["disk"].fired


@contextmanager
def echo() -> Iterator[str]:
    """A server that answers one connection with what it says."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(connection.recv(100))

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join(GUARD_S)


def test_a_bad_network() -> None:
    def start_worker(flag: str, address: str) -> None:
        assert flag == "--control"
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=GUARD_S) as client:
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"

    with echo() as address:
        code = example("TcpProxy").replace("127.0.0.1:7410", address)
        assert address in code
        run(code, start_worker=start_worker)


def test_a_hostile_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that does not stand raises; how much has come of it so far depends on the time it had."""
    with StorageProcess(tmp_path / "state") as storage:
        run(example("Attack"), storage=SimpleNamespace(address=storage.address))
    assert isinstance(ast.literal_eval(capsys.readouterr().out), dict)
