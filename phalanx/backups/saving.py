"""Making a backup of a running cluster's storage.

Storage tells all rows as of one moment and then keeps what they name from being collected for as
long as that call is open. Blobs have their SHA-256 for a name, so fetching them one after another
yields the state of that moment, whatever happens meanwhile; one that is in the folder already, and
still is what its name says, is not fetched again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from phalanx import __version__
from phalanx.backups.folder import (
    BackupFolder,
    Damage,
    Snapshot,
    new_name,
    read_messages,
    sha256_of,
    write_message,
)
from phalanx.errors import DataLoss, FailedPrecondition, NotFound, Unavailable
from phalanx.sdk.methods import READ_SNAPSHOT, Method, RequestT, ResponseT
from phalanx.v1 import storage_service_pb2 as pb

_LONGEST_S = 7 * 24 * 3600.0
_ATTEMPTS = 3
_OWN_HOLD_S = 90.0
_PAUSE_S = 1.0


class Source(Protocol):
    """As much as a backup needs of what stands behind a ``Cluster``."""

    def stream(
        self,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout_s: float = ...,
    ) -> Iterator[ResponseT]:
        """Make one call that answers with a stream."""

    def get_blob_to(self, digest: str, path: Path) -> None:
        """Write a stored blob, checked against its digest, to a file."""


OnProgress = Callable[[int, int], None]
"""Hears how many blobs and bytes were fetched."""


@dataclass
class Saved:
    """A backup that was made; what of it was new to the folder."""

    snapshot: Snapshot
    new_blobs: int
    new_bytes: int


@dataclass
class _Counts:
    rows: int = 0
    blobs: int = 0
    blob_bytes: int = 0
    new_blobs: int = 0
    new_bytes: int = 0
    damage: list[Damage] = field(default_factory=list)


def save(
    backend: Source,
    folder: BackupFolder,
    *,
    on_progress: OnProgress = lambda _blobs, _bytes: None,
    now_unix_nanos: Callable[[], int] = time.time_ns,
) -> Saved:
    """Make a backup; nobody else may use the folder meanwhile (``BackupFolder.locked``).

    What is damaged in storage is told in ``snapshot.damage``, and the rest is saved. When storage
    goes away, it is begun again, which costs only what is not in the folder yet. Raises
    PhalanxError, and OSError where the folder cannot be written.
    """
    left = _ATTEMPTS
    waits_until_s = 0.0
    while True:
        try:
            return _save(backend, folder, on_progress, now_unix_nanos())
        except Unavailable:
            left -= 1
            if not left:
                raise
            waits_until_s = time.monotonic() + _OWN_HOLD_S
        except FailedPrecondition as error:
            # Storage that was killed takes a while to see that our own hold is over.
            if error.reason != "BACKUP_RUNNING" or time.monotonic() >= waits_until_s:
                raise
        time.sleep(_PAUSE_S)


def _save(backend: Source, folder: BackupFolder, on_progress: OnProgress, now: int) -> Saved:
    name = new_name(now)
    rows = folder.partial / f"{name}.rows"
    messages = backend.stream(READ_SNAPSHOT, pb.ReadSnapshotRequest(), timeout_s=_LONGEST_S)
    try:
        counts = _write_rows(messages, rows)
        fetching = _Fetching(backend, folder, counts, _Hold(messages), on_progress)
        for blob in read_blobs(rows):
            fetching.fetch(blob)
    finally:
        if isinstance(messages, Generator):
            messages.close()
    snapshot = Snapshot(
        name=name,
        create_unix_nanos=now,
        phalanx=__version__,
        rows=counts.rows,
        rows_bytes=rows.stat().st_size,
        rows_sha256=sha256_of(rows) or "",
        blobs=counts.blobs,
        blob_bytes=counts.blob_bytes,
        damage=tuple(counts.damage),
    )
    folder.add(snapshot, rows)
    return Saved(snapshot, counts.new_blobs, counts.new_bytes)


def _write_rows(messages: Iterator[pb.ReadSnapshotResponse], path: Path) -> _Counts:
    """Write what is told to a file, up to where it is complete."""
    counts = _Counts()
    with path.open("w+b") as file:
        for message in messages:
            if message.tables:
                # Whatever came before was broken off.
                counts = _Counts()
                file.seek(0)
                file.truncate()
            counts.rows += len(message.rows)
            counts.damage += [Damage(text) for text in message.damage]
            write_message(file, message)
            if message.complete:
                file.flush()
                os.fsync(file.fileno())
                return counts
    raise Unavailable("storage ended in the midst of a snapshot")


def read_blobs(rows: Path) -> Iterator[pb.NamedBlob]:
    """Yield the blobs that a file of rows names."""
    with rows.open("rb") as file:
        for message in read_messages(file):
            yield from message.blobs


class _Hold:
    """Knows whether storage has kept what the snapshot names."""

    def __init__(self, messages: Iterator[pb.ReadSnapshotResponse]) -> None:
        self._messages = messages
        self._since_s = time.monotonic()

    def check(self) -> None:
        """Return if nothing was collected until now; raise Unavailable, or whatever it ended with.

        Storage tells for how long it has held on, by a clock that began before this one.
        """
        needed_s = time.monotonic() - self._since_s
        for message in self._messages:
            if message.held_s >= needed_s:
                return
        raise Unavailable("storage let go of the snapshot")


class _Fetching:
    """Fetches blobs, counting what comes of it."""

    def __init__(
        self,
        backend: Source,
        folder: BackupFolder,
        counts: _Counts,
        hold: _Hold,
        on_progress: OnProgress,
    ) -> None:
        self._backend = backend
        self._folder = folder
        self._counts = counts
        self._hold = hold
        self._on_progress = on_progress

    def fetch(self, blob: pb.NamedBlob) -> None:
        """Have a blob in the folder, or note why not."""
        counts, digest = self._counts, blob.digest
        if not self._folder.holds(digest):
            partial = self._folder.partial / digest
            try:
                self._backend.get_blob_to(digest, partial)
            except NotFound:
                if blob.required:
                    self._hold.check()
                    counts.damage.append(Damage(f"blob {digest} is not stored", digest))
                return
            except DataLoss as error:
                counts.damage.append(Damage(error.message, digest))
                return
            self._folder.put(partial, digest)
            counts.new_blobs += 1
            counts.new_bytes += self._folder.blob_path(digest).stat().st_size
            self._on_progress(counts.new_blobs, counts.new_bytes)
        counts.blobs += 1
        counts.blob_bytes += self._folder.blob_path(digest).stat().st_size
