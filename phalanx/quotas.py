"""What single namespaces may have, where that is not what the flags say for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What the file says of one namespace; None: nothing."""

    jobs: int | None = None
    running_jobs: int | None = None
    queued_jobs: int | None = None
    slots: int | None = None
    memory_bytes: int | None = None
    bytes: int | None = None


Namespaces = Mapping[str, Limits]
