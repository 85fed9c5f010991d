"""What it costs when a worker that was killed comes back."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import phalanx
from bench.clusters import wait_for
from bench.reliability.jobs import (
    all_host,
    commits_of,
    leaf_times,
    patient_cluster,
    patient_job,
)
from bench.reliability.rows import Row, Rows
from phalanx.chaos.report import Span, gaps, percentile

WORKERS, LEAF_S = 4, 0.1
STEPS = 10_000
"""More than it takes; of more than these not every one would be recorded with its time."""
JOIN_REACH_S = 1.5
_START_TIME = 19
"""Among the fields of /proc/PID/stat after the name."""
RECOVERED_S, JOINS_S = 0.6, 0.3
"""From this long after the kill to this long before its first leaf the others work without it."""


@dataclass
class _Joins:
    joined_s: list[float] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)


def run(command: str, *, quick: bool) -> list[Row]:
    """Workers that are killed and started again by their supervisor."""
    trials = 3 if quick else 12
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder)
        with patient_cluster(WORKERS, LEAF_S, marks=marks) as running:
            # Three leaves in a row on all of them, four on the others while one is away.
            job = running.submit(patient_job("joins", 12, STEPS))
            wait_for(lambda: all_host(running, job, WORKERS), "all workers to hold shards")
            joins = _restart_and_look(running, job, marks, trials)
            job.cancel()
    made = Rows(command, quick)
    pause_s = percentile(joins.pauses_s, 50) or 0.0
    return [
        made.largest(
            "worker_restart_to_leaf_s",
            "restarted worker: start of the process → its first leaf of a step is computed",
            joins.joined_s,
            "s",
            JOIN_REACH_S,
            f"leaves take {LEAF_S:g} s, and one comes before them: the one that shows that the "
            "worker computes the same bits",
        ),
        made.at_most(
            "worker_restart_pause_s",
            "the others while it joins: longest gap between commits beyond that before, "
            "median of the trials",
            pause_s,
            "s",
            0.0,
            trials=trials,
            note=f"largest {max(joins.pauses_s):.2f} s",
        ),
    ]


def _restart_and_look(
    running: phalanx.LocalCluster, job: phalanx.Job, marks: Path, trials: int
) -> _Joins:
    """Kill a worker, which the supervisor starts again; see when it computes and who waits."""
    joins, away, joining = _Joins(), [], []
    for trial in range(trials):
        id = f"worker-{trial % WORKERS + 1}"
        old, killed_s = running.process(id).pid, time.time()
        os.kill(old, signal.SIGKILL)
        wait_for(lambda id=id, old=old: running.process(id).pid not in (0, old), "the new process")
        session = psutil.Process(running.process(id).pid)
        wait_for(lambda session=session: _first_leaf(session, marks), "its first leaf")
        first_s = _first_leaf(session, marks)
        joins.joined_s.append(first_s - _started_unix_s(session.pid))
        away.append(Span(killed_s + RECOVERED_S, first_s - JOINS_S))
        joining.append(Span(first_s - JOINS_S, first_s + 1.0))
        wait_for(lambda: all_host(running, job, WORKERS), "all workers to hold shards")
        time.sleep(2.0)
    commits = commits_of(job)
    alone_s = max(gap for each in away for gap in gaps(commits, each))
    joins.pauses_s = [max(0.0, max(gaps(commits, each)) - alone_s) for each in joining]
    return joins


def _first_leaf(session: psutil.Process, marks: Path) -> float:
    """When a leaf process of the session finished its first leaf of a step; 0.0 before that."""
    for child in session.children(recursive=True):
        leaves = leaf_times(marks, child.pid)
        # The first is its sample, which is compared with that of the others and then thrown away.
        if len(leaves) > 1:
            return leaves[1]
    return 0.0


def _started_unix_s(pid: int) -> float:
    """When a process was started, to a hundredth of a second.

    By the clock of the boot: that of psutil comes from the time of the boot in whole seconds.
    """
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    started_boot_s = int(after_name[_START_TIME]) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - started_boot_s)
