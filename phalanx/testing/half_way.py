"""Kills a worker in the middle of a leaf of any job, also of one whose leaves no gate holds."""

from __future__ import annotations

import contextlib
import signal

import psutil

from phalanx.sdk.job import Job
from phalanx.testing.arena import Arena, not_over, send, stopped, wait_until


def kill_in_a_leaf(ring: Arena, job: Job, step: int, worker_id: str = "worker-1") -> None:
    """Kill a worker whose leaf process stands still, once the job has committed ``step``.

    The leaf process is stopped first, and the worker dies only when the cluster has noticed that
    its shards are late: so what it held is unfinished, whatever the speed of the machine. The
    leaves of all others stand still until its death has been noticed, too, so that the job does not
    run away meanwhile. Raises TooLate where the job was over before.
    """
    ring.at_step(job, step)
    worker = psutil.Process(ring.cluster.process(worker_id).pid)
    leaves = _leaves_of(worker)
    assert leaves, f"{worker_id} has no leaf process"
    with contextlib.ExitStack() as standing:
        _stop(leaves, standing)

        def is_late() -> bool:
            started = ring.events("SPECULATION_STARTED")
            return any(each.job_id == job.id for each in started) or job.refresh().done

        wait_until(is_late, "copies of what the worker owes")
        for other in ring.cluster.processes():
            if other.role == "worker" and other.id != worker_id and other.pid:
                _stop(_leaves_of(psutil.Process(other.pid)), standing)
        not_over(job.refresh())
        lost = len(ring.events("WORKER_LOST"))
        send(worker.pid, signal.SIGKILL)
        wait_until(lambda: len(ring.events("WORKER_LOST")) > lost, "the worker to be missed")


def kill_the_aggregators(ring: Arena, job: Job, step: int) -> None:
    """Kill all owners of parameters once the job has committed ``step``; return when they are
    missed. Raises TooLate where the job was over before."""
    ring.at_step(job, step)
    for member in ring.cluster.processes():
        if member.role == "aggregator":
            ring.signal(member.id)

    def missed() -> bool:
        return any(each.job_id == job.id for each in ring.events("AGGREGATOR_LOST"))

    wait_until(lambda: missed() or job.refresh().done, "the aggregators to be missed")
    if not missed():
        not_over(job)


def _leaves_of(worker: psutil.Process) -> list[psutil.Process]:
    found: list[psutil.Process] = worker.children(recursive=True)
    return found


def _stop(leaves: list[psutil.Process], standing: contextlib.ExitStack) -> None:
    for leaf in leaves:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            standing.enter_context(stopped(leaf.pid))
