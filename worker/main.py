"""What a worker process consists of, from its settings to its end."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from phalanx.clients.storage import StorageClient
from phalanx.config import parse
from phalanx.data.reader import OPEN_CHUNKS
from phalanx.rpc.buffers import reuse_large_buffers
from phalanx.rpc.credentials import ClientKeys, ServerKeys
from phalanx.rpc.limits import ServerLimits, raise_open_files
from phalanx.rpc.own_address import own_address
from phalanx.rpc.patience import Patience, insist
from phalanx.rpc.process import announce, run_service
from phalanx.rpc.server import Server
from phalanx.telemetry.metrics import WorkerMetrics, new_registry
from worker.config import WorkerConfig
from worker.session.all_reduce.exchange import SERVICE, MemberExchange
from worker.session.app import Session
from worker.session.leaf_server import LeafServer

_OTHER_FILES = 1024
"""Beside the chunks that each leaf process keeps mapped: sockets, shared memory, libraries."""
_PATIENCE = Patience(first_s=0.1, longest_s=2.0)


class Transfers:
    """Blobs from and to storage; waits for as long as storage is away or takes no more calls."""

    def __init__(self, address: str | None, keys: ClientKeys | None = None) -> None:
        self._keys = keys
        self._client = StorageClient(address, keys=keys) if address is not None else None
        self._known = asyncio.Event()
        if self._client is not None:
            self._known.set()

    def found(self, address: str) -> None:
        """Control says where storage is; an address from the settings is not replaced."""
        if self._client is None:
            self._client = StorageClient(address, keys=self._keys)
            self._known.set()

    async def to_file(self, digest: str, path: Path) -> None:
        """Write a blob to a file. Raises PhalanxError for what does not pass by itself."""
        await self._known.wait()
        assert self._client is not None
        await insist(partial(self._client.get_blob_to, digest, path), _PATIENCE)

    async def store(self, content: bytes) -> str:
        """Keep a blob; return its digest. Raises PhalanxError for what does not pass by itself."""
        await self._known.wait()
        assert self._client is not None
        return await insist(partial(self._client.put_blob, content), _PATIENCE)

    async def client(self) -> StorageClient:
        """The connection itself; waits until it is known where storage is."""
        await self._known.wait()
        assert self._client is not None
        return self._client

    async def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            await self._client.close()


async def serve(
    config: WorkerConfig, stop: asyncio.Event, leaves: LeafServer | None = None
) -> None:
    """Run a worker until `stop` is set or control has drained it."""
    registry = new_registry("worker", config.id)
    keys = ClientKeys.of(config)
    blobs = Transfers(",".join(config.storage) or None, keys)
    metrics = WorkerMetrics(registry)
    session = Session(
        config, metrics, blobs.to_file, blobs.found, leaves, blobs.store, blobs.client, keys
    )
    server = Server(
        listen=config.listen,
        metrics_listen=config.metrics_listen,
        service_names=[SERVICE],
        reflection=config.reflection,
        registry=registry,
        limits=ServerLimits.of(config),
        keys=ServerKeys.of(config),
    )
    MemberExchange(session.served).add_to(server.raw)
    try:
        await server.start()
        session.address = config.advertise or await own_address(
            server.address, config.control, stop
        )
        await session.start()
        session.able_changed = server.set_serving
        server.set_serving(session.able)
        # What is loaded stays: the collector need not walk through it at every step.
        gc.collect()
        gc.freeze()
        announce(
            config,
            role="worker",
            address=server.address,
            metrics_address=server.metrics_address,
        )
        asked = asyncio.create_task(stop.wait())
        drained = asyncio.create_task(session.wait_drained())
        await asyncio.wait((asked, drained), return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        drained.cancel()
        await session.leave()
    finally:
        await session.close()
        await server.stop(0.0)
        await blobs.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the settings and run; returns the exit code."""
    config = parse(WorkerConfig, argv, prog="phalanx worker")
    raise_open_files(config.slot_count * OPEN_CHUNKS + _OTHER_FILES)
    # Before there are threads and connections.
    leaves = LeafServer.forked()
    reuse_large_buffers()
    return run_service(config, partial(serve, leaves=leaves), role="worker")
