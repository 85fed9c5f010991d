"""Backups of a back end without a service in between."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phalanx.v1 import storage_service_pb2 as pb
from storage.interfaces import Backend

_CHUNK_BYTES = 1024 * 1024


class StoreBackend:
    """As much of an SDK's backend as ``phalanx.backups.saving`` asks for."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def stream(self, *_: Any, **__: Any) -> Iterator[pb.ReadSnapshotResponse]:
        """Tell a snapshot; what it names is held for ever."""
        told: list[pb.ReadSnapshotResponse] = []
        self._backend.snapshots.read(told.append)
        yield from told
        while True:
            yield pb.ReadSnapshotResponse(held_s=1e9)

    def get_blob_to(self, digest: str, path: Path) -> None:
        """Write a blob to a file."""
        reader = self._backend.blobs.open(digest)
        try:
            with path.open("wb") as file:
                for chunk in reader.chunks(0, reader.size_bytes, _CHUNK_BYTES):
                    file.write(chunk)
        finally:
            reader.close()
