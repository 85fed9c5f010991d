"""Independent tasks that do nothing: how many per second, and how long one of them takes.

Each is handed out, called in a leaf process, reported, and durable in the journal before it counts
as done. The rate is that of the whole job between its first and its last result in the journal.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from bench.clusters import cluster
from bench.results import Measurement

TASKS = 20_000
SINGLE_JOBS = 25
RATE_MIN = 2000.0
ROUND_TRIP_MAX_MS = 3.0
CODE = "def nothing():\n    return None\n"
TIMEOUT_S = 80.0


def _job(name: str, tasks: int) -> dict[str, Any]:
    return {
        "name": name,
        "code": {"files": {"nothing.py": CODE}},
        "tasks": {"entrypoint": "nothing:nothing", "arguments": [{} for _ in range(tasks)]},
    }


def run(command: str) -> list[Measurement]:
    """One large job, then many of one task each."""
    with cluster(2) as running:
        many = running.submit(_job("many", TASKS))
        while many.refresh().state in ("QUEUED", "RUNNING") and not many.message.progress.step:
            time.sleep(0.01)
        began_s, before = time.monotonic(), many.message.progress.step
        many.wait(timeout_s=TIMEOUT_S)
        rate = (TASKS - before) / (time.monotonic() - began_s)
        trips = []
        for number in range(SINGLE_JOBS):
            job = running.submit(_job(f"single-{number}", 1))
            job.wait(timeout_s=TIMEOUT_S)
            trips.append(job.results()[0].round_trip_s * 1000)
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
            value=statistics.median(trips),
            unit="ms",
            baseline=ROUND_TRIP_MAX_MS,
            ratio=statistics.median(trips) / ROUND_TRIP_MAX_MS,
            reach=f"<= {ROUND_TRIP_MAX_MS:.0f}",
            reached=statistics.median(trips) <= ROUND_TRIP_MAX_MS,
            command=command,
            note=f"median of {SINGLE_JOBS} jobs of one task; slowest {max(trips):.2f} ms",
        ),
    ]
