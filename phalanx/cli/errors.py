"""Exit codes, and how an error is told to people and to programs."""

import errno
import json
import re
import sys
from enum import IntEnum

from phalanx.errors import ERROR_OF_CODE, Code, PhalanxError, Violation
from phalanx.texts import number_of


class Exit(IntEnum):
    """What the exit code says. It is a contract: scripts rely on it."""

    DONE = 0
    JOB_FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    UNREACHABLE = 4
    DENIED = 5
    CONFLICT = 6
    BUG = 70
    INTERRUPTED = 130


EXIT_OF_CODE = {
    Code.INVALID_ARGUMENT: Exit.USAGE,
    Code.UNIMPLEMENTED: Exit.USAGE,
    Code.NOT_FOUND: Exit.NOT_FOUND,
    Code.UNAVAILABLE: Exit.UNREACHABLE,
    Code.DEADLINE_EXCEEDED: Exit.UNREACHABLE,
    Code.PERMISSION_DENIED: Exit.DENIED,
    Code.UNAUTHENTICATED: Exit.DENIED,
    Code.ALREADY_EXISTS: Exit.CONFLICT,
    Code.FAILED_PRECONDITION: Exit.CONFLICT,
    Code.RESOURCE_EXHAUSTED: Exit.CONFLICT,
    Code.ABORTED: Exit.CONFLICT,
    Code.INTERNAL: Exit.BUG,
    Code.DATA_LOSS: Exit.BUG,
    Code.CANCELLED: Exit.INTERRUPTED,
}


_CODE_OF_ERRNO = {
    errno.ENOENT: Code.NOT_FOUND,
    errno.ENOTDIR: Code.NOT_FOUND,
    errno.EACCES: Code.PERMISSION_DENIED,
    errno.EPERM: Code.PERMISSION_DENIED,
    errno.EROFS: Code.PERMISSION_DENIED,
    errno.EEXIST: Code.ALREADY_EXISTS,
    errno.ENOSPC: Code.RESOURCE_EXHAUSTED,
    errno.EDQUOT: Code.RESOURCE_EXHAUSTED,
}


def file_error(error: OSError) -> PhalanxError:
    """Return what a file or folder of the user that cannot be used is told as."""
    code = _CODE_OF_ERRNO.get(error.errno or 0, Code.INVALID_ARGUMENT)
    why = (error.strerror or type(error).__name__).lower()
    if error.filename is None:
        message = f"cannot write the output: {why}; make room, or write elsewhere"
    else:
        message = f"cannot use {error.filename}: {why}; name another path"
    return ERROR_OF_CODE[code](message, reason="FILE")


# What stands before the first violation: FILE: or FILE:LINE: and so on.
_SOURCE = re.compile(r"(?P<name>[^:]+)(:\d+)?: ")


def show_error(error: PhalanxError, *, as_json: bool) -> None:
    """Write an error to standard error: one block of text, or one JSON object."""
    text = json.dumps(error_to_json(error)) if as_json else error_to_text(error)
    print(text, file=sys.stderr)


def error_to_json(error: PhalanxError) -> dict[str, object]:
    """Return the error object of ``--json``."""
    return {
        "code": error.code.value,
        "reason": error.reason,
        "message": error.message,
        "violations": [
            {"field": wrong.field, "line": wrong.line, "message": wrong.message}
            for wrong in error.violations
        ],
        "retry_after_s": error.retry_after_s,
    }


def error_to_text(error: PhalanxError) -> str:
    """Return what happened, where, and what to do next.

    The violations of a job file are sorted by line and aligned in columns. A message that only
    repeats one of them is left out.
    """
    violations = sorted(
        error.violations, key=lambda wrong: (wrong.line is None, wrong.line or 0, wrong.field)
    )
    repeated = next((wrong for wrong in violations if wrong.message in error.message), None)
    if repeated is not None and len(violations) == 1:
        return f"error: {_located(repeated, error.message)}"
    summary = error.message
    if repeated is not None:
        source = _SOURCE.match(error.message.partition(repeated.field or repeated.message)[0])
        where = f"{source['name']}: " if source else ""
        summary = f"{where}{number_of(len(violations), 'field')} are wrong"
    lines = [f"error: {summary}"]
    places = [_place(wrong.line, wrong.field) for wrong in violations]
    width = min(max(map(len, places), default=0), 44)
    for place, wrong in zip(places, violations, strict=True):
        lines.append(f"  {place:<{width}}  {wrong.message}" if place else f"  {wrong.message}")
    return "\n".join(lines)


def _located(wrong: Violation, message: str) -> str:
    """Return the message with the line that it does not tell itself."""
    if wrong.line is None or f":{wrong.line}" in message or f"line {wrong.line}" in message:
        return message
    return f"line {wrong.line}: {message}"


def _place(line: int | None, field: str) -> str:
    return f"line {line}: {field}" if line and field else f"line {line}" if line else field
