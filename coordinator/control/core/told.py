"""What members say, as long as there is room for: several texts stand in one record of a journal,
and no record may be longer than storage takes, whoever says whatever."""

from __future__ import annotations

from collections.abc import Mapping

from phalanx.texts import shortened
from phalanx.v1.job_pb2 import Failure

TEXT_MAX = 16 * 1024
"""Characters; what leaf processes of ours say is shorter."""

DETAILS_MAX = 32
NAME_MAX, VALUE_MAX = 200, 4096


def text(said: str) -> str:
    """Return a message or a traceback."""
    return shortened(said, TEXT_MAX)


def details(said: Mapping[str, object]) -> dict[str, str]:
    """Return the details of an event."""
    first = list(said.items())[:DETAILS_MAX]
    return {shortened(name, NAME_MAX): shortened(str(value), VALUE_MAX) for name, value in first}


def failure(said: Failure) -> Failure:
    """Return a failure with its texts."""
    kept = Failure()
    kept.CopyFrom(said)
    kept.message, kept.traceback = text(said.message), text(said.traceback)
    return kept
