"""What it costs when a worker is killed that has not delivered yet what the step needs."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from pathlib import Path

import psutil

import phalanx
from bench.clusters import wait_for
from bench.recovery import commit_after, wait_until_all_train
from bench.reliability.jobs import open_leaf_s, patient_cluster, patient_job
from bench.reliability.rows import Row, Rows
from phalanx.chaos.report import percentile

WORKERS, LEAF_S = 3, 0.1
"""Each worker has one leaf per step, so one is what a victim owes, and one worker computes it."""
STEPS = 100_000
ATTEMPTS_MAX = 4
"""So many times the wanted trials: a leaf may be finished just before its worker is killed."""
KILL_AT = (0.1, 0.8)
"""The part of its leaf that a victim has had the time for."""


def run(command: str, *, quick: bool) -> list[Row]:
    """From `kill -9` to the next committed step, beyond computing anew what the victim owed."""
    trials = 6 if quick else 50
    draw = random.Random(7)
    recovery_s: list[float] = []
    attempts = 0
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder)
        with patient_cluster(WORKERS, LEAF_S, marks=marks) as running:
            job = running.submit(patient_job("kills", WORKERS, STEPS))
            while len(recovery_s) < trials:
                attempts += 1
                if attempts > ATTEMPTS_MAX * trials:
                    raise TimeoutError(f"only {len(recovery_s)} of {attempts} victims owed a leaf")
                wait_until_all_train(job)
                found = _kill_one(running, job, marks, draw)
                recovery_s += [] if found is None else [found]
            job.cancel()
    return [row_of(recovery_s, attempts, command, quick=quick)]


def row_of(recovery_s: list[float], attempts: int, command: str, *, quick: bool) -> Row:
    """The figure from the seconds between each kill and the next commit."""
    return Rows(command, quick).largest(
        "worker_kill_to_commit_s",
        "worker `kill -9` in the middle of a leaf → next committed step, beyond the "
        f"{LEAF_S:g} s that computing this leaf anew takes",
        [each - LEAF_S for each in recovery_s],
        "s",
        0.3,
        f"with it: median {percentile(recovery_s, 50):.2f} s, largest {max(recovery_s):.2f} s; "
        f"{attempts - len(recovery_s)} more kills came just after the leaf and do not count",
    )


def _kill_one(
    running: phalanx.LocalCluster, job: phalanx.Job, marks: Path, draw: random.Random
) -> float | None:
    """Kill a worker in the middle of a leaf; return the seconds until the next commit, or None if
    the leaf was finished before."""
    victim = draw.choice([w.worker_id for w in job.progress.workers if w.shards])
    session = psutil.Process(running.process(victim).pid)
    leaves = [child.pid for child in session.children(recursive=True)]
    earlier_s = open_leaf_s(marks, leaves) or 0.0
    wait_for(lambda: (open_leaf_s(marks, leaves) or 0.0) > earlier_s, "the victim's next leaf")
    time.sleep(LEAF_S * draw.uniform(*KILL_AT))
    killed_unix_s = time.time()
    os.kill(session.pid, signal.SIGKILL)
    # It dies with its worker.
    wait_for(lambda: not any(map(psutil.pid_exists, leaves)), "the end of the leaf process")
    owed = open_leaf_s(marks, leaves) is not None
    committed_unix_s = commit_after(running, job, victim, killed_unix_s)
    return committed_unix_s - killed_unix_s if owed else None
