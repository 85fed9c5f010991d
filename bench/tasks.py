"""Independent tasks that do nothing: how many per second, and how long one of them takes.

Each is handed out, called in a leaf process, reported, and durable in the journal before it counts
as done. The rate is that of the whole job between its first and its last result in the journal.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

from bench.clusters import cluster
from bench.results import Measurement
from phalanx.clients.storage import StorageClient

TASKS = 20_000
ALONE, WARM_UP = 30, 5
"""Tasks that run one after another on one worker, and those of them that are not counted."""

APPENDS = 100
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


async def _append_ms(storage: str) -> float:
    """How long a record like that of one result takes until it is durable; median."""
    taken = []
    async with StorageClient(storage) as client:
        for number in range(APPENDS):
            began_s = time.perf_counter()
            await client.append_journal("bench/tasks", [b"x" * 100], expected_sequence=number)
            taken.append((time.perf_counter() - began_s) * 1000)
    return statistics.median(taken)


def run(command: str) -> list[Measurement]:
    """One large job, then one whose tasks run one at a time, long enough to be handed out alone."""
    with cluster(2) as running:
        many = running.submit(_job("many", TASKS))
        while many.refresh().state in ("QUEUED", "RUNNING") and not many.message.progress.step:
            time.sleep(0.01)
        began_s, before = time.monotonic(), many.message.progress.step
        many.wait(timeout_s=TIMEOUT_S)
        rate = (TASKS - before) / (time.monotonic() - began_s)
        alone = running.submit({**_job("alone", ALONE, "rest"), "resources": {"max_workers": 1}})
        alone.wait(timeout_s=TIMEOUT_S)
        trips = [(each.round_trip_s - each.seconds) * 1000 for each in alone.results()[WARM_UP:]]
        durable_ms = asyncio.run(_append_ms(running.process("storage").address))
    trip_ms = statistics.median(trips) + durable_ms
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
            note=f"{statistics.median(trips):.2f} ms there and back besides the call itself, "
            f"and {durable_ms:.2f} ms until it is durable; slowest {max(trips) + durable_ms:.2f}",
        ),
    ]
