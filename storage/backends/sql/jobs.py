"""Terms and checkpoints of jobs."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from google.protobuf.message import DecodeError

from phalanx.errors import DataLoss, NotFound
from phalanx.keys.caller import ANYBODY, Caller
from phalanx.v1 import storage_service_pb2 as pb
from storage.backends.sql.connection import Connection, Database
from storage.backends.sql.leases import check_request_fence, load_history
from storage.backends.sql.owners import drop_owners, load_owners, store_owners
from storage.backends.sql.references import add_references, drop_references
from storage.backends.sql.rows import CHECKPOINTS, JOBS, next_id
from storage.core import checkpoints
from storage.core.checkpoints import CheckpointKey, JobRow, manifest_checksum
from storage.core.keys import check_key
from storage.interfaces import BlobStore

_KIND = "checkpoint"


class _Stored(NamedTuple):
    id: int
    key: CheckpointKey
    whole: bool
    manifest: bytes
    intact: bool


class SqlJobs:
    """A JobStore.

    ``now_unix_nanos`` reads the wall clock; ``on_corruption`` hears of manifests that were skipped
    because their checksum is wrong.
    """

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        now_unix_nanos: Callable[[], int],
        on_corruption: Callable[[str], None],
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._now_unix_nanos = now_unix_nanos
        self._on_corruption = on_corruption

    def raise_term(self, request: pb.RaiseTermRequest) -> int:
        """Return the new term."""

        def act(connection: Connection) -> int:
            check_request_fence(connection, request)
            row = _load_row(connection, request.job_id)
            history = load_history(connection) if row is None else 0
            row = checkpoints.raise_term(row, request, history)
            connection.execute(JOBS.replacement, JOBS.sealed(request.job_id, row.term))
            if request.tells_owners:
                store_owners(connection, pb.TermOwners(job_id=request.job_id, term=row.term))
            for stored in _load_all(connection, request.job_id):
                if stored.intact and not stored.whole:
                    _drop(connection, request.job_id, stored.id)
            return row.term

        return self._database.write(act)

    def get_row(self, job_id: str) -> pb.GetJobRowResponse:
        """Return term and final checkpoint."""
        check_key(job_id, "job_id")
        row = self._database.read(lambda connection: _load_row(connection, job_id))
        if row is None:
            raise NotFound(f"job {job_id!r} has no row")
        return pb.GetJobRowResponse(term=row.term, final_checkpoint=row.final)

    def commit(
        self, request: pb.CommitCheckpointRequest, caller: Caller = ANYBODY
    ) -> pb.CommitCheckpointResponse:
        """Register one part, and complete the checkpoint if it is the last."""
        checkpoints.check_commit(request)

        def act(connection: Connection) -> pb.CommitCheckpointResponse:
            job_id = request.job_id
            if not caller.open_cluster:
                checkpoints.check_owner(load_owners(connection, job_id), request, caller)
            stored = _load_all(connection, job_id)
            at_key = next((s for s in stored if s.key == checkpoints.key_of(request)), None)
            manifest = self._open(job_id, at_key) if at_key else None
            parts = [request.part, *(manifest.parts if manifest else ())]
            registration = checkpoints.register_part(
                _load_row(connection, job_id),
                manifest,
                max((s.key for s in stored if s.whole and s.intact), default=None),
                request,
                self._blobs.sizes([part.digest for part in parts]),
                self._now_unix_nanos(),
            )
            if registration.changed:
                _store(connection, registration.manifest, registration.complete)
            if registration.changed and registration.complete:
                _retain(connection, request)
            return registration.response()

        return self._database.write(act)

    def check_root(self, job_id: str, caller: Caller, field: str) -> None:
        """Raise PermissionDenied where another one than the caller owns range 0 of the job."""

        def act(connection: Connection) -> None:
            row = JOBS.find(connection, job_id)
            if row is not None:
                owners = load_owners(connection, job_id)
                checkpoints.check_root(owners, int(row[1]), caller, field)

        self._database.read(act)

    def list_checkpoints(self, job_id: str) -> Sequence[pb.CheckpointManifest]:
        """Return the whole checkpoints with right checksums, newest first."""
        check_key(job_id, "job_id")
        stored = self._database.read(lambda connection: _load_all(connection, job_id))
        stored.sort(key=lambda row: row.key, reverse=True)
        opened = [self._open(job_id, row) for row in stored if row.whole or not row.intact]
        return [manifest for manifest in opened if manifest is not None]

    def delete_row(self, request: pb.DeleteJobRowRequest) -> None:
        """Remove a job's row, checkpoints and pins."""
        check_key(request.job_id, "job_id")

        def act(connection: Connection) -> None:
            check_request_fence(connection, request)
            drop_references(connection, _KIND, request.job_id)
            drop_references(connection, "pin", request.job_id)
            drop_owners(connection, request.job_id)
            for statement in (
                "DELETE FROM pins WHERE holder = ?",
                "DELETE FROM checkpoints WHERE job_id = ?",
                "DELETE FROM jobs WHERE job_id = ?",
            ):
                connection.execute(statement, (request.job_id,))

        self._database.write(act)

    def _open(self, job_id: str, stored: _Stored) -> pb.CheckpointManifest | None:
        """Return the manifest, or None after reporting that it is corrupt."""
        manifest = _parse(stored.manifest)
        if (
            manifest is not None
            and stored.intact
            and (not stored.whole or checkpoints.is_intact(manifest, job_id, stored.key))
        ):
            return manifest
        self._on_corruption(
            f"the manifest of checkpoint {tuple(stored.key)} of job {job_id} is not the one stored"
        )
        return None


def _load_row(connection: Connection, job_id: str) -> JobRow | None:
    row = JOBS.find(connection, job_id)
    if row is None:
        return None
    term = int(row[1])
    stored = _load_all(connection, job_id)
    final = next((s for s in stored if _is_final(s)), None)
    if final is None:
        return JobRow(term)
    manifest = _parse(final.manifest)
    if (
        manifest is None
        or not final.intact
        or not checkpoints.is_intact(manifest, job_id, final.key)
    ):
        raise DataLoss(
            f"the final manifest of job {job_id!r} does not match its checksum; restore storage "
            "from a backup",
            reason="MANIFEST_CORRUPT",
        )
    return JobRow(term, manifest)


def _is_final(stored: _Stored) -> bool:
    """Say whether a row is about the job's success; of a damaged one, half may be right."""
    if stored.intact:
        return stored.whole and stored.key.final
    manifest = _parse(stored.manifest)
    if manifest is not None and manifest.manifest_sha256 == manifest_checksum(manifest):
        return manifest.final
    return stored.key.final


def _load_all(connection: Connection, job_id: str) -> list[_Stored]:
    rows = connection.execute(
        "SELECT id, term, step, final, whole, manifest, checksum FROM checkpoints WHERE job_id = ?",
        (job_id,),
    )
    return [
        _Stored(
            row_id,
            CheckpointKey(term, step, bool(final)),
            bool(whole),
            manifest,
            CHECKPOINTS.checksum((job_id, term, step, final, row_id, whole, manifest)) == checksum,
        )
        for row_id, term, step, final, whole, manifest, checksum in rows
    ]


def _parse(data: bytes) -> pb.CheckpointManifest | None:
    manifest = pb.CheckpointManifest()
    try:
        manifest.ParseFromString(data)
    except DecodeError:
        return None
    return manifest


def _store(connection: Connection, manifest: pb.CheckpointManifest, whole: bool) -> None:
    key = checkpoints.key_of(manifest)
    row = connection.execute(
        "SELECT id FROM checkpoints WHERE job_id = ? AND term = ? AND step = ? AND final = ?",
        (manifest.job_id, key.term, key.step, int(key.final)),
    ).fetchone()
    if row is not None:
        _drop(connection, manifest.job_id, row[0])
    row_id = next_id(connection, CHECKPOINTS.name)
    sealed = CHECKPOINTS.sealed(
        manifest.job_id,
        *(key.term, key.step, int(key.final), row_id, int(whole)),
        manifest.SerializeToString(deterministic=True),
    )
    connection.execute(CHECKPOINTS.insertion, sealed)
    digests = [part.digest for part in manifest.parts]
    add_references(connection, _KIND, manifest.job_id, row_id, digests)


def _retain(connection: Connection, request: pb.CommitCheckpointRequest) -> None:
    """Drop older unfinished checkpoints and whole ones beyond ``keep``."""
    stored = [row for row in _load_all(connection, request.job_id) if row.intact]
    completed = checkpoints.key_of(request)
    superfluous = set(
        checkpoints.checkpoints_to_drop([s.key for s in stored if s.whole], request.keep)
    )
    for row in stored:
        if row.key in superfluous or (not row.whole and row.key < completed):
            _drop(connection, request.job_id, row.id)


def _drop(connection: Connection, job_id: str, row_id: int) -> None:
    connection.execute("DELETE FROM checkpoints WHERE id = ?", (row_id,))
    drop_references(connection, _KIND, job_id, row_id)
