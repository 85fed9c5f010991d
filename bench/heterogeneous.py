"""Workers that are not alike: one slower, one a straggler, one that comes when half is done.

Leaves wait instead of computing, so that two cores do for four workers. The ideal is what the total
speed of the workers allows, measured against four equal ones: a worker that is four times slower
counts for a quarter.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

import phalanx
from bench.clusters import wait_for
from bench.reliability.jobs import (
    GUARD_S,
    all_ready,
    commits_of,
    patient_cluster,
    patient_job,
    undisturbed_sha256,
)
from bench.results import Measurement

WORKERS, SHARDS, LEAF_S, STEPS = 4, 124, 0.01, 64
EQUAL_STEPS = 24
REACH = 1.15
CYCLE_S = 0.1
"""A slow worker runs for a part of each such time: no shorter than some ticks of a leaf, and short
against a step. What stops for as long as a step takes makes each step wait for a whole stop, which
says nothing of slowness."""


def run(command: str) -> list[Measurement]:
    """`heterogeneous_…`: seconds of the job ÷ the ideal ones."""
    sha256 = undisturbed_sha256(_job(STEPS))
    equal_s, setup_s = _equal()

    def measured(name: str, what: str, seconds: float, leaves_s: float) -> Measurement:
        ideal_s = setup_s + leaves_s
        ratio = seconds / ideal_s
        return Measurement(
            f"heterogeneous_{name}",
            seconds,
            "s",
            ideal_s,
            ratio,
            f"<= {REACH} ideal",
            ratio <= REACH,
            command,
            note=f"{what}; {WORKERS} equal workers take {equal_s:.1f} s",
        )

    found = []
    for name, times in (("slow", 4), ("straggler", 10)):
        leaves_s = equal_s * WORKERS / (WORKERS - 1 + 1 / times)
        seconds = _seconds(WORKERS, sha256, slow_times=times)
        found.append(measured(name, f"one of them {times} × slower", seconds, leaves_s))
    half = STEPS // 2
    joined_s = _seconds(WORKERS - 1, sha256, join_at=half)
    with_three_s = equal_s * WORKERS / (WORKERS - 1)
    leaves_s = (half * with_three_s + (STEPS - half) * equal_s) / STEPS
    return [*found, measured("join", "the fourth joins half way", joined_s, leaves_s)]


def _job(steps: int) -> dict[str, object]:
    return patient_job("heterogeneous", SHARDS, steps, checkpoint_every=10 * STEPS)


def _equal() -> tuple[float, float]:
    """On equal workers: the time of all steps, and that from the start to the first of them."""
    with patient_cluster(WORKERS, LEAF_S) as running:
        wait_for(lambda: all_ready(running, WORKERS), "all workers")
        job = running.submit(_job(EQUAL_STEPS))
        job.wait(timeout_s=GUARD_S)
        commits = commits_of(job)
        step_s = (commits[-1].unix_s - commits[0].unix_s) / (EQUAL_STEPS - 1)
        first_s = commits[0].unix_s - _started_unix_s(running, job)
        return STEPS * step_s, max(0.0, first_s - step_s)


def _seconds(workers: int, sha256: str, *, slow_times: int = 1, join_at: int = 0) -> float:
    """Run the job; return the time from its start to its last committed step."""
    with patient_cluster(workers, LEAF_S) as running:
        wait_for(lambda: all_ready(running, workers), "all workers")
        pid = running.process("worker-1").pid
        with slowed(pid, slow_times) if slow_times > 1 else contextlib.nullcontext():
            job = running.submit(_job(STEPS))
            if join_at:
                wait_for(_reached(job, join_at), "the step to join at", GUARD_S)
                running.add_worker()
            result = job.wait(timeout_s=GUARD_S)
        assert result.parameters_sha256 == sha256, "the bits are those of other workers"
        return commits_of(job)[-1].unix_s - _started_unix_s(running, job)


def _started_unix_s(running: phalanx.LocalCluster, job: phalanx.Job) -> float:
    started = (event for event in running.events(job.id) if event.type == "JOB_STARTED")
    return next(started).time.timestamp()


def _reached(job: phalanx.Job, step: int) -> Callable[[], bool]:
    return lambda: job.refresh().progress.step >= step


@contextmanager
def slowed(pid: int, times: int) -> Iterator[None]:
    """Let a process and its children run for a part of the time only."""
    over = threading.Event()
    process = psutil.Process(pid)

    def signalled(number: signal.Signals, family: list[psutil.Process]) -> None:
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                each.send_signal(number)

    def cycle() -> None:
        while not over.is_set():
            with contextlib.suppress(psutil.NoSuchProcess):
                family = [process, *process.children(recursive=True)]
                try:
                    signalled(signal.SIGSTOP, family)
                    over.wait(CYCLE_S * (1 - 1 / times))
                finally:
                    signalled(signal.SIGCONT, family)
            over.wait(CYCLE_S / times)

    thread = threading.Thread(target=cycle, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
