"""What the loss of a control process costs: no step, and hardly a pause.

Whoever is killed stays down until all is measured. Started again at once, it would lead again under
its own name within a moment, for storage need not wait for the end of its lease; what is measured
here is a standby, which does have to.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass

import phalanx
from bench.clusters import wait_for
from bench.reliability.jobs import all_ready, commits_of, kept_down, patient_cluster, patient_job
from bench.reliability.rows import Row, Rows
from phalanx.chaos.report import Commit, Span, gaps, percentile
from phalanx.errors import Unavailable
from phalanx.sdk.values import Event

WORKERS, SHARDS, LEAF_S = 4, 9, 0.1
QUIET_S = 4.0
STEPS = 10_000
"""More than it takes; of more than these not every one would be recorded with its time."""


@dataclass(frozen=True)
class _Kill:
    unix_s: float
    until_s: float
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
        replayed = sum(
            int(event.details["steps"])
            for event in running.events(job.id)
            if event.type == "STEPS_REPLAYED"
        )
        job.cancel()
    return _rows(kills, commits, before, replayed, command, quick=quick)


def _kill(running: phalanx.LocalCluster, job: phalanx.Job, *, with_worker: bool) -> _Kill:
    """Kill whoever leads and keep it down while the standby leads; wait until all is as before."""
    victim = running.describe().leader
    hosting = sorted(w.worker_id for w in job.refresh().progress.workers if w.shards)
    unix_s = time.time()
    if with_worker:
        os.kill(running.process(hosting[0]).pid, signal.SIGKILL)
    with kept_down(running, victim):
        took_over: list[float] = []

        def standby_leads() -> bool:
            try:
                found = take_over_unix_s(running.events(), unix_s, victim)
            except Unavailable:
                return False
            took_over[:] = [] if found is None else [found]
            return bool(took_over)

        wait_for(standby_leads, "the standby to lead")
        time.sleep(QUIET_S)
        until_s = time.time()
    wait_for(lambda: all_ready(running, WORKERS), "all processes to be back")
    return _Kill(unix_s, until_s, took_over[0] - unix_s, with_worker)


def take_over_unix_s(events: Iterable[Event], killed_unix_s: float, victim: str) -> float | None:
    """Return when another process began to lead after a kill; None if none has yet.

    Raises AssertionError if it was the victim that led again: that is no standby.
    """
    for event in events:
        if event.type == "CONTROL_TOOK_OVER" and event.time.timestamp() > killed_unix_s:
            leader = event.message.split()[0]
            assert leader != victim, f"{victim} was killed and leads again: {event.message}"
            return event.time.timestamp()
    return None


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
        max(gaps(commits, Span(kill.unix_s, kill.until_s)), default=math.inf) for kill in kills
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
            "control `kill -9`, and it stays down → the standby leads",
            [kill.led_after_s for kill in kills],
            "s",
            3.0,
        ),
    ]
