"""What it costs when a worker that was killed comes back.

Each is killed twice. Once it is started again at once, to see how soon it computes. And once it
stays away for a while, in which the others work without it: gaps between commits differ among
themselves, and only what is longer than the largest of those is a pause that its join made.

All workers are on one machine here, where the start of any process takes processor time from the
others. So as long as it is away, a worker of *another* cluster on this machine is killed and comes
back: what that costs the job is not what the join costs it.
"""

from __future__ import annotations

import math
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

import phalanx
from bench.clusters import wait_for
from bench.reliability.jobs import (
    all_host,
    commits_of,
    kept_down,
    leaf_times,
    patient_cluster,
    patient_job,
)
from bench.reliability.rows import Row, Rows
from phalanx.chaos.report import Commit, Span, gaps, percentile

WORKERS, LEAF_S = 4, 0.1
STEPS = 10_000
"""More than it takes; of more than these not every one would be recorded with its time."""
JOIN_REACH_S = 1.5
_START_TIME = 19
"""Among the fields of /proc/PID/stat after the name."""
RECOVERED_S = 1.2
"""So long after a kill the others have done with it, and work undisturbed."""
WINDOW_S = 2.0
"""So long they are looked at then, and again around the first leaf of the worker that joins: the
longer one looks, the larger is the largest gap."""


@dataclass
class Joins:
    """What was seen of all trials.

    Attributes:
        joined_s: from the start of each process to its first leaf.
        undisturbed: spans in which a worker was away, and nothing else happened.
        elsewhere: spans in which it was away, and a worker of another cluster started.
        joining: spans around the first leaf of the worker that came back.
        commits: the job's, with their times.
    """

    joined_s: list[float] = field(default_factory=list)
    undisturbed: list[Span] = field(default_factory=list)
    elsewhere: list[Span] = field(default_factory=list)
    joining: list[Span] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)


def run(command: str, *, quick: bool) -> list[Row]:
    """Workers that are killed and started again by their supervisor."""
    trials = 3 if quick else 12
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder)
        with (
            patient_cluster(WORKERS, LEAF_S, marks=marks) as running,
            _another_cluster(marks) as other,
        ):
            # Three leaves in a row on all of them, four on the others while one is away.
            job = running.submit(patient_job("joins", 12, STEPS))
            wait_for(lambda: all_host(running, job, WORKERS), "all workers to hold shards")
            joins = _restart_and_look(running, job, other, marks, trials)
            job.cancel()
    made = Rows(command, quick)
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
        *pause_rows(made, joins),
    ]


def pause_rows(made: Rows, joins: Joins) -> list[Row]:
    """The largest gap while workers joined beyond the largest while each was away.

    No pause is what does not go beyond that by more than such spans differ among themselves. The
    second row takes off what the start of any process costs on the same machine.
    """
    calm_s, elsewhere_s, while_s = (
        [max(gaps(joins.commits, span), default=math.inf) for span in spans]
        for spans in (joins.undisturbed, joins.elsewhere, joins.joining)
    )

    def row(name: str, where: str, without_s: list[float]) -> Row:
        return made.at_most(
            name,
            "the others while it joins: the largest gap between commits in the "
            f"{WINDOW_S:g} s around its first leaf, beyond the largest in {WINDOW_S:g} s while it "
            f"was away{where}, all trials together; the reach is by how much that differs among "
            "the trials",
            max(0.0, max(while_s) - max(without_s)),
            "s",
            round(max(without_s) - min(without_s), 3),
            trials=len(while_s),
            note="largest, and median of the trials: while it joins "
            f"{_both(while_s)}, without {_both(without_s)}",
        )

    started = " and a worker of another cluster on the same machine started"
    return [
        row("worker_restart_pause_s", "", calm_s),
        row("worker_restart_pause_beyond_a_start_s", started, elsewhere_s),
    ]


def _both(seconds: Sequence[float]) -> str:
    return f"{max(seconds):.3f} and {percentile(seconds, 50):.3f} s"


@contextmanager
def _another_cluster(marks: Path) -> Iterator[phalanx.LocalCluster]:
    """A cluster of its own, whose workers have the same to do when they start."""
    with patient_cluster(2, LEAF_S, marks=marks) as other:
        job = other.submit(patient_job("elsewhere", 2, STEPS))
        wait_for(lambda: all_host(other, job, 2), "both workers elsewhere to hold shards")
        yield other
        job.cancel()


def _restart_and_look(
    running: phalanx.LocalCluster,
    job: phalanx.Job,
    other: phalanx.LocalCluster,
    marks: Path,
    trials: int,
) -> Joins:
    """Kill workers and let them come back, at once and after a while; see who waits for them."""
    joins = Joins()
    for trial in range(trials):
        id = f"worker-{trial % WORKERS + 1}"
        session = _killed_and_started(running, id)
        joins.joined_s.append(_await_first_leaf(session, marks) - _started_unix_s(session.pid))
        _settle(running, job)
        with kept_down(running, id):
            calm_s = time.time() + RECOVERED_S
            time.sleep(RECOVERED_S + WINDOW_S)
            elsewhere_s = _await_first_leaf(_killed_and_started(other, "worker-1"), marks)
            time.sleep(WINDOW_S / 2)
        first_s = _await_first_leaf(psutil.Process(running.process(id).pid), marks)
        joins.undisturbed.append(Span(calm_s, calm_s + WINDOW_S))
        joins.elsewhere.append(_around(elsewhere_s))
        joins.joining.append(_around(first_s))
        _settle(running, job)
    joins.commits = commits_of(job)
    return joins


def _around(time_s: float) -> Span:
    return Span(time_s - WINDOW_S / 2, time_s + WINDOW_S / 2)


def _killed_and_started(running: phalanx.LocalCluster, id: str) -> psutil.Process:
    """Kill a worker; the process that its supervisor starts for it."""
    old = running.process(id).pid
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: running.process(id).pid not in (0, old), f"the next {id}")
    return psutil.Process(running.process(id).pid)


def _settle(running: phalanx.LocalCluster, job: phalanx.Job) -> None:
    wait_for(lambda: all_host(running, job, WORKERS), "all workers to hold shards")
    time.sleep(WINDOW_S)


def _await_first_leaf(session: psutil.Process, marks: Path) -> float:
    wait_for(lambda: _first_leaf(session, marks), "its first leaf")
    return _first_leaf(session, marks)


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
