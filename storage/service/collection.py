"""Garbage collection and the other work that storage does by itself."""

import asyncio
from itertools import islice

from phalanx.errors import PhalanxError
from phalanx.telemetry.logs import get_logger
from phalanx.telemetry.metrics import StorageMetrics
from phalanx.v1 import storage_service_pb2 as pb
from storage.core.garbage import is_old_enough
from storage.core.keys import invalid
from storage.core.snapshots import BACKUP_RUNNING
from storage.interfaces import Backend
from storage.service.holds import Holds
from storage.service.operations import Operations

# Registrations wait while a batch is swept, so batches are small.
_BATCH_BLOBS = 16
_SHOW_INTERVAL_S = 15.0

_log = get_logger(__name__)


class Collector:
    """Collects garbage when asked and every ``interval_s`` (0: never by itself)."""

    def __init__(
        self,
        backend: Backend,
        operations: Operations,
        metrics: StorageMetrics,
        *,
        grace_s: float,
        interval_s: float,
        holds: Holds,
    ) -> None:
        self._backend = backend
        self._operations = operations
        self._metrics = metrics
        self._grace_s = grace_s
        self._interval_s = interval_s
        self._holds = holds
        self._one_at_a_time = asyncio.Lock()

    async def collect(self, request: pb.CollectGarbageRequest) -> pb.CollectGarbageResponse:
        """Remove what is garbage, or with ``dry_run`` say what would go."""
        if request.grace_s < -1:
            raise invalid("grace_s", "write -1 (the server's own) or seconds")
        grace_s = self._grace_s if request.grace_s == -1 else float(request.grace_s)
        async with self._one_at_a_time:
            if not request.dry_run:
                await self._operations.state("hold", self._holds.expire)
            response = await self._operations.blobs(
                "collect_garbage", lambda: collect_garbage(self._backend, grace_s, request.dry_run)
            )
            if not request.dry_run:
                await self._operations.state("reclaim", self._backend.references.reclaim)
        return response

    async def run(self) -> None:
        """Keep house until cancelled; a failure is logged and tried again at its next turn."""
        waited_s = 0.0
        while True:
            await self.show_usage()
            await asyncio.sleep(_SHOW_INTERVAL_S)
            waited_s += _SHOW_INTERVAL_S
            if self._interval_s and waited_s >= self._interval_s:
                waited_s = 0.0
                await self._collect_by_itself()

    async def show_usage(self) -> None:
        """Bring the metric ``storage_bytes`` up to date."""
        try:
            metadata_bytes, blob_bytes = await self._operations.state("usage", self._look)
        except PhalanxError as error:
            _log.warning("usage_unknown", message=error.message)
            return
        gauge = self._metrics.storage_bytes
        gauge.labels("metadata").set(metadata_bytes)
        gauge.labels("blobs").set(blob_bytes)

    def _look(self) -> tuple[int, int]:
        backend = self._backend
        backend.keep_time()
        return backend.references.usage_bytes(), backend.blobs.usage_bytes()

    async def _collect_by_itself(self) -> None:
        try:
            response = await self.collect(pb.CollectGarbageRequest(grace_s=-1))
        except PhalanxError as error:
            if error.reason == BACKUP_RUNNING:
                _log.info("garbage_collection_waits", message=error.message)
                return
            _log.warning("garbage_collection_failed", reason=error.reason, message=error.message)
            return
        if response.blobs_removed:
            _log.info(
                "garbage_collected", blobs=response.blobs_removed, bytes=response.bytes_removed
            )


def collect_garbage(backend: Backend, grace_s: float, dry_run: bool) -> pb.CollectGarbageResponse:
    """Remove blobs that are old enough and that nothing names."""
    # A name that lost a bit names another blob, and its own would go.
    backend.references.verify()
    response = pb.CollectGarbageResponse()
    blobs = backend.blobs.scan()
    while batch := list(islice(blobs, _BATCH_BLOBS)):
        sizes = {
            blob.digest: blob.size_bytes for blob in batch if is_old_enough(blob.age_s, grace_s)
        }
        if dry_run:
            gone = [sizes[digest] for digest in backend.references.unreferenced(list(sizes))]
        else:
            gone = backend.references.sweep(
                list(sizes), lambda digest: backend.blobs.remove_if_old(digest, grace_s)
            )
        response.blobs_removed += len(gone)
        response.bytes_removed += sum(gone)
        response.blobs_kept += len(batch) - len(gone)
    return response
