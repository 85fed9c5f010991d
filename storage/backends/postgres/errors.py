"""What becomes of an error of PostgreSQL."""

import psycopg
from psycopg import errors
from psycopg_pool import PoolTimeout

from phalanx.errors import DataLoss, Internal, PhalanxError, ResourceExhausted, Unavailable

_PASSING = (
    psycopg.OperationalError,
    errors.IdleInTransactionSessionTimeout,
    errors.TransactionTimeout,
)
_TIME_RAN_OUT = (PoolTimeout, errors.QueryCanceled)
_FULL = (errors.DiskFull, errors.OutOfMemory)
_CORRUPT = (errors.DataCorrupted, errors.IndexCorrupted)


def passes(error: Exception) -> bool:
    """Say whether trying again on another connection may help."""
    return isinstance(error, _PASSING) and not isinstance(error, _FULL)


def was_waited_for(error: Exception) -> bool:
    """Say whether all the time until this error was spent on waiting for the database."""
    return isinstance(error, _TIME_RAN_OUT)


def translated(error: Exception) -> PhalanxError:
    """Return what callers see of it."""
    if isinstance(error, PhalanxError):
        return error
    if isinstance(error, errors.DiskFull):
        return ResourceExhausted(
            "the disk of the database is full; nothing was stored: free space, or delete jobs, "
            "models or data sets and collect garbage; storage goes on by itself",
            reason="DISK_FULL",
            retry_after_s=1.0,
        )
    if isinstance(error, _CORRUPT):
        return DataLoss(
            f"the database of the storage service is damaged; restore it from a backup ({error})",
            reason="DATABASE_CORRUPT",
        )
    if isinstance(error, _PASSING):
        return unreachable(str(error).strip().partition("\n")[0])
    return Internal(f"the database refused a statement: {error}", reason="DATABASE_ERROR")


def unreachable(why: str) -> Unavailable:
    """Return the error for a database that does not answer."""
    return Unavailable(
        f"the database of the storage service cannot be reached ({why}); try again",
        reason="DATABASE_UNREACHABLE",
        retry_after_s=1.0,
    )
