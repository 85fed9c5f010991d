"""Independent tasks that do nothing: how many per second, and how long one of them takes.

Each is handed out, called in a leaf process, reported, and durable in the journal before it counts
as done. The rate is that of the whole job between its first and its last result in the journal. The
round trip is that of a task with the cluster to itself: from the moment it is handed out until its
result is durable, less the time of the call, as the aggregator's own metric tells it.
"""

from __future__ import annotations

import re
import statistics
import time
import urllib.request
from typing import Any

import phalanx
from bench import floor
from bench.clusters import cluster
from bench.results import Measurement

TASKS = 20_000
ALONE, WARM_UP = 40, 5
"""Jobs of one task each, one after another, and those of them that are not counted."""

REST_S = 0.12
"""Longer calls than that are handed out one at a time; meanwhile the machine has a rest."""

ROUND_TRIP = re.compile(r'phalanx_task_round_trip_seconds_sum\{job_id="([^"]*)"\} (\S+)')
RATE_MIN = 2000.0
ROUND_TRIP_MAX_MS = 3.0
CODE = """
import time

def nothing():
    return None

def rest():
    time.sleep(0.12)
"""
TIMEOUT_S = 80.0


def _job(name: str, tasks: int, function: str = "nothing") -> dict[str, Any]:
    return {
        "name": name,
        "code": {"files": {"calls.py": CODE}},
        "tasks": {"entrypoint": f"calls:{function}", "arguments": [{} for _ in range(tasks)]},
    }


def _round_trips_ms(running: phalanx.LocalCluster) -> dict[str, float]:
    """The sum over the tasks of each job."""
    found = {}
    for member in running.processes():
        if member.role == "aggregator":
            url = f"http://{member.metrics_address}/metrics"
            with urllib.request.urlopen(url, timeout=10) as response:
                text = response.read().decode()
            found.update({job: float(each) * 1000 for job, each in ROUND_TRIP.findall(text)})
    return found


def _alone(running: phalanx.LocalCluster) -> tuple[list[float], list[float]]:
    """One job of one task after another: round trips, and the part of each until the report."""
    trips, reported = [], []
    for number in range(ALONE):
        one = running.submit({**_job(f"alone-{number}", 1), "resources": {"max_workers": 1}})
        one.wait(timeout_s=TIMEOUT_S)
        trips.append(_round_trips_ms(running)[one.id])
        reported += [(each.round_trip_s - each.seconds) * 1000 for each in one.results()]
    return trips[WARM_UP:], reported[WARM_UP:]


def run(command: str) -> list[Measurement]:
    """One large job, then many of one task, then one whose tasks take long enough to be alone."""
    with cluster(2) as running:
        many = running.submit(_job("many", TASKS))
        while many.refresh().state in ("QUEUED", "RUNNING") and not many.message.progress.step:
            time.sleep(0.01)
        began_s, before = time.monotonic(), many.message.progress.step
        many.wait(timeout_s=TIMEOUT_S)
        rate = (TASKS - before) / (time.monotonic() - began_s)
        trips, reported = _alone(running)
        rested = running.submit({**_job("rested", ALONE, "rest"), "resources": {"max_workers": 1}})
        rested.wait(timeout_s=TIMEOUT_S)
        rested_ms = _round_trips_ms(running)[rested.id] / ALONE
    trip_ms = statistics.median(trips)
    raw = floor.measure(REST_S)
    return [
        Measurement(
            name="tasks_per_s",
            value=rate,
            unit="tasks/s",
            baseline=RATE_MIN,
            ratio=rate / RATE_MIN,
            reach=f">= {RATE_MIN:.0f}",
            reached=rate >= RATE_MIN,
            command=command,
            note=f"{TASKS} no-op tasks on 2 workers, each journalled before it is done",
        ),
        Measurement(
            name="task_round_trip_ms",
            value=trip_ms,
            unit="ms",
            baseline=ROUND_TRIP_MAX_MS,
            ratio=trip_ms / ROUND_TRIP_MAX_MS,
            reach=f"<= {ROUND_TRIP_MAX_MS:.0f}",
            reached=trip_ms <= ROUND_TRIP_MAX_MS,
            command=command,
            note=f"median of {len(trips)}, from handing out to durable; "
            f"{statistics.median(reported):.2f} ms of it until the report, slowest "
            f"{max(trips):.2f} ms; after rests of {REST_S:g} s {rested_ms:.2f} ms. The machine "
            f"itself: a message there and back {raw.message_ms:.2f} ms (after a rest "
            f"{raw.message_after_rest_ms:.2f}), two of these are needed; a small write on the "
            f"disk {raw.disk_ms:.2f} ms ({raw.disk_after_rest_ms:.2f})",
        ),
    ]
