"""The embedded back end: SQLite for what is small, a directory for blobs."""

import time
from collections.abc import Callable
from pathlib import Path

from phalanx.errors import PhalanxError
from storage.backends.directory_blobs import DirectoryBlobs
from storage.backends.file_system import THIS_MACHINE, FileSystem
from storage.backends.files import StateFolder
from storage.backends.folder_owner import demand_no_owner
from storage.backends.sql import home
from storage.backends.sql.catalog import SqlCatalog
from storage.backends.sql.jobs import SqlJobs
from storage.backends.sql.journals import SqlJournals
from storage.backends.sql.leases import SqlLeases
from storage.backends.sql.references import SqlReferences
from storage.backends.sql.snapshots import SqlSnapshots
from storage.backends.sqlite.database import LOG_NAME, LOG_PAGES, Database, ignore
from storage.interfaces import Backend, BytesQuota


def open_embedded_backend(
    folder: Path,
    *,
    reserve_bytes: int = 0,
    namespace_bytes_max: BytesQuota = 0,
    on_corruption: Callable[[str], None] = ignore,
    on_failure: Callable[[PhalanxError], None] = ignore,
    now_unix_nanos: Callable[[], int] = time.time_ns,
    disk: FileSystem = THIS_MACHINE,
    log_pages: int = LOG_PAGES,
) -> Backend:
    """Open, and make if it is new, the state folder; it is this process's until ``close``.

    ``on_corruption`` hears of manifests that were skipped because they are damaged; ``on_failure``
    is called when the disk failed so that the process must end. SQLite does not use ``disk``, and
    copies its log into the database whenever that has ``log_pages`` pages. Raises
    FailedPrecondition (STATE_IN_USE, STATE_UNUSABLE, STATE_TOO_NEW, BLOBS_ELSEWHERE).
    """
    state = StateFolder(folder, disk)
    blobs: DirectoryBlobs | None = None
    database: Database | None = None
    try:
        demand_no_owner(state, disk)
        state.spend_spare()
        blobs = DirectoryBlobs(state.fd, reserve_bytes=reserve_bytes, disk=disk)
        database = _open_database(state, on_failure, on_corruption, log_pages)
        home.demand_homeless(database)
        # It removes what a registration that was broken off left behind, and so may fail.
        catalog = SqlCatalog(database, blobs, now_unix_nanos, namespace_bytes_max)
    except BaseException:
        if database is not None:
            database.close()
        if blobs is not None:
            blobs.close()
        state.close()
        raise

    def close() -> None:
        database.close()
        blobs.close()
        state.close()

    return Backend(
        name="embedded",
        blobs=blobs,
        journals=SqlJournals(database),
        leases=SqlLeases(database, now_unix_nanos),
        jobs=SqlJobs(database, blobs, now_unix_nanos, on_corruption),
        catalog=catalog,
        references=SqlReferences(database, now_unix_nanos),
        snapshots=SqlSnapshots(database),
        close=close,
    )


def open_embedded_database(
    state: StateFolder,
    on_failure: Callable[[PhalanxError], None],
    on_corruption: Callable[[str], None],
) -> Database:
    """Open only the database of a state folder; blobs are elsewhere."""
    state.spend_spare()
    return _open_database(state, on_failure, on_corruption, LOG_PAGES)


def _open_database(
    state: StateFolder,
    on_failure: Callable[[PhalanxError], None],
    on_corruption: Callable[[str], None],
    log_pages: int,
) -> Database:
    state.write_again(LOG_NAME)
    database = Database(state.path, on_failure, on_corruption, log_pages=log_pages)
    try:
        # SQLite does so too, and ignores it if that fails.
        state.sync()
        state.set_spare_aside()
    except BaseException:
        database.close()
        raise
    return database


__all__ = ["open_embedded_backend", "open_embedded_database"]
