"""What a worker process consists of, from its settings to its end."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from phalanx.config import parse
from phalanx.data.reader import OPEN_CHUNKS
from phalanx.rpc.buffers import reuse_large_buffers
from phalanx.rpc.credentials import ClientKeys, ServerKeys
from phalanx.rpc.limits import ServerLimits, raise_open_files
from phalanx.rpc.own_address import own_address
from phalanx.rpc.patience import Patience, insist
from phalanx.rpc.process import announce, run_service
from phalanx.rpc.server import Server
from phalanx.rpc.storage_place import StoragePlace
from phalanx.telemetry.metrics import WorkerMetrics, new_registry
from worker.config import WorkerConfig
from worker.session.all_reduce.exchange import SERVICE, MemberExchange
from worker.session.app import Session
from worker.session.leaf_server import LeafServer

_OTHER_FILES = 1024
"""Beside the chunks that each leaf process keeps mapped: sockets, shared memory, libraries."""
_PATIENCE = Patience(first_s=0.1, longest_s=2.0)


class Transfers:
    """Blobs from and to storage; waits for as long as it is away or takes no more calls."""

    def __init__(self, place: StoragePlace) -> None:
        self._place = place

    async def to_file(self, digest: str, path: Path) -> None:
        """Write a blob to a file. Raises PhalanxError for what does not pass by itself."""
        client = await self._place.client()
        await insist(partial(client.get_blob_to, digest, path), _PATIENCE)

    async def store(self, content: memoryview) -> str:
        """Keep a blob; return its digest. Raises PhalanxError for what does not pass by itself."""
        client = await self._place.client()
        return await insist(partial(client.put_blob, content), _PATIENCE)


async def serve(config: WorkerConfig, stop: asyncio.Event, leaves: LeafServer | None = None) -> int:
    """Run a worker until `stop` is set, control has drained it, or nobody tells where storage is;
    return the exit code."""
    registry = new_registry("worker", config.id)
    keys = ClientKeys.of(config)
    storage = StoragePlace(",".join(config.storage), keys)
    blobs = Transfers(storage)
    metrics = WorkerMetrics(registry)
    session = Session(
        config,
        metrics,
        download=blobs.to_file,
        welcomed=storage.welcomed,
        leaves=leaves,
        store=blobs.store,
        storage=storage.client,
        keys=keys,
    )
    server = Server(
        listen=config.listen,
        metrics_listen=config.metrics_listen,
        probe_listen=config.probe_listen,
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
        ends = [stop.wait(), session.wait_drained(), storage.missing.wait()]
        await _first_of(ends)
        # What it has is handed over; no more should come, whatever its leaf processes can do.
        session.able_changed = lambda _: None
        server.set_serving(False)
        await session.leave()
        if storage.missing.is_set() and not stop.is_set():
            return storage.given_up("worker")
        return 0
    finally:
        await session.close()
        await server.stop(0.0)
        await storage.close()


async def _first_of(ends: Sequence[Coroutine[Any, Any, Any]]) -> None:
    tasks = [asyncio.create_task(each) for each in ends]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the settings and run; returns the exit code."""
    config = parse(WorkerConfig, argv, prog="phalanx worker")
    raise_open_files(config.slot_count * OPEN_CHUNKS + _OTHER_FILES)
    # Before there are threads and connections.
    leaves = LeafServer.forked()
    reuse_large_buffers()
    return run_service(config, partial(serve, leaves=leaves), role="worker")
