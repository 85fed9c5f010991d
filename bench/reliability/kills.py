"""What it costs when a worker is killed."""

from __future__ import annotations

from bench.recovery import kill_to_commit_s
from bench.reliability.rows import Row, Rows


def run(command: str, *, quick: bool) -> list[Row]:
    """From `kill -9` to the next committed step; the leaves themselves take no time."""
    return [
        Rows(command, quick).largest(
            "worker_kill_to_commit_s",
            "worker `kill -9` → next committed step, beyond recomputing its undelivered leaves",
            kill_to_commit_s(10 if quick else 50),
            "s",
            0.3,
        )
    ]
