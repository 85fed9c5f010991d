"""The blocking client of storage: the asyncio client on an event loop in a thread of its own.

It works wherever a loop is running already (Jupyter), and threads may share it.
"""

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self, TypeVar

from phalanx.clients.blob_sources import BlobSource
from phalanx.clients.storage_async import CALL_TIMEOUT_S, BlobSize, StorageClient
from phalanx.errors import FailedPrecondition
from phalanx.rpc.channel import ATTEMPTS
from phalanx.rpc.credentials import ClientKeys
from phalanx.v1 import dataset_service_pb2 as dataset_pb
from phalanx.v1 import model_service_pb2 as model_pb
from phalanx.v1 import storage_service_pb2 as pb

ResultT = TypeVar("ResultT")


class SyncStorageClient:
    """Does what ``StorageClient`` does, blocking; see there for each method. Close it."""

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        attempts: int = ATTEMPTS,
        keys: ClientKeys | None = None,
    ) -> None:
        self.address = address
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="storage-client", daemon=True
        )
        self._thread.start()

        async def open_client() -> StorageClient:
            return StorageClient(
                address,
                timeout_s=timeout_s,
                attempts=attempts,
                own_connection=True,
                keys=keys,
                # People dial a host, and that is who must answer.
                service=None,
            )

        try:
            self._client = self._run(open_client())
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection and end the thread; harmless when done before."""
        if not self._loop.is_closed():
            self._run(self._client.close())
            self._end()

    def put_blob(
        self,
        source: BlobSource,
        *,
        digest: str = "",
        check_first: bool = True,
        timeout_s: float | None = None,
    ) -> str:
        """Store ``source`` and return its digest."""
        return self._run(
            self._client.put_blob(
                source, digest=digest, check_first=check_first, timeout_s=timeout_s
            )
        )

    def start_put_blob(self, source: BlobSource, *, digest: str) -> Future[str]:
        """Begin to store what has this digest; others may be under way meanwhile."""
        return self._start(self._client.put_blob(source, digest=digest))

    def get_blob(
        self, digest: str, offset: int = 0, length: int = 0, *, timeout_s: float | None = None
    ) -> bytes:
        """Return a blob or a part of it."""
        return self._run(self._client.get_blob(digest, offset, length, timeout_s=timeout_s))

    def get_blob_to(self, digest: str, path: Path, *, timeout_s: float | None = None) -> int:
        """Write a blob to a file; return its size."""
        return self._run(self._client.get_blob_to(digest, path, timeout_s=timeout_s))

    def missing_blobs(self, digests: Iterable[str]) -> list[str]:
        """Return the digests that are not stored."""
        return self._run(self._client.missing_blobs(digests))

    def compose_blob(self, pieces: Sequence[pb.BlobPiece]) -> BlobSize:
        """Make one blob of pieces."""
        return self._run(self._client.compose_blob(pieces))

    def append_journal(
        self,
        stream: str,
        records: Sequence[bytes],
        *,
        expected_sequence: int = -1,
        fence: pb.Fence | None = None,
    ) -> int:
        """Append all records or none; return the sequence after the last."""
        return self._run(
            self._client.append_journal(
                stream, records, expected_sequence=expected_sequence, fence=fence
            )
        )

    def read_journal(
        self, stream: str, from_sequence: int = 0, max_records: int = 0
    ) -> list[pb.JournalRecord]:
        """Return the records from a sequence on."""

        async def read() -> list[pb.JournalRecord]:
            records = self._client.read_journal(stream, from_sequence, max_records)
            return [record async for record in records]

        return self._run(read())

    def get_job_row(self, job_id: str) -> pb.GetJobRowResponse | None:
        """Return a job's term and final checkpoint, or None."""
        return self._run(self._client.get_job_row(job_id))

    def list_checkpoints(self, job_id: str) -> list[pb.CheckpointManifest]:
        """Return a job's checkpoints, newest first."""
        return self._run(self._client.list_checkpoints(job_id))

    def collect_garbage(
        self, *, dry_run: bool = False, grace_s: int = -1
    ) -> pb.CollectGarbageResponse:
        """Remove blobs that nothing refers to."""
        return self._run(self._client.collect_garbage(dry_run=dry_run, grace_s=grace_s))

    def create_dataset(
        self, name: str, manifest_digest: str, *, namespace: str = "", request_id: str = ""
    ) -> dataset_pb.Dataset:
        """Register the next version of a data set."""
        return self._run(
            self._client.create_dataset(
                name, manifest_digest, namespace=namespace, request_id=request_id
            )
        )

    def get_dataset(self, name: str, *, namespace: str = "") -> dataset_pb.Dataset:
        """Return one version of a data set."""
        return self._run(self._client.get_dataset(name, namespace=namespace))

    def list_datasets(self, *, namespace: str = "") -> list[dataset_pb.Dataset]:
        """Return all data sets of a namespace."""
        return self._run(self._client.list_datasets(namespace=namespace))

    def delete_dataset(self, name: str, *, namespace: str = "", request_id: str = "") -> None:
        """Delete a data set or one version of it."""
        self._run(self._client.delete_dataset(name, namespace=namespace, request_id=request_id))

    def create_model(
        self, model: model_pb.ModelVersion, *, request_id: str = ""
    ) -> model_pb.ModelVersion:
        """Register the next version of a model."""
        return self._run(self._client.create_model(model, request_id=request_id))

    def get_model(self, name: str, *, namespace: str = "") -> model_pb.ModelVersion:
        """Return one version of a model."""
        return self._run(self._client.get_model(name, namespace=namespace))

    def list_models(self, *, namespace: str = "") -> list[model_pb.ModelVersion]:
        """Return all models of a namespace."""
        return self._run(self._client.list_models(namespace=namespace))

    def delete_model(self, name: str, *, namespace: str = "", request_id: str = "") -> None:
        """Delete a model or one version of it."""
        self._run(self._client.delete_model(name, namespace=namespace, request_id=request_id))

    def _run(self, call: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Run a call, which has its own deadline, on the thread's loop."""
        future = self._start(call)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C reaches this thread, not the loop's.
            future.cancel()
            raise

    def _start(self, call: Coroutine[Any, Any, ResultT]) -> Future[ResultT]:
        if self._loop.is_closed():
            call.close()
            raise FailedPrecondition("this storage client is closed", reason="CLOSED")
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    def _end(self) -> None:
        async def settle() -> None:
            await self._loop.shutdown_asyncgens()
            await self._loop.shutdown_default_executor()

        asyncio.run_coroutine_threadsafe(settle(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
