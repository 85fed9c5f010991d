"""What the loss of a control process costs: no step, and hardly a pause."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import phalanx
from bench.clusters import wait_for
from bench.reliability.jobs import all_ready, commits_of, patient_cluster, patient_job
from bench.reliability.rows import Row, Rows
from phalanx.chaos.report import Commit, Span, gaps, percentile
from phalanx.errors import Unavailable

WORKERS, SHARDS, LEAF_S = 4, 9, 0.1
QUIET_S = 4.0
STEPS = 10_000
"""More than it takes; of more than these not every one would be recorded with its time."""


@dataclass(frozen=True)
class _Kill:
    unix_s: float
    led_after_s: float
    with_worker: bool


def run(command: str, *, quick: bool) -> list[Row]:
    """Kills of the leading control process, every other one together with a worker."""
    trials = 4 if quick else 20
    with patient_cluster(WORKERS, LEAF_S, controls=2) as running:
        job = running.submit(patient_job("control", SHARDS, STEPS))
        wait_for(lambda: job.refresh().progress.step >= 5, "the first steps")
        start_s = time.time()
        time.sleep(QUIET_S)
        before = Span(start_s, time.time())
        kills = [_kill(running, job, with_worker=bool(trial % 2)) for trial in range(trials)]
        time.sleep(QUIET_S)
        commits = commits_of(job)
        replayed = sum(event.type == "STEPS_REPLAYED" for event in running.events(job.id))
        job.cancel()
    return _rows(kills, commits, before, replayed, command, quick=quick)


def _kill(running: phalanx.LocalCluster, job: phalanx.Job, *, with_worker: bool) -> _Kill:
    """Kill whoever leads; wait until somebody leads again and all is as before."""
    described = running.describe()
    leader = running.process(described.leader)
    victims = [leader.pid]
    if with_worker:
        hosting = sorted(w.worker_id for w in job.refresh().progress.workers if w.shards)
        victims.append(running.process(hosting[0]).pid)
    unix_s = time.time()
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    took_over: list[float] = []

    def leads_again() -> bool:
        try:
            if running.describe().generation <= described.generation:
                return False
        except Unavailable:
            return False
        took_over[:] = [
            event.time.timestamp()
            for event in running.events()
            if event.type == "CONTROL_TOOK_OVER" and event.time.timestamp() > unix_s
        ]
        return bool(took_over)

    wait_for(leads_again, "a new leader")
    wait_for(lambda: all_ready(running, WORKERS), "all processes to be back")
    time.sleep(QUIET_S)
    return _Kill(unix_s, took_over[0] - unix_s, with_worker)


def _rows(
    kills: list[_Kill],
    commits: list[Commit],
    before: Span,
    replayed: int,
    command: str,
    *,
    quick: bool,
) -> list[Row]:
    usual_s = max(gaps(commits, before))
    longest_s = [
        max(gaps(commits, Span(kill.unix_s, kill.unix_s + QUIET_S)), default=0.0) for kill in kills
    ]
    ratio = max(longest_s) / usual_s
    alone = [s for s, kill in zip(longest_s, kills, strict=True) if not kill.with_worker]
    together = [s for s, kill in zip(longest_s, kills, strict=True) if kill.with_worker]
    made = Rows(command, quick)
    return [
        made.none(
            "control_kill_steps_lost",
            "control `kill -9` while training, every other time with a worker: steps lost",
            replayed,
            trials=len(kills),
        ),
        made.at_most(
            "control_kill_gap_ratio",
            "control `kill -9`, every other time with a worker: longest gap between two commits "
            "after it ÷ the longest undisturbed one",
            ratio,
            "",
            2.0,
            trials=len(kills),
            note=f"undisturbed {usual_s:.2f} s; control alone {max(alone):.2f} s, "
            f"with a worker {max(together):.2f} s; median {percentile(longest_s, 50):.2f} s",
        ),
        made.largest(
            "control_kill_standby_leads_s",
            "control `kill -9` → the next generation leads",
            [kill.led_after_s for kill in kills],
            "s",
            3.0,
        ),
    ]
