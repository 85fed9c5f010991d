"""The whole service inside the test's event loop, over real gRPC on port 0."""

import asyncio
import socket

import pytest

from phalanx.clients.storage import StorageClient
from phalanx.config import build
from storage.config import StorageConfig
from storage.runtime import StorageProcess


@pytest.fixture
async def service(tmp_path):
    flags = {"state": str(tmp_path / "state"), "listen": "127.0.0.1:0", "gc_interval_s": "0"}
    service = StorageProcess(build(StorageConfig, flags, {}))
    await service.start()
    yield service
    await service.stop(0.5)


@pytest.fixture
async def client(service):
    client = StorageClient(service.server.address)
    yield client
    await client.close()


@pytest.fixture
def stored_files(tmp_path):
    """Lists the files of blobs and uploads."""

    def files():
        state = tmp_path / "state"
        return (
            sorted(p.name for p in (state / "blobs").glob("*/*")),
            sorted(p.name for p in (state / "uploads").iterdir()),
        )

    return files


@pytest.fixture
def eventually():
    """Waits for something that another task brings about."""

    async def wait(condition, guard_s=30):
        async with asyncio.timeout(guard_s):
            while not condition():
                await asyncio.sleep(0.005)

    return wait


@pytest.fixture
def free_port():
    """A port that nobody listens on, kept from others while the test runs."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]
