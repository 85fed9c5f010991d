"""Kills a worker in the middle of a leaf of any job, also of one whose leaves no gate holds."""

from __future__ import annotations

import contextlib
import signal

import psutil

from phalanx.sdk.job import Job
from phalanx.testing.arena import Arena, send, wait_until


def kill_in_a_leaf(ring: Arena, job: Job, step: int, worker_id: str = "worker-1") -> None:
    """Kill a worker whose leaf process stands still, once the job has committed ``step``.

    The leaf process is stopped first, and the worker dies only when the cluster has noticed that
    its shards are late: so what it held is unfinished, whatever the speed of the machine. Raises
    AssertionError where the job was over before.
    """
    ring.at_step(job, step)
    worker = psutil.Process(ring.cluster.process(worker_id).pid)
    leaves = worker.children(recursive=True)
    assert leaves, f"{worker_id} has no leaf process"
    for leaf in leaves:
        with contextlib.suppress(psutil.NoSuchProcess):
            leaf.send_signal(signal.SIGSTOP)

    def is_late() -> bool:
        started = ring.events("SPECULATION_STARTED")
        return any(each.job_id == job.id for each in started) or job.refresh().done

    wait_until(is_late, "copies of what the worker owes")
    assert not job.done, "the job was over before the worker was late"
    send(worker.pid, signal.SIGKILL)
    for leaf in leaves:
        with contextlib.suppress(psutil.NoSuchProcess):
            leaf.send_signal(signal.SIGCONT)
