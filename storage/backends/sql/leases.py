"""Leases."""

from collections.abc import Callable

from phalanx.v1 import storage_service_pb2 as pb
from storage.backends.sql.connection import Connection, Database
from storage.backends.sql.requests import once
from storage.backends.sql.rows import LEASES
from storage.core import leases
from storage.core.keys import check_stream, check_word
from storage.core.leases import LeaseRow
from storage.core.snapshots import HISTORY_LEASE


def load_lease(connection: Connection, name: str) -> LeaseRow | None:
    """Return the lease's row, or None."""
    row = LEASES.find(connection, name)
    return None if row is None else LeaseRow(*row[1:])


def load_history(connection: Connection) -> int:
    """Return which history of storage this is."""
    row = load_lease(connection, HISTORY_LEASE)
    return 0 if row is None else row.token


def check_request_fence(
    connection: Connection,
    request: pb.AppendJournalRequest
    | pb.TruncateJournalRequest
    | pb.DeleteJournalRequest
    | pb.RaiseTermRequest
    | pb.DeleteJobRowRequest
    | pb.SetPinsRequest,
) -> None:
    """Raise Aborted (STALE_GENERATION) if the request's fence is there and not current."""
    if request.HasField("fence"):
        leases.check_fence(load_lease(connection, request.fence.lease), request.fence)


class SqlLeases:
    """A LeaseStore."""

    def __init__(self, database: Database, now_unix_nanos: Callable[[], int]) -> None:
        self._database = database
        self._now_unix_nanos = now_unix_nanos

    def acquire(self, request: pb.AcquireLeaseRequest) -> pb.AcquireLeaseResponse:
        """Take a lease if the rules allow it."""
        leases.check_acquire(request)

        def decide(connection: Connection) -> pb.AcquireLeaseResponse:
            result = leases.acquire(load_lease(connection, request.name), request)
            if result.acquired:
                _store(connection, request.name, result.row)
            return pb.AcquireLeaseResponse(
                acquired=result.acquired,
                lease=result.row.message(request.name),
                lost_holder=result.lost_holder,
                history=load_history(connection) if result.acquired else None,
            )

        def act(connection: Connection) -> pb.AcquireLeaseResponse:
            # Only what was granted is remembered: followers ask all the time.
            granted = once(
                request,
                request.request_id,
                pb.AcquireLeaseResponse,
                decide,
                lambda: self._now_unix_nanos() / 1e9,
                remembers=lambda response: response.acquired,
            )(connection)
            row = load_lease(connection, request.name)
            held = row is not None and row.message(request.name) == granted.lease
            # A grant that is over by now is no answer any more.
            return granted if held or not granted.acquired else decide(connection)

        return self._database.write(act)

    def renew(self, request: pb.RenewLeaseRequest) -> LeaseRow:
        """Raise the counter of a held lease."""
        check_stream(request.name, "name")

        def act(connection: Connection) -> LeaseRow:
            row = leases.renew(load_lease(connection, request.name), request)
            _store(connection, request.name, row)
            return row

        return self._database.write(act)

    def release(self, request: pb.ReleaseLeaseRequest) -> None:
        """Free the lease if it is still held so."""
        check_stream(request.name, "name")
        check_word(request.holder, "holder")

        def act(connection: Connection) -> None:
            row = leases.release(load_lease(connection, request.name), request)
            if row is not None:
                _store(connection, request.name, row)

        self._database.write(act)

    def get(self, name: str) -> LeaseRow | None:
        """Return the lease."""
        check_stream(name, "name")
        return self._database.read(lambda connection: load_lease(connection, name))


def _store(connection: Connection, name: str, row: LeaseRow) -> None:
    sealed = LEASES.sealed(name, row.holder, row.token, row.counter)
    connection.execute(LEASES.replacement, sealed)
