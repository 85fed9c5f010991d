"""Who owns the ranges of a job in its term, as control told it last.

Kept beside the jobs and not in them: replicas of a version that knows no owners go on raising
terms meanwhile, and a row of an older term says nothing of the newer one.
"""

from google.protobuf.message import DecodeError

from phalanx.errors import DataLoss
from phalanx.v1 import storage_service_pb2 as pb
from storage.backends.sql.connection import Connection
from storage.backends.sql.rows import JOBS, TERM_OWNERS


def load_owners(connection: Connection, job_id: str) -> pb.TermOwners | None:
    """Return the owners; None: none were ever told. Raises DataLoss (ROW_CORRUPT)."""
    row = TERM_OWNERS.find(connection, job_id)
    if row is None:
        return None
    try:
        return pb.TermOwners.FromString(row[2])
    except DecodeError:
        raise DataLoss(
            f"the owners of job {job_id!r} cannot be read; restore storage from a backup",
            reason="ROW_CORRUPT",
        ) from None


def store_owners(connection: Connection, owners: pb.TermOwners) -> None:
    """Note the owners of a term, if the job is in it."""
    row = JOBS.find(connection, owners.job_id)
    if row is not None and int(row[1]) == owners.term:
        content = owners.SerializeToString(deterministic=True)
        sealed = TERM_OWNERS.sealed(owners.job_id, owners.term, content)
        connection.execute(TERM_OWNERS.replacement, sealed)


def drop_owners(connection: Connection, job_id: str) -> None:
    """Forget a job's owners."""
    connection.execute("DELETE FROM term_owners WHERE job_id = ?", (job_id,))
