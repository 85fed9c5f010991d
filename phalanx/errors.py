"""Every error that Phalanx raises on purpose.

PhalanxError
├── InvalidArgument      the request is wrong whatever the state of the cluster
├── NotFound             the named thing does not exist
├── AlreadyExists        the name, or the request id, is taken by something else
├── FailedPrecondition   right request, wrong state; do something else first
├── Aborted              a fence refused it: stale term or generation, lost compare-and-set
├── ResourceExhausted    a quota, a bound, the disk or the memory is used up
├── PermissionDenied     known caller, not allowed
├── Unauthenticated      unknown caller
├── Unavailable          try again later; nothing was done, or doing it twice is harmless
├── Unimplemented        asked for something that this version does not carry out
├── DeadlineExceeded     time ran out; it may or may not have happened
├── Cancelled            the caller gave up
├── DataLoss             stored bytes are not the bytes that were written
└── Internal             a defect in Phalanx

IncompleteWarning is none: what it is about was answered, and may not be all.

Each class is the gRPC status of the same name (see ``phalanx.rpc.status``), but nothing here
imports gRPC, so that the pure cores can raise them. A message says what happened, where, and what
to do next; it is shown to users as it is and therefore holds no secret, no path of a server and no
traceback.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar


class Code(StrEnum):
    """What kind of error it is; the names are those of the gRPC status codes."""

    CANCELLED = "CANCELLED"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    DATA_LOSS = "DATA_LOSS"
    UNAUTHENTICATED = "UNAUTHENTICATED"


@dataclass(frozen=True)
class Violation:
    """One wrong field of a request.

    ``field`` is its path (``train.optimizer.adam.learning_rate``), ``line`` the line of the file it
    came from, counted from 1, where there is a file.
    """

    field: str
    message: str
    line: int | None = None


class PhalanxError(Exception):
    """Base of all errors above; raise one of the subclasses.

    ``reason`` is an UPPER_SNAKE_CASE word for programs (``STALE_TERM``), by default the code
    itself. ``retry_after_s`` is how long a client should wait before it tries again. ``details``
    are further facts for programs (``{"current_term": "3"}``); all of it crosses the wire.
    """

    code: ClassVar[Code] = Code.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        violations: Iterable[Violation] = (),
        retry_after_s: float | None = None,
        details: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.code.value
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s
        self.details = dict(details or {})

    def __str__(self) -> str:
        return self.message


class Cancelled(PhalanxError):
    """The caller gave up."""

    code = Code.CANCELLED


class InvalidArgument(PhalanxError):
    """The request is wrong in any state of the cluster; ``violations`` name the wrong fields."""

    code = Code.INVALID_ARGUMENT


class DeadlineExceeded(PhalanxError):
    """Time ran out; the call may or may not have had its effect."""

    code = Code.DEADLINE_EXCEEDED


class NotFound(PhalanxError):
    """The named thing does not exist."""

    code = Code.NOT_FOUND


class AlreadyExists(PhalanxError):
    """The name, or the request id, already stands for something else."""

    code = Code.ALREADY_EXISTS


class PermissionDenied(PhalanxError):
    """The caller is known and not allowed to do this."""

    code = Code.PERMISSION_DENIED


class ResourceExhausted(PhalanxError):
    """A quota, a bound, the disk or the memory is used up."""

    code = Code.RESOURCE_EXHAUSTED


class FailedPrecondition(PhalanxError):
    """The request is right, but not in the present state."""

    code = Code.FAILED_PRECONDITION


class Aborted(PhalanxError):
    """A fence refused it: a stale term or generation, or a lost compare-and-set."""

    code = Code.ABORTED


class Unimplemented(PhalanxError):
    """This version does not carry it out; ``violations`` name the fields."""

    code = Code.UNIMPLEMENTED


class Internal(PhalanxError):
    """A defect in Phalanx."""

    code = Code.INTERNAL


class Unavailable(PhalanxError):
    """Try again after ``retry_after_s``."""

    code = Code.UNAVAILABLE

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        violations: Iterable[Violation] = (),
        retry_after_s: float | None = 1.0,
        details: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            message,
            reason=reason,
            violations=violations,
            retry_after_s=retry_after_s,
            details=details,
        )


class DataLoss(PhalanxError):
    """Stored bytes are not the bytes that were written."""

    code = Code.DATA_LOSS


class Unauthenticated(PhalanxError):
    """The caller is unknown."""

    code = Code.UNAUTHENTICATED


ERROR_OF_CODE: Mapping[Code, type[PhalanxError]] = {
    error.code: error
    for error in (
        Cancelled,
        InvalidArgument,
        DeadlineExceeded,
        NotFound,
        AlreadyExists,
        PermissionDenied,
        ResourceExhausted,
        FailedPrecondition,
        Aborted,
        Unimplemented,
        Internal,
        Unavailable,
        DataLoss,
        Unauthenticated,
    )
}
"""The class of each code."""


class IncompleteWarning(UserWarning):
    """What was listed may lack something: control is cut off from storage, and does not know
    whether another control process leads and knows of more."""


def passes_by_itself(error: Exception) -> bool:
    """Return whether the same call may succeed later although nobody does anything else.

    So it is with servers that are away, slow or overloaded, and with a full disk: what is used up
    says with ``retry_after_s`` that it is worth another try.
    """
    if isinstance(error, ResourceExhausted):
        return error.retry_after_s is not None
    return isinstance(error, Unavailable | DeadlineExceeded)


def no_job(job_id: str, field: str = "") -> NotFound:
    """Return the error for a job that does not exist, or does not any more, or is not for you.

    ``field`` is that of the request which names it, where it names more.
    """
    text = f"there is no job {job_id[:100]!r}; `phalanx jobs` shows what there is"
    violations = [Violation(field, text)] if field else []
    return NotFound(text, reason="JOB_NOT_FOUND", violations=violations)
