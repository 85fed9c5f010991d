"""From `kill -9` of a worker to the next committed step, many times over."""

from __future__ import annotations

import os
import random
import signal
import time

import phalanx
from bench.clusters import add_tiny_data, cluster, hosting, idle_job, wait_for
from bench.results import Measurement

TRIALS = 50
WORKERS = 3


def run(command: str) -> list[Measurement]:
    """`kill_to_commit_s`, the largest of all trials; the leaves themselves take no time."""
    seconds = kill_to_commit_s(TRIALS)
    worst, middle = seconds[-1], seconds[len(seconds) // 2]
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
        )
    ]


def kill_to_commit_s(trials: int) -> list[float]:
    """Seconds from a kill to the next committed step, in rising order."""
    seconds = []
    with cluster(workers=WORKERS) as running:
        add_tiny_data(running)
        sgd = {"sgd": {"learning_rate": 0.1}}
        job = running.submit(idle_job("recovery", 10_000, 8, 10_000_000, sgd))
        draw = random.Random(7)
        for _ in range(trials):
            _wait_until_all_train(job)
            seconds.append(_kill_one(running, job, draw))
        job.cancel()
    return sorted(seconds)


def _wait_until_all_train(job: phalanx.Job) -> None:
    """Wait for a step since all workers hold shards: before it there is nothing to interrupt."""
    wait_for(lambda: hosting(job.refresh()) == WORKERS, f"{WORKERS} workers that hold shards")
    step = job.progress.step
    wait_for(lambda: job.refresh().progress.step > step, "a step of all workers")


def _kill_one(running: phalanx.LocalCluster, job: phalanx.Job, draw: random.Random) -> float:
    """Kill a worker that holds shards; return the seconds until the next commit."""
    workers = [w.worker_id for w in job.refresh().progress.workers if w.shards]
    victim = running.process(draw.choice(workers))
    recovered = sum(event.type == "RECOVERED" for event in running.events(job.id))
    killed_unix_s = time.time()
    os.kill(victim.pid, signal.SIGKILL)
    committed: list[float] = []

    def is_recovered() -> bool:
        events = [event for event in running.events(job.id) if event.type == "RECOVERED"]
        committed[:] = [float(event.details["committed_unix_s"]) for event in events[recovered:]]
        return bool(committed)

    wait_for(is_recovered, "the next commit")
    return committed[0] - killed_unix_s
