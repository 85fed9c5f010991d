"""Crashes and power failures at every call of storage's journal and checkpoint code."""

from __future__ import annotations

from bench.reliability.disk_faults import CRASHES, rows
from bench.reliability.rows import Row


def run(command: str, *, quick: bool) -> list[Row]:
    """The process killed, the power gone and writes torn, also in starts after such faults."""
    what = "crash, power failure and torn write at every I/O call of journal and checkpoint code"
    return rows("disk_crashes", what, CRASHES, command, quick=quick)
