"""One storage process: back end, servicers, housekeeping and their end."""

import asyncio
import contextlib
import os
from collections.abc import Callable

from phalanx.errors import FailedPrecondition, PhalanxError
from phalanx.quota_file import QuotaFile
from phalanx.rpc.credentials import ServerKeys
from phalanx.rpc.limits import ServerLimits
from phalanx.rpc.process import announce
from phalanx.rpc.server import FIXED_WINDOWS, Server
from phalanx.telemetry.logs import get_logger
from phalanx.telemetry.metrics import StorageMetrics, new_registry
from phalanx.v1 import (
    dataset_service_pb2,
    dataset_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    storage_service_pb2,
    storage_service_pb2_grpc,
)
from storage.backends.opening import Places, backend_name, open_backend
from storage.config import StorageConfig
from storage.interfaces import Backend
from storage.links.chunks import LinkedChunks
from storage.service.catalog_servicers import DatasetServicer, ModelServicer
from storage.service.collection import Collector
from storage.service.disk import show_disk
from storage.service.holds import Holds
from storage.service.operations import Operations
from storage.service.readiness import show_readiness
from storage.service.scrubbing import Scrubber
from storage.service.storage_servicer import StorageServicer

EXIT_DISK_FAILED = 74
"""The disk failed; start again, so that what it really holds is read anew (EX_IOERR)."""

SERVICE_NAMES = (
    storage_service_pb2.DESCRIPTOR.services_by_name["StorageService"].full_name,
    dataset_service_pb2.DESCRIPTOR.services_by_name["DatasetService"].full_name,
    model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
)

_log = get_logger(__name__)


class StorageProcess:
    """Everything of one storage process inside a running event loop."""

    def __init__(self, config: StorageConfig) -> None:
        self._config = config
        registry = new_registry("storage", config.id)
        metrics = self._metrics = StorageMetrics(registry)
        self.server = Server(
            listen=config.listen,
            metrics_listen=config.metrics_listen,
            probe_listen=config.probe_listen,
            service_names=SERVICE_NAMES,
            reflection=config.reflection,
            registry=registry,
            limits=ServerLimits.of(config),
            options=FIXED_WINDOWS,
            keys=ServerKeys.of(config, config.tokens),
            public_listen=config.public_listen,
        )
        places = Places(config.state, config.metadata, config.blobs)
        self.operations = Operations(backend_name(places), metrics)
        self.backend: Backend = open_backend(
            places,
            reserve_bytes=config.reserve_bytes,
            namespace_bytes_max=bytes_quota(config),
            on_corruption=self.operations.corruption,
            on_failure=end_at_once,
        )
        self._demand_whole()
        holds = Holds(self.backend.leases, self.operations)
        self.collector = Collector(
            self.backend,
            self.operations,
            metrics,
            grace_s=config.gc_grace_s,
            interval_s=config.gc_interval_s,
            holds=holds,
        )
        self.scrubber = Scrubber(
            self.backend,
            self.operations,
            metrics,
            interval_s=config.scrub_interval_s,
            bytes_per_s=config.scrub_bytes_per_s,
        )
        self.links = LinkedChunks(
            self.backend, self.operations, config.link_root, config.link_processes
        )
        self._storage = StorageServicer(
            self.backend,
            self.operations,
            self.collector,
            self.links,
            holds,
            self.scrubber,
            person_bytes_max=config.upload_bytes,
            code_bytes_max=config.code_bytes,
        )
        self._scrubbing: asyncio.Task[None] | None = None
        self._housekeeping: asyncio.Task[None] | None = None
        self._disk: asyncio.Task[None] | None = None
        self._readiness: asyncio.Task[None] | None = None
        self._add_servicers()

    def _demand_whole(self) -> None:
        if self.backend.snapshots.is_restoring():
            self.backend.close()
            raise FailedPrecondition(
                "a restore into this place did not end: run `phalanx restore` again",
                reason="RESTORE_UNFINISHED",
            )

    def _add_servicers(self) -> None:
        raw = self.server.raw
        storage_service_pb2_grpc.add_StorageServiceServicer_to_server(self._storage, raw)
        dataset_service_pb2_grpc.add_DatasetServiceServicer_to_server(
            DatasetServicer(self.backend, self.operations, self.links), raw
        )
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelServicer(self.backend, self.operations), raw
        )

    async def start(self) -> None:
        """Serve; FailedPrecondition if the address cannot be used."""
        await self.server.start()
        self._housekeeping = asyncio.create_task(self.collector.run())
        self._scrubbing = asyncio.create_task(self.scrubber.run())
        self._disk = asyncio.create_task(
            show_disk(self._config.state, self.operations, self._metrics)
        )
        self.server.set_serving(True)
        if self.backend.check is not None:
            self._readiness = asyncio.create_task(
                show_readiness(self.backend.check, self.server.set_serving)
            )

    async def stop(self, grace_s: float = 2.0) -> None:
        """Let open calls end, finish what is being written, close everything."""
        self._storage.end_streams()
        # First who would say again that it serves.
        await _ended(self._readiness)
        await self.server.stop(grace_s)
        await _ended(self._housekeeping)
        await _ended(self._scrubbing)
        await _ended(self._disk)
        await asyncio.to_thread(self.links.close)
        await asyncio.to_thread(self.operations.close)
        await asyncio.to_thread(self.backend.close)


async def _ended(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def end_at_once(error: PhalanxError) -> None:
    """End the process after the disk failed.

    Nothing is closed: closing would have SQLite copy its log, which may differ between memory and
    disk by now, into the database file. The next start reads and checks the log anew.
    """
    _log.critical("disk_failed", message=error.message)
    os._exit(EXIT_DISK_FAILED)


async def serve(config: StorageConfig, stop: asyncio.Event) -> None:
    """Run until ``stop`` is set."""
    process = StorageProcess(config)
    try:
        await process.start()
        server = process.server
        announce(
            config,
            role="storage",
            address=server.address,
            metrics_address=server.metrics_address,
        )
        _log.info("ready", address=server.address, metrics_address=server.metrics_address)
        await stop.wait()
    finally:
        await process.stop()


def bytes_quota(config: StorageConfig) -> Callable[[str], int]:
    """Return what says how many bytes a namespace may have by now."""
    file = QuotaFile(config.quotas)

    def limit(namespace: str) -> int:
        own = file.read()[1].get(namespace)
        return config.namespace_bytes if own is None or own.bytes is None else own.bytes

    return limit
