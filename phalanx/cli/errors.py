"""Exit codes, and how an error is told to people and to programs."""

import json
import sys
from enum import IntEnum

from phalanx.errors import Code, PhalanxError


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

    The violations of a job file are sorted by line and aligned in columns.
    """
    lines = [f"error: {error.message}"]
    violations = sorted(error.violations, key=lambda wrong: (wrong.line or 0, wrong.field))
    places = [_place(wrong.line, wrong.field) for wrong in violations]
    width = min(max(map(len, places), default=0), 44)
    for place, wrong in zip(places, violations, strict=True):
        lines.append(f"  {place:<{width}}  {wrong.message}" if place else f"  {wrong.message}")
    return "\n".join(lines)


def _place(line: int | None, field: str) -> str:
    return f"line {line}: {field}" if line and field else f"line {line}" if line else field
