"""How much two workers could gain if nobody ever waited: what a step costs the two cores."""

from __future__ import annotations

import time

import psutil

import phalanx
from bench.clusters import FASHION, cluster, fashion_job, wait_for
from bench.results import Measurement
from phalanx.sdk.job import Job

STEPS = 3000
"""More than are done in the time that is looked at."""
WARM_UP = 50
WINDOW_S = 6.0


def two_workers_bound(one_worker_steps_per_s: float, ideal: float, command: str) -> Measurement:
    """`scaling_2_workers_bound`: the gain if both cores worked all the time, on nothing else.

    Leaves, sessions, aggregator, control and storage share the two cores, so that a step cannot
    take less than half of the CPU time that it costs all of them together.
    """
    with cluster(workers=2) as running:
        running.data.add("fashion", str(FASHION))
        job = running.submit(fashion_job("cores", STEPS))
        wait_for(lambda: job.refresh().progress.step >= WARM_UP, "the first steps")
        before, first_s = _cpu_s(running), time.time()
        time.sleep(WINDOW_S)
        after, last_s = _cpu_s(running), time.time()
        steps = _commits(job, first_s, last_s)
        job.cancel()
    leaves, others = ((after[kind] - before[kind]) / steps for kind in (True, False))
    gain = 2 / (leaves + others) / one_worker_steps_per_s
    return Measurement(
        "scaling_2_workers_bound",
        gain,
        "ratio",
        ideal,
        gain / ideal,
        "",
        None,
        command,
        note=f"a step costs {leaves * 1e3:.1f} ms of CPU time in leaf processes and "
        f"{others * 1e3:.1f} ms in sessions, aggregator, control and storage, and took "
        f"{WINDOW_S / steps * 1e3:.1f} ms",
    )


def _cpu_s(running: phalanx.LocalCluster) -> dict[bool, float]:
    """CPU seconds so far of leaf processes (True) and of everything else (False)."""
    spent = {True: 0.0, False: 0.0}
    for member in running.processes():
        process = psutil.Process(member.pid)
        for each in (process, *process.children(recursive=True)):
            times = each.cpu_times()
            spent[member.role == "worker" and each.pid != member.pid] += times.user + times.system
    return spent


def _commits(job: Job, first_s: float, last_s: float) -> int:
    points = (point.time.timestamp() for point in job.metrics(["train/loss"]))
    return sum(first_s < at_s <= last_s for at_s in points)
