"""From `kill -9` of a worker to the next committed step, many times over.

Also with a data set ten times the disk cache of a worker, against one that fits into it: who takes
a shard over fetches the chunks of the current leaf and no more, so recovery does not grow with the
data.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

import phalanx
from bench.clusters import add_tiny_data, cluster, hosting, idle_job, median, wait_for
from bench.results import Measurement

TRIALS = 50
WORKERS = 3

CACHE_BYTES = 64 * 2**20
"""Some times what the leaves of a worker read at a time: four chunks for each of its shards."""
FEATURES = 128
LARGE_TRIALS = 15
UNDISTURBED_S = 10.0
LONGER_ACCEPTED_S = 0.1


def run(command: str) -> list[Measurement]:
    """`kill_to_commit_s`, the largest of all trials; `kill_to_commit_large_data_s`, the median."""
    seconds = kill_to_commit_s(TRIALS)
    worst, middle = seconds[-1], median(seconds)
    cached, large = _with_data(0.5), _with_data(10)
    return [
        Measurement(
            "kill_to_commit_s",
            worst,
            "s",
            None,
            None,
            "<= 0.3",
            worst <= 0.3,
            command,
            note=f"largest of {TRIALS} trials; median {middle:.3f} s",
        ),
        Measurement(
            "kill_to_commit_large_data_s",
            large.recovery_s,
            "s",
            cached.recovery_s,
            large.recovery_s / cached.recovery_s,
            f"<= baseline + {LONGER_ACCEPTED_S}",
            large.recovery_s <= cached.recovery_s + LONGER_ACCEPTED_S,
            command,
            note=f"medians of {LARGE_TRIALS} trials; 10 and 0.5 times the cache of a worker; "
            f"undisturbed {large.steps_per_s:.0f} and {cached.steps_per_s:.0f} steps/s",
        ),
    ]


def kill_to_commit_s(trials: int) -> list[float]:
    """Seconds from a kill to the next committed step, in rising order."""
    with cluster(workers=WORKERS) as running:
        add_tiny_data(running)
        sgd = {"sgd": {"learning_rate": 0.1}}
        job = running.submit(idle_job("recovery", 10_000, 8, 10_000_000, sgd))
        return kill_again_and_again(running, job, trials)


@dataclass(frozen=True)
class _WithData:
    """How fast a job is, and the median time from a kill to its next commit."""

    steps_per_s: float
    recovery_s: float


def _with_data(caches: float) -> _WithData:
    """The same with real leaves, on so many times the data that a worker's disk cache holds."""
    rows = int(caches * CACHE_BYTES) // (FEATURES * 4)
    generator = np.random.default_rng(11)
    features = generator.standard_normal((rows, FEATURES)).astype(np.float32)
    targets = (features[:, :5].sum(axis=1) > 0).astype(np.int64)
    train: dict[str, Any] = {
        "model": {"logistic_regression": {}},
        "batch_size": 2048,
        "stop": {"steps": 10_000_000},
        "checkpoints": {"every": "3600s"},
    }
    limits = {"PHALANX_WORKER_CACHE_BYTES": str(CACHE_BYTES)}
    with cluster(workers=WORKERS, environment=limits) as running:
        running.data.add("rows", features, targets)
        job = running.submit({"name": "recovery", "data": {"name": "rows"}, "train": train})
        wait_until_all_train(job)
        step, began_s = job.progress.step, time.monotonic()
        time.sleep(UNDISTURBED_S)
        steps_per_s = (job.refresh().progress.step - step) / (time.monotonic() - began_s)
        seconds = kill_again_and_again(running, job, LARGE_TRIALS)
        return _WithData(steps_per_s, median(seconds))


def kill_again_and_again(
    running: phalanx.LocalCluster, job: phalanx.Job, trials: int
) -> list[float]:
    """Seconds from each of so many kills to the next committed step, in rising order."""
    seconds = []
    draw = random.Random(7)
    for _ in range(trials):
        wait_until_all_train(job)
        seconds.append(_kill_one(running, job, draw))
    job.cancel()
    return sorted(seconds)


def wait_until_all_train(job: phalanx.Job) -> None:
    """Wait for a step since all workers hold shards: before it there is nothing to interrupt."""
    wait_for(lambda: hosting(job.refresh()) == WORKERS, f"{WORKERS} workers that hold shards")
    step = job.progress.step
    wait_for(lambda: job.refresh().progress.step > step, "a step of all workers")


def _kill_one(running: phalanx.LocalCluster, job: phalanx.Job, draw: random.Random) -> float:
    """Kill a worker that holds shards; return the seconds until the next commit."""
    workers = [w.worker_id for w in job.refresh().progress.workers if w.shards]
    victim = draw.choice(workers)
    killed_unix_s = time.time()
    os.kill(running.process(victim).pid, signal.SIGKILL)
    return commit_after(running, job, victim, killed_unix_s) - killed_unix_s


def commit_after(
    running: phalanx.LocalCluster, job: phalanx.Job, victim: str, killed_unix_s: float
) -> float:
    """Wait for the first commit after the death of a worker that held shards; return its time."""
    committed: list[float] = []

    def is_recovered() -> bool:
        committed[:] = [
            float(event.details["committed_unix_s"])
            for event in running.events(job.id)
            if event.type == "RECOVERED"
            and event.details["member"] == victim
            and float(event.details["committed_unix_s"]) > killed_unix_s
        ]
        return bool(committed)

    wait_for(is_recovered, "the next commit")
    return committed[0]
