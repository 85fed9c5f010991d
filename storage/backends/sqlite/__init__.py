"""The embedded back end: SQLite for what is small, a directory for blobs."""

import time
from collections.abc import Callable
from pathlib import Path

from phalanx.errors import PhalanxError
from storage.backends.directory_blobs import DirectoryBlobs
from storage.backends.file_system import THIS_MACHINE, FileSystem
from storage.backends.files import StateFolder
from storage.backends.sqlite.catalog import SqliteCatalog
from storage.backends.sqlite.database import LOG_NAME, LOG_PAGES, Database, ignore
from storage.backends.sqlite.jobs import SqliteJobs
from storage.backends.sqlite.journals import SqliteJournals
from storage.backends.sqlite.leases import SqliteLeases
from storage.backends.sqlite.references import SqliteReferences
from storage.interfaces import Backend


def open_embedded_backend(
    folder: Path,
    *,
    reserve_bytes: int = 0,
    namespace_bytes_max: int = 0,
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
    FailedPrecondition (STATE_IN_USE, STATE_UNUSABLE, STATE_TOO_NEW).
    """
    state = StateFolder(folder, disk)
    blobs: DirectoryBlobs | None = None
    database: Database | None = None
    try:
        state.spend_spare()
        blobs = DirectoryBlobs(state.fd, reserve_bytes=reserve_bytes, disk=disk)
        state.write_again(LOG_NAME)
        database = Database(folder, on_failure, on_corruption, log_pages=log_pages)
        # SQLite does so too, and ignores it if that fails.
        state.sync()
        # It removes what a registration that was broken off left behind, and so may fail.
        catalog = SqliteCatalog(database, blobs, now_unix_nanos, namespace_bytes_max)
        state.set_spare_aside()
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
        journals=SqliteJournals(database),
        leases=SqliteLeases(database, now_unix_nanos),
        jobs=SqliteJobs(database, blobs, now_unix_nanos, on_corruption),
        catalog=catalog,
        references=SqliteReferences(database, now_unix_nanos),
        close=close,
    )


__all__ = ["open_embedded_backend"]
