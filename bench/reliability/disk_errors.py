"""I/O errors at every call of storage's journal, lease, blob and checkpoint code."""

from __future__ import annotations

from bench.reliability.disk_faults import ERRORS, rows
from bench.reliability.rows import Row


def run(command: str, *, quick: bool) -> list[Row]:
    """EIO, once and lasting, also in a start after a crash."""
    what = "EIO at every I/O call of journal and checkpoint code"
    return rows("disk_errors", what, ERRORS, command, quick=quick)
