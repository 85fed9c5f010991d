"""What it costs when a worker is killed, stops, hangs, or comes back."""

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
from bench.recovery import kill_to_commit_s
from bench.reliability.jobs import all_host, commits_of, patient_cluster, patient_job
from bench.reliability.rows import Row
from phalanx.chaos.report import Span, gaps, percentile
from phalanx.sdk.values import Event

WORKERS, LEAF_S = 4, 0.1
STEPS = 10_000
"""More than it takes; of more than these not every one would be recorded with its time."""
COPIES_REACH_S = 2 * LEAF_S + 0.3
LOST_REACH_S = 2.5
JOIN_REACH_S = 1.5
RECOVERED_S, JOINS_S = 0.6, 0.3
"""From this long after the kill to this long before its first leaf the others work without it."""
HANG_S = 1.5
"""How long a leaf hangs: longer than until it is copied."""


@dataclass
class _Late:
    """Seconds until copies were started, and until the worker was declared lost."""

    copied_s: list[float] = field(default_factory=list)
    lost_s: list[float] = field(default_factory=list)
    missed: int = 0


@dataclass
class _Joins:
    joined_s: list[float] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)


def run(command: str, *, quick: bool) -> list[Row]:
    """All figures about one worker."""
    rows = [_killed(command, quick=quick)]
    trials = 3 if quick else 20
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder)
        with patient_cluster(WORKERS, LEAF_S, marks=marks) as running:
            # One leaf per worker and step, so that a missing one is missing from the start.
            job = running.submit(patient_job("late", WORKERS, STEPS))
            late = _Late()
            for trial in range(trials):
                _stop_and_look(running, job, late, hang=bool(trial % 2))
            job.cancel()
            wait_for(lambda: job.refresh().done, "the job to end")
            # Three leaves in a row on all of them, four on the others while one is away.
            job = running.submit(patient_job("joins", 12, STEPS))
            wait_for(lambda: all_host(running, job, WORKERS), "all workers to hold shards")
            joins = _restart_and_look(running, job, marks, trials)
            job.cancel()
    return rows + _late_rows(late, trials, command, quick) + _join_rows(joins, command, quick)


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


def _stop_and_look(
    running: phalanx.LocalCluster, job: phalanx.Job, late: _Late, *, hang: bool
) -> None:
    """Stop a worker past its lease, or only its leaf process while its heartbeats go on."""
    wait_for(lambda: all_host(running, job, WORKERS), "all workers to hold shards")
    time.sleep(1.0)
    victim = running.process(f"worker-{len(late.copied_s) % WORKERS + 1}")
    session = psutil.Process(victim.pid)
    children = session.children(recursive=True)
    processes = children if hang else [session, *children]
    began_unix_s = time.time()
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        if hang:
            time.sleep(HANG_S)
        else:
            wait_for(
                lambda: _first(running, "WORKER_LOST", victim.id, began_unix_s),
                "the worker to be declared lost",
            )
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)
    copied = _first(running, "SPECULATION_STARTED", victim.id, began_unix_s)
    if copied is None or copied.step is None:
        late.missed += 1
        # As long as it certainly took.
        late.copied_s.append(HANG_S)
    else:
        # A leaf that was delivered before the stop is missed from the next step on.
        begun = [each.unix_s for each in commits_of(job) if each.step <= copied.step]
        late.copied_s.append(copied.time.timestamp() - max(began_unix_s, max(begun, default=0.0)))
    if not hang:
        lost = _first(running, "WORKER_LOST", victim.id, began_unix_s)
        assert lost is not None
        late.lost_s.append(lost.time.timestamp() - began_unix_s)


def _first(
    running: phalanx.LocalCluster, kind: str, worker_id: str, after_unix_s: float
) -> Event | None:
    return next(
        (
            event
            for event in running.events()
            if event.type == kind
            and event.worker_id == worker_id
            and event.time.timestamp() >= after_unix_s
        ),
        None,
    )


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
        joins.joined_s.append(first_s - session.create_time())
        away.append(Span(killed_s + RECOVERED_S, first_s - JOINS_S))
        joining.append(Span(first_s - JOINS_S, first_s + 1.0))
        wait_for(lambda: all_host(running, job, WORKERS), "all workers to hold shards")
        time.sleep(2.0)
    commits = commits_of(job)
    alone_s = max(gap for each in away for gap in gaps(commits, each))
    joins.pauses_s = [max(0.0, max(gaps(commits, each)) - alone_s) for each in joining]
    return joins


def _first_leaf(session: psutil.Process, marks: Path) -> float:
    """When a leaf process of the session finished its first leaf; 0.0 before that."""
    for child in session.children(recursive=True):
        mark = marks / str(child.pid)
        if mark.exists() and mark.stat().st_mtime >= session.create_time():
            return mark.stat().st_mtime
    return 0.0


def _late_rows(late: _Late, trials: int, command: str, quick: bool) -> list[Row]:
    copied_s, lost_s = max(late.copied_s), max(late.lost_s)
    return [
        Row(
            name="worker_stop_to_copies_s",
            what="worker SIGSTOP, or its leaf hangs under good heartbeats → copies of its missing "
            "leaves started; leaves take 0.1 s",
            value=copied_s,
            unit="s",
            reach=f"<= {COPIES_REACH_S:g}",
            reached=copied_s <= COPIES_REACH_S and not late.missed,
            trials=trials,
            command=command,
            note=f"largest; median {percentile(late.copied_s, 50):.2f} s"
            + (f"; in {late.missed} trials none was started" if late.missed else ""),
            quick=quick,
        ),
        Row(
            name="worker_stop_to_lost_s",
            what="worker SIGSTOP → declared lost, with the default lease",
            value=lost_s,
            unit="s",
            reach=f"<= {LOST_REACH_S:g}",
            reached=lost_s <= LOST_REACH_S,
            trials=len(late.lost_s),
            command=command,
            note=f"largest; median {percentile(late.lost_s, 50):.2f} s",
            quick=quick,
        ),
    ]


def _join_rows(joins: _Joins, command: str, quick: bool) -> list[Row]:
    joined_s, pause_s = max(joins.joined_s), percentile(joins.pauses_s, 50) or 0.0
    trials = len(joins.joined_s)
    return [
        Row(
            name="worker_restart_to_leaf_s",
            what="restarted worker: start of the process → its first leaf is computed",
            value=joined_s,
            unit="s",
            reach=f"<= {JOIN_REACH_S:g}",
            reached=joined_s <= JOIN_REACH_S,
            trials=trials,
            command=command,
            note=f"largest; median {percentile(joins.joined_s, 50):.2f} s",
            quick=quick,
        ),
        Row(
            name="worker_restart_pause_s",
            what="the others while it joins: longest gap between commits beyond that before, "
            "median of the trials",
            value=pause_s,
            unit="s",
            reach="0",
            reached=pause_s == 0,
            trials=trials,
            command=command,
            note=f"largest {max(joins.pauses_s):.2f} s",
            quick=quick,
        ),
    ]
