"""What the loss of a worker costs."""

from __future__ import annotations

from bench.recovery import kill_to_commit_s
from bench.reliability.rows import Row


def run(command: str, *, quick: bool) -> list[Row]:
    """All figures about one worker."""
    return [_killed(command, quick=quick)]


def _killed(command: str, *, quick: bool) -> Row:
    trials = 10 if quick else 50
    seconds = kill_to_commit_s(trials)
    return Row(
        name="worker_kill_to_commit_s",
        what="worker `kill -9` → next committed step, beyond recomputing its undelivered leaves",
        value=seconds[-1],
        unit="s",
        reach="<= 0.3",
        reached=seconds[-1] <= 0.3,
        trials=trials,
        command=command,
        note=f"largest; median {seconds[trials // 2]:.3f} s",
        quick=quick,
    )
