"""What a storage back end provides.

One suite (``tests/contract/storage``) holds every back end to these protocols. All methods block
and may be called from any thread; the service calls them from thread pools. Whatever a method
returned without raising is durable and visible to every later call.

Errors are those of ``phalanx.errors``. Beyond what each method names, any of them may raise
ResourceExhausted (DISK_FULL), Unavailable (the back end cannot be reached, or an operation may or
may not have happened: retry) and DataLoss (a checksum is wrong).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from phalanx.keys.caller import ANYBODY, Caller
from phalanx.v1 import dataset_service_pb2 as dataset_pb
from phalanx.v1 import model_service_pb2 as model_pb
from phalanx.v1 import storage_service_pb2 as pb
from storage.core.catalog import Page, VersionName
from storage.core.leases import LeaseRow

BytesQuota = int | Callable[[str], int]
"""What a namespace may have; the same for all, or by its name. 0: no limit."""

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class StoredBlob:
    """A blob as a back end lists it; ``age_s`` is the time since it was last put or asked for."""

    digest: str
    size_bytes: int
    age_s: float = 0.0


class BlobWriter(Protocol):
    """One upload. Not thread-safe; ends with ``commit`` or ``abort``."""

    def write(self, chunk: Buffer) -> None:
        """Take the next bytes."""

    def commit(self, expected_digest: str = "", expected_bytes: int = -1) -> StoredBlob:
        """Make the blob durable and visible under its SHA-256.

        Raises InvalidArgument (DIGEST_MISMATCH, SIZE_MISMATCH) if it is not what was expected.
        """

    def abort(self) -> None:
        """Forget the upload; does nothing after ``commit`` or ``abort``."""


class BlobReader(Protocol):
    """One open blob. Not thread-safe; ``close`` it."""

    @property
    def size_bytes(self) -> int:
        """Size of the whole blob."""

    def chunks(self, offset: int, length: int, chunk_bytes: int) -> Iterator[bytes]:
        """Yield ``length`` bytes from ``offset``; InvalidArgument if they are not all inside.

        When that is the whole blob, its content is verified before the last chunk is yielded.
        """

    def verify(self) -> None:
        """Read the whole blob and raise DataLoss (BLOB_CORRUPT) if it does not match its digest."""

    def close(self) -> None:
        """Let the blob go."""


class BlobStore(Protocol):
    """Blobs by the lower-case hexadecimal SHA-256 of their content."""

    def writer(self, expected_bytes: int = -1) -> BlobWriter:
        """Begin an upload; ``expected_bytes`` lets a store refuse early what cannot fit."""

    def open(self, digest: str) -> BlobReader:
        """Open a blob; NotFound (BLOB_NOT_FOUND) if it is not stored."""

    def sizes(self, digests: Iterable[str]) -> Mapping[str, int]:
        """Return the sizes of those that are stored and not known to be corrupt."""

    def touch(self, digests: Iterable[str]) -> Mapping[str, int]:
        """Do the same as ``sizes`` and make them young, so that garbage collection spares them."""

    def scan(self, prefix: str = "") -> Iterator[StoredBlob]:
        """List what is stored, in any order; puts and removals meanwhile may or may not show.

        With a ``prefix`` of two digits only what begins with it.
        """

    def remove_if_old(self, digest: str, grace_s: float) -> int | None:
        """Remove the blob unless it is young; return the bytes freed, or None if nothing went.

        A put or touch of the same digest at the same time either finds the blob removed or keeps
        it.
        """

    def usage_bytes(self) -> int:
        """Return the size of all blobs together."""


class JournalStore(Protocol):
    """Named streams of records."""

    def append(self, request: pb.AppendJournalRequest) -> int:
        """Append all records or none; return the sequence after the last.

        Raises Aborted (SEQUENCE_MISMATCH, STALE_GENERATION).
        """

    def read(self, request: pb.ReadJournalRequest) -> Iterator[pb.ReadJournalResponse]:
        """Yield at least one response; records of one call have no gap.

        Raises Aborted (JOURNAL_TRUNCATED) if records went while they were being read.
        """

    def truncate(self, request: pb.TruncateJournalRequest) -> None:
        """Drop the records before a sequence; Aborted (STALE_GENERATION)."""

    def delete(self, request: pb.DeleteJournalRequest) -> None:
        """Remove a stream, if it exists; Aborted (STALE_GENERATION)."""


class LeaseStore(Protocol):
    """Leases, decided by ``storage.core.leases``."""

    def acquire(self, request: pb.AcquireLeaseRequest) -> pb.AcquireLeaseResponse:
        """Take a lease if the rules allow it."""

    def renew(self, request: pb.RenewLeaseRequest) -> LeaseRow:
        """Raise the counter; Aborted (STALE_GENERATION) if the lease was lost, NotFound."""

    def release(self, request: pb.ReleaseLeaseRequest) -> None:
        """Free the lease if it is still held so."""

    def get(self, name: str) -> LeaseRow | None:
        """Return the lease, or None if nobody ever held it."""


class JobStore(Protocol):
    """Terms and checkpoints, decided by ``storage.core.checkpoints``."""

    def raise_term(self, request: pb.RaiseTermRequest) -> int:
        """Return the new term; FailedPrecondition (FINAL_CHECKPOINT), Aborted (STALE_TERM, …)."""

    def get_row(self, job_id: str) -> pb.GetJobRowResponse:
        """Return term and final checkpoint; NotFound, DataLoss (MANIFEST_CORRUPT)."""

    def commit(
        self, request: pb.CommitCheckpointRequest, caller: Caller = ANYBODY
    ) -> pb.CommitCheckpointResponse:
        """Register one part; see ``storage.core.checkpoints.register_part`` for what it raises.

        PermissionDenied (NOT_YOURS) where another one than the caller owns its range.
        """

    def check_root(self, job_id: str, caller: Caller, field: str) -> None:
        """Raise PermissionDenied (NOT_YOURS) where another one owns range 0 of the job."""

    def list_checkpoints(self, job_id: str) -> Sequence[pb.CheckpointManifest]:
        """Return the whole and undamaged checkpoints, newest first; none for an unknown job."""

    def delete_row(self, request: pb.DeleteJobRowRequest) -> None:
        """Remove a job's row, checkpoints and pins, if they exist."""


class Catalog(Protocol):
    """Data sets, models and the pins that keep them."""

    def create_dataset(
        self,
        request: dataset_pb.CreateDatasetRequest,
        summary: dataset_pb.Dataset,
        digests: Iterable[str],
        linked: Iterable[str] = (),
    ) -> dataset_pb.Dataset:
        """Register the next version, described by ``summary`` and made of the blobs ``digests``.

        ``linked`` are chunks that are not stored: its manifest says how to make them. The newest
        version itself is returned if it has the same manifest. Raises AlreadyExists
        (REQUEST_ID_REUSED) and FailedPrecondition (BLOB_MISSING).
        """

    def datasets_linking(self, digest: str) -> Sequence[dataset_pb.Dataset]:
        """Return the data sets whose manifest says how to make a chunk, newest first."""

    def get_dataset(self, name: VersionName) -> dataset_pb.Dataset:
        """Return one version; NotFound."""

    def list_datasets(self, page: Page) -> tuple[list[dataset_pb.Dataset], str]:
        """Return one page and the token of the next (empty: it was the last)."""

    def delete_dataset(self, request: dataset_pb.DeleteDatasetRequest, name: VersionName) -> None:
        """Delete one version (0: all); NotFound, FailedPrecondition (IN_USE, REFERENCED)."""

    def create_model(self, request: model_pb.CreateModelRequest) -> model_pb.ModelVersion:
        """Register the next version; AlreadyExists, FailedPrecondition (BLOB_MISSING)."""

    def get_model(self, name: VersionName) -> model_pb.ModelVersion:
        """Return one version; NotFound."""

    def list_models(self, page: Page) -> tuple[list[model_pb.ModelVersion], str]:
        """Return one page and the token of the next (empty: it was the last)."""

    def delete_model(self, request: model_pb.DeleteModelRequest, name: VersionName) -> None:
        """Delete one version (0: all); NotFound, FailedPrecondition (IN_USE, REFERENCED)."""

    def set_pins(self, request: pb.SetPinsRequest) -> None:
        """Replace the pins of a holder; NotFound names what does not exist.

        Or, with ``ended``, let those that it has be deleted by force, and let go of its blobs.
        """

    def pin_holders(self, after: str, limit: int) -> list[str]:
        """Return who holds pins and has not ended, in order, from the first after ``after``."""


class ReferenceStore(Protocol):
    """Which blobs are named by anything that is stored."""

    def verify(self) -> None:
        """Raise DataLoss if what is noted is damaged, so that a name for a blob may be missing."""

    def unreferenced(self, digests: Sequence[str]) -> list[str]:
        """Return those that nothing names; a data set that links a chunk needs no blob of it."""

    def sweep(self, digests: Sequence[str], remove: Callable[[str], int | None]) -> list[int]:
        """Call ``remove`` for those that nothing names; return its results that are not None.

        Raises FailedPrecondition (BACKUP_RUNNING) while somebody holds what a snapshot names.

        No reference can be registered meanwhile: registrations and sweeps exclude each other.
        """

    def reclaim(self) -> None:
        """Give freed space back to the operating system and forget old request ids."""

    def usage_bytes(self) -> int:
        """Return the size of journals, leases, rows and catalog together."""

    def pinned_by(self, holder_prefix: str) -> Sequence[str]:
        """Return the blobs that holders whose names begin so pin."""

    def named_by(self, digest: str) -> Sequence[str]:
        """Return in words who names a blob, some of them where they are many."""


class SnapshotStore(Protocol):
    """All rows at once, for backups."""

    def read(self, tell: Callable[[pb.ReadSnapshotResponse], None]) -> None:
        """Tell all rows as of one moment, and the blobs that they name.

        A message with ``tables`` begins; another one says that reading began anew, and what came
        before it counts for nothing.
        """

    def damaged_rows(self, count: Callable[[int], None]) -> Sequence[str]:
        """Read all rows and say how many they are; return in words which ones are damaged."""

    def is_empty(self) -> bool:
        """Say whether there is no row of what would be in a snapshot."""

    def is_restoring(self) -> bool:
        """Say whether a restore into this place began and did not end."""

    def begin_restore(self) -> None:
        """Remove all rows; until ``end_restore`` the place is not whole, whoever asks."""

    def insert(self, rows: Sequence[pb.SnapshotRow], stride: int) -> None:
        """Write rows of a snapshot; fencing tokens and terms are raised by ``stride``.

        Leases are nobody's then.
        """

    def end_restore(self, stride: int) -> None:
        """Say that what was restored is whole; its history is another one from now on."""


@dataclass(frozen=True)
class Backend:
    """One whole back end; ``name`` is the metrics' label ``backend``."""

    name: str
    blobs: BlobStore
    journals: JournalStore
    leases: LeaseStore
    jobs: JobStore
    catalog: Catalog
    references: ReferenceStore
    snapshots: SnapshotStore
    close: Callable[[], None]
    keep_time: Callable[[], None] = lambda: None
    """To be called every now and then; lets the ages of what is stored go on."""
    check: Callable[[], None] | None = None
    """Raises Unavailable while the servers behind this back end are away, without patience; None:
    there are none."""
