"""What a job may say but this version does not carry out: refused, never ignored."""

from __future__ import annotations

from phalanx.errors import Unimplemented, Violation
from phalanx.specs.fields import is_set, unknown_numbers
from phalanx.v1 import job_spec_pb2

_REFUSED: dict[str, str] = {
    "train.local.fragments": "fragments are not carried out yet; leave it out",
}


def unimplemented(spec: job_spec_pb2.JobSpec) -> list[Violation]:
    """Return every field of `spec` that is not carried out, with what to do instead."""
    found = [Violation(path, why) for path, why in _REFUSED.items() if is_set(spec, path)]
    for path, number in unknown_numbers(spec):
        place = path or "spec"
        found.append(
            Violation(path, f"{place} has field number {number}, which this version does not know")
        )
    return found


def refuse_unimplemented(spec: job_spec_pb2.JobSpec) -> None:
    """Raise Unimplemented (reason NOT_CARRIED_OUT) if `spec` asks for what is not there yet."""
    found = unimplemented(spec)
    if not found:
        return
    more = "" if len(found) == 1 else f" (and {len(found) - 1} more)"
    raise Unimplemented(
        f"{found[0].field}: {found[0].message}{more}", reason="NOT_CARRIED_OUT", violations=found
    )
