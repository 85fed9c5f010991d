"""Opens the back end that a configuration asks for.

Rows are in SQLite in the state folder, or in PostgreSQL; blobs are in the state folder, or in an
object store. What is not the embedded default is imported only here, where it is asked for.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phalanx.errors import FailedPrecondition, PhalanxError, Unavailable
from storage.backends.directory_blobs import DirectoryBlobs
from storage.backends.files import StateFolder
from storage.backends.folder_owner import FolderOwner
from storage.backends.object_blobs import ObjectBlobs
from storage.backends.sql import home
from storage.backends.sql.catalog import SqlCatalog
from storage.backends.sql.connection import Database
from storage.backends.sql.elapsed import SqlElapsed
from storage.backends.sql.jobs import SqlJobs
from storage.backends.sql.journals import SqlJournals
from storage.backends.sql.leases import SqlLeases
from storage.backends.sql.links import SqlLinks
from storage.backends.sql.references import SqlReferences
from storage.backends.sql.snapshots import SqlSnapshots
from storage.backends.sqlite import open_embedded_backend, open_embedded_database
from storage.backends.sqlite.database import ignore
from storage.interfaces import Backend, BlobStore, BytesQuota

if TYPE_CHECKING:
    from storage.backends.postgres.database import PostgresDatabase
    from storage.backends.s3 import S3Objects


@dataclass(frozen=True)
class Places:
    """Where a back end keeps what: an empty URL stands for the state folder."""

    state: Path | None = None
    metadata_url: str = ""
    blobs_url: str = ""


def open_backend(
    places: Places,
    *,
    reserve_bytes: int = 0,
    namespace_bytes_max: BytesQuota = 0,
    on_corruption: Callable[[str], None] = ignore,
    on_failure: Callable[[PhalanxError], None] = ignore,
    now_unix_nanos: Callable[[], int] = time.time_ns,
    clock_s: Callable[[], float] = time.monotonic,
) -> Backend:
    """Open a back end; what its arguments mean is said at ``open_embedded_backend``.

    ``clock_s`` is a monotonic clock. Raises FailedPrecondition (STATE_IN_USE, STATE_UNUSABLE,
    STATE_TOO_NEW, BLOBS_ELSEWHERE, EXTRA_MISSING).
    """
    if not places.metadata_url and not places.blobs_url:
        return open_embedded_backend(
            _state(places),
            reserve_bytes=reserve_bytes,
            namespace_bytes_max=namespace_bytes_max,
            on_corruption=on_corruption,
            on_failure=on_failure,
            now_unix_nanos=now_unix_nanos,
        )
    with ExitStack() as opened:
        folder: StateFolder | None = None
        if not places.metadata_url or not places.blobs_url:
            folder = StateFolder(_state(places))
            opened.callback(folder.close)
        database: Database
        checks: list[Callable[[], object]] = []
        if places.metadata_url:
            postgres = open_postgres(places.metadata_url)
            opened.callback(postgres.close)
            checks.append(postgres.check)
            database = postgres
        else:
            assert folder is not None
            sqlite = open_embedded_database(folder, on_failure, on_corruption)
            opened.callback(sqlite.close)
            database = sqlite
        elapsed = SqlElapsed(database, clock_s)
        housekeeping = [elapsed.advance]
        blobs: BlobStore
        if places.blobs_url:
            objects = open_objects(places.blobs_url)
            checks.append(objects.owner)
            _settle(database, objects)
            blobs = in_objects = ObjectBlobs(objects, database, elapsed)
            housekeeping.append(in_objects.purge)
        else:
            assert folder is not None
            home.settle(database, FolderOwner(folder))
            blobs = directory = DirectoryBlobs(folder.fd, reserve_bytes=reserve_bytes)
            opened.callback(directory.close)
        links = SqlLinks(database, elapsed)
        housekeeping.append(links.drop_abandoned)
        return Backend(
            name=backend_name(places),
            blobs=blobs,
            journals=SqlJournals(database),
            leases=SqlLeases(database, now_unix_nanos),
            jobs=SqlJobs(database, blobs, now_unix_nanos, on_corruption),
            catalog=SqlCatalog(database, blobs, now_unix_nanos, namespace_bytes_max, links),
            references=SqlReferences(database, now_unix_nanos, housekeeping),
            snapshots=SqlSnapshots(database),
            keep_time=elapsed.advance,
            close=opened.pop_all().close,
            check=lambda: _call_all(checks),
        )


def _call_all(checks: Sequence[Callable[[], object]]) -> None:
    for check in checks:
        check()


def open_postgres(url: str) -> "PostgresDatabase":
    """Open a database by its URL; FailedPrecondition (EXTRA_MISSING) without its extra."""
    try:
        from storage.backends.postgres.database import PostgresDatabase
    except ModuleNotFoundError as error:
        raise _missing("PostgreSQL", "postgres", error) from error
    return PostgresDatabase(url)


def open_objects(url: str) -> "S3Objects":
    """Open an object store by its URL; FailedPrecondition (EXTRA_MISSING) without its extra."""
    try:
        from storage.backends.s3 import open_s3
    except ModuleNotFoundError as error:
        raise _missing("an object store", "s3", error) from error
    return open_s3(url)


def _settle(database: Database, objects: "S3Objects") -> None:
    try:
        home.settle(database, objects)
    except Unavailable as error:
        # At the start, whoever started it is told; what runs waits for it to come back.
        raise FailedPrecondition(error.message, reason="STATE_UNUSABLE") from error


def backend_name(places: Places) -> str:
    """Return the label of the metrics."""
    rows = "postgres" if places.metadata_url else "sqlite"
    blobs = "s3" if places.blobs_url else "directory"
    return "embedded" if (rows, blobs) == ("sqlite", "directory") else f"{rows}+{blobs}"


def _state(places: Places) -> Path:
    if places.state is None:
        raise FailedPrecondition("storage needs a state folder", reason="STATE_UNUSABLE")
    return places.state


def _missing(what: str, extra: str, error: ModuleNotFoundError) -> FailedPrecondition:
    return FailedPrecondition(
        f"storage in {what} needs the extra {extra!r}: pip install 'phalanx[{extra}]' ({error})",
        reason="EXTRA_MISSING",
    )
