"""Terms and checkpoints of jobs.

Theory of operation ------------------- A job's row holds its *term*. Only the current term may
register parts. A checkpoint is named by (term, step, final); its ranges register their parts in any
order and any number of times. The registration that brings the last part makes the manifest
complete in the same transaction: whoever reads sees either no checkpoint or a whole one, and no
leader is needed.

- A part is registered again without effect if it is equal. An unequal one is a defect of the
  sender: within one term a range has one owner, and its bits are determined.
- Raising the term drops the parts of incomplete checkpoints: they can never become complete.
- Completing a checkpoint drops incomplete ones of the same term that come before it, and later
  parts of those are refused (SUPERSEDED), since checkpoints are taken one at a time and in order.
- A final manifest is the job's success: at most one, and no term after it.
- Where callers prove who they are, a part comes from the owner of its range. Control tells the
  owners of a term in the transaction of the record that says who they are; between that and the
  raise of the term nobody may register.
- Order is (term, step, final): steps go back on a roll-back, terms never do.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from phalanx.errors import Aborted, AlreadyExists, FailedPrecondition, NotFound
from phalanx.keys.caller import Caller, Service
from phalanx.v1 import storage_service_pb2 as pb
from storage.core.keys import check_digest, check_key, invalid

KEEP_DEFAULT = 3
RANGE_LIMIT = 65536
ROOT_STATE_LIMIT_BYTES = 1024 * 1024


class CheckpointKey(NamedTuple):
    """The name of a checkpoint within its job; later checkpoints compare greater."""

    term: int
    step: int
    final: bool


@dataclass(frozen=True)
class JobRow:
    """A job as storage knows it: its term, and its final manifest once it has succeeded."""

    term: int
    final: pb.CheckpointManifest | None = None


@dataclass(frozen=True)
class Registration:
    """What a part's registration leads to.

    ``manifest`` is whole and sealed if ``complete``, else it holds the parts so far. Nothing needs
    to be stored if not ``changed``.
    """

    manifest: pb.CheckpointManifest
    complete: bool
    changed: bool

    def response(self) -> pb.CommitCheckpointResponse:
        """Return the answer to the caller, which holds the manifest only if it is whole."""
        manifest = self.manifest if self.complete else None
        return pb.CommitCheckpointResponse(complete=self.complete, manifest=manifest)


def key_of(message: pb.CheckpointManifest | pb.CommitCheckpointRequest) -> CheckpointKey:
    """Return the name of the checkpoint that the message is about."""
    return CheckpointKey(message.term, message.step, message.final)


def raise_term(row: JobRow | None, request: pb.RaiseTermRequest, history: int = 0) -> JobRow:
    """Return the row with the next term. The first one of a job is beyond ``history``.

    In the history of which a backup was restored, the same job may have had any number of terms
    that the backup does not know of.

    Raises FailedPrecondition (FINAL_CHECKPOINT) after success and Aborted (STALE_TERM) if the term
    is not the expected one.
    """
    check_key(request.job_id, "job_id")
    if request.expected_term < 0:
        raise invalid("expected_term", "write 0 (the job has no row yet) or a term")
    if row is not None and row.final is not None:
        raise _finished(request.job_id, row.final)
    current = 0 if row is None else row.term
    if request.expected_term != current:
        raise _stale_term(request.job_id, request.expected_term, current)
    return JobRow(max(current, history) + 1)


def check_owners(owners: pb.TermOwners) -> None:
    """Raise InvalidArgument if what is told of a term cannot be right."""
    check_key(owners.job_id, "owners.job_id")
    if owners.term < 1:
        raise invalid("owners.term", "terms are counted from 1")
    if len(owners.member_ids) > RANGE_LIMIT:
        raise invalid("owners.member_ids", f"a job has at most {RANGE_LIMIT} ranges")


def check_owner(
    owners: pb.TermOwners | None, request: pb.CommitCheckpointRequest, caller: Caller
) -> None:
    """Raise PermissionDenied unless the caller owns the part's range in the term of the request.

    ``owners`` are those that were told last. Of other terms nothing is known: either the term is
    over, or control of a version that tells no owners has begun it.
    """
    if owners is None or owners.term != request.term:
        return
    index = request.part.range
    owner = owners.member_ids[index] if index < len(owners.member_ids) else ""
    service = Service.WORKER if owners.workers else Service.AGGREGATOR
    what = f"range {index} of job {request.job_id!r} in term {request.term}"
    caller.check_given(service, owner, "part.range", what)


def check_root(owners: pb.TermOwners | None, term: int, caller: Caller, field: str) -> None:
    """Raise PermissionDenied unless the caller owns range 0 of a job that is in this term: what
    comes of tasks is written by that one. Before the owners are told the places of records fence.
    """
    if owners is not None and owners.term == term and owners.member_ids:
        service = Service.WORKER if owners.workers else Service.AGGREGATOR
        what = f"range 0 of job {owners.job_id!r} in term {term}"
        caller.check_given(service, owners.member_ids[0], field, what)


def check_commit(request: pb.CommitCheckpointRequest) -> None:
    """Raise InvalidArgument if the request cannot be right whatever is stored."""
    check_key(request.job_id, "job_id")
    part = request.part
    check_digest(part.digest, "part.digest")
    wrong = {
        "term": request.term < 1,
        "step": request.step < 0,
        "keep": request.keep < 0,
        "range_count": not 0 < request.range_count <= RANGE_LIMIT,
        "part.range": not 0 <= part.range < request.range_count,
        "part.first_element": part.first_element < 0,
        "part.element_count": part.element_count < 1,
        "part.size_bytes": part.size_bytes < 0,
        "part.parameters_offset": part.parameters_offset < 0,
        "part.parameters_length": part.parameters_length < 0
        or part.parameters_offset + part.parameters_length > part.size_bytes,
        "part.best_offset": part.best_offset < 0
        or (part.best_offset > 0 and part.best_offset + part.parameters_length > part.size_bytes),
        "root_state": bool(request.root_state) and part.range != 0,
    }
    for field, is_wrong in wrong.items():
        if is_wrong:
            raise invalid(field, f"out of range for part {part.range} of {request.range_count}")
    if len(request.root_state.encode()) > ROOT_STATE_LIMIT_BYTES:
        raise invalid("root_state", f"more than {ROOT_STATE_LIMIT_BYTES} bytes")


def register_part(
    row: JobRow | None,
    stored: pb.CheckpointManifest | None,
    newest: CheckpointKey | None,
    request: pb.CommitCheckpointRequest,
    blob_bytes: Mapping[str, int],
    now_unix_nanos: int,
) -> Registration:
    """Decide what becomes of one part.

    ``stored`` is the manifest with the request's key, whole or not; ``newest`` the job's newest
    whole checkpoint; ``blob_bytes`` the size of each stored blob among those of the request and of
    ``stored``. Raises NotFound, Aborted (STALE_TERM, SUPERSEDED), FailedPrecondition
    (FINAL_CHECKPOINT, BLOB_MISSING, CHECKPOINT_MISMATCH) or AlreadyExists (PART_CONFLICT).
    """
    if row is None:
        raise NotFound(f"job {request.job_id!r} has no row; raise its term from 0 first")
    if request.term != row.term:
        raise _stale_term(request.job_id, request.term, row.term)
    if stored is not None:
        _check_same_checkpoint(stored, request)
        if _holds_equal_part(stored, request):
            return Registration(stored, bool(stored.manifest_sha256), changed=False)
    if row.final is not None:
        raise _finished(request.job_id, row.final)
    if newest is not None and key_of(request) < newest:
        raise Aborted(
            f"job {request.job_id!r} has a newer checkpoint (step {newest.step}); this part of "
            f"step {request.step} is not needed any more",
            reason="SUPERSEDED",
            details={"step": str(newest.step)},
        )
    _check_blob(request.part, blob_bytes)
    manifest = _with_part(stored, request)
    if len(manifest.parts) < manifest.range_count:
        return Registration(manifest, complete=False, changed=True)
    for part in manifest.parts:
        _check_blob(part, blob_bytes)
    _check_cover(manifest)
    manifest.create_unix_nanos = now_unix_nanos
    return Registration(seal(manifest), complete=True, changed=True)


def checkpoints_to_drop(whole: Sequence[CheckpointKey], keep: int) -> list[CheckpointKey]:
    """Return what retention drops: all but the newest ``keep`` (0: 3) and a final one."""
    kept = sorted(whole)[-(keep or KEEP_DEFAULT) :]
    return [key for key in whole if key not in kept and not key.final]


def seal(manifest: pb.CheckpointManifest) -> pb.CheckpointManifest:
    """Return a copy of the manifest with its checksum set."""
    sealed = pb.CheckpointManifest()
    sealed.CopyFrom(manifest)
    sealed.manifest_sha256 = manifest_checksum(manifest)
    return sealed


def manifest_checksum(manifest: pb.CheckpointManifest) -> str:
    """Return the SHA-256 of the manifest, serialized without its own checksum."""
    bare = pb.CheckpointManifest()
    bare.CopyFrom(manifest)
    bare.ClearField("manifest_sha256")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


def is_intact(manifest: pb.CheckpointManifest, job_id: str, key: CheckpointKey) -> bool:
    """Say whether a stored manifest is the one that was sealed under this name."""
    right_place = manifest.job_id == job_id and key_of(manifest) == key
    return right_place and manifest.manifest_sha256 == manifest_checksum(manifest)


def _check_same_checkpoint(
    stored: pb.CheckpointManifest, request: pb.CommitCheckpointRequest
) -> None:
    for field in ("range_count", "spec_sha256"):
        if getattr(stored, field) != getattr(request, field):
            raise FailedPrecondition(
                f"the parts of step {request.step} of job {request.job_id!r} do not agree: {field} "
                f"is {getattr(stored, field)!r} in the first part and {getattr(request, field)!r} "
                f"in part {request.part.range}",
                reason="CHECKPOINT_MISMATCH",
                details={"field": field},
            )


def _holds_equal_part(stored: pb.CheckpointManifest, request: pb.CommitCheckpointRequest) -> bool:
    for part in stored.parts:
        if part.range == request.part.range:
            if part == request.part and (part.range or stored.root_state == request.root_state):
                return True
            raise AlreadyExists(
                f"part {part.range} of step {request.step} of job {request.job_id!r} is registered "
                "with other content; a range has one owner and one content per term",
                reason="PART_CONFLICT",
            )
    return False


def _with_part(
    stored: pb.CheckpointManifest | None, request: pb.CommitCheckpointRequest
) -> pb.CheckpointManifest:
    manifest = pb.CheckpointManifest(
        job_id=request.job_id,
        term=request.term,
        step=request.step,
        final=request.final,
        range_count=request.range_count,
        spec_sha256=request.spec_sha256,
        root_state=request.root_state or (stored.root_state if stored else ""),
    )
    parts = [*(stored.parts if stored else ()), request.part]
    manifest.parts.extend(sorted(parts, key=lambda part: part.range))
    return manifest


def _check_blob(part: pb.CheckpointPart, blob_bytes: Mapping[str, int]) -> None:
    size_bytes = blob_bytes.get(part.digest)
    if size_bytes is None:
        raise FailedPrecondition(
            f"blob {part.digest} of part {part.range} is not stored; put it and register again",
            reason="BLOB_MISSING",
            details={"digest": part.digest},
        )
    if size_bytes != part.size_bytes:
        raise FailedPrecondition(
            f"blob {part.digest} of part {part.range} has {size_bytes} bytes, "
            f"not {part.size_bytes}",
            reason="CHECKPOINT_MISMATCH",
            details={"field": "part.size_bytes"},
        )


def _check_cover(manifest: pb.CheckpointManifest) -> None:
    next_element = 0
    for part in manifest.parts:
        if part.first_element != next_element:
            raise FailedPrecondition(
                f"part {part.range} of step {manifest.step} of job {manifest.job_id!r} begins "
                f"at element {part.first_element}, the parts before it end at {next_element}",
                reason="CHECKPOINT_MISMATCH",
                details={"field": "part.first_element"},
            )
        next_element += part.element_count
        if bool(part.best_offset) != bool(manifest.parts[0].best_offset):
            raise FailedPrecondition(
                f"the parts of step {manifest.step} of job {manifest.job_id!r} do not agree: only "
                "some hold the parameters of an evaluation before",
                reason="CHECKPOINT_MISMATCH",
                details={"field": "part.best_offset"},
            )


def _stale_term(job_id: str, term: int, current: int) -> Aborted:
    return Aborted(
        f"job {job_id!r} is in term {current}, not {term}: what belongs to another term is refused",
        reason="STALE_TERM",
        details={"job_id": job_id, "term": str(current)},
    )


def _finished(job_id: str, final: pb.CheckpointManifest) -> FailedPrecondition:
    return FailedPrecondition(
        f"job {job_id!r} has succeeded: its final checkpoint is complete at step {final.step}",
        reason="FINAL_CHECKPOINT",
        details={"job_id": job_id, "term": str(final.term), "step": str(final.step)},
    )
