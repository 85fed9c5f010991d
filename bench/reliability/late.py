"""What it costs when a worker neither dies nor delivers: it stops, hangs, or is cut off."""

from __future__ import annotations

import itertools
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

import phalanx
from bench.clusters import hosting, wait_for
from bench.reliability.jobs import LEAF_S_VARIABLE, add_clouds, commits_of, patient_job
from bench.reliability.rows import Row, Rows
from phalanx.chaos.report import percentile
from phalanx.copies import PATIENCE_FACTOR, PATIENCE_LEAST_S
from phalanx.sdk.values import Event
from phalanx.testing.proxied_cluster import ProxiedCluster

WORKERS, LEAF_S = 4, 0.1
STEPS = 10_000
"""More than it takes; of more than these not every one would be recorded with its time."""
TRIALS = 12
MEASURED_STEPS = 8
"""So many steps of all workers before each trial: a worker's times count after a few."""
SETTLES_S = 120.0
"""Within that the shards are where they belong after a trial."""
COPIES_REACH_S = 0.3
"""Beyond twice the p95 of the leaf time."""
LOST_REACH_S = 2.5
HANG_S = 1.5
"""How long a leaf hangs: longer than until it is copied."""
STOPPED, HANGING, CUT_OFF = "SIGSTOP", "hang", "partition"
KINDS = (STOPPED, HANGING, CUT_OFF)


def run(command: str, *, quick: bool) -> list[Row]:
    """Copies of what is late, and when a silent worker counts as lost."""
    copied_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    beyond_s: list[float] = []
    lost_s: list[float] = []
    trials = 2 if quick else TRIALS
    with (
        tempfile.TemporaryDirectory() as folder,
        ProxiedCluster(
            Path(folder), workers=WORKERS, environment={LEAF_S_VARIABLE: str(LEAF_S)}
        ) as network,
    ):
        add_clouds(network.cluster)
        # One leaf per worker and step, so that a missing one is missing from the start.
        job = network.cluster.submit(patient_job("late", WORKERS, STEPS))
        for kind, trial in itertools.product(KINDS, range(trials)):
            copied, leaf_s, lost = _harm_and_look(network, job, kind, trial % WORKERS)
            copied_s[kind].append(copied)
            beyond_s.append(copied - 2 * leaf_s)
            lost_s += [] if lost is None else [lost]
        job.cancel()
    medians = ", ".join(f"{kind} {percentile(copied_s[kind], 50):.2f} s" for kind in KINDS)
    made = Rows(command, quick)
    return [
        made.largest(
            "worker_stop_to_copies_s",
            "worker SIGSTOP, its leaf hangs under good heartbeats, or it is cut off → copies of "
            "its missing leaves started, beyond 2 × p95 of the leaf time (of 0.1 s, as the "
            "aggregator measures it)",
            beyond_s,
            "s",
            COPIES_REACH_S,
            f"from the harm, or the start of the step: medians {medians}, "
            f"largest {max(max(each) for each in copied_s.values()):.2f} s",
        ),
        made.largest(
            "worker_stop_to_lost_s",
            "worker SIGSTOP, or cut off → declared lost, with the default lease",
            lost_s,
            "s",
            LOST_REACH_S,
        ),
    ]


def _harm_and_look(
    network: ProxiedCluster, job: phalanx.Job, kind: str, index: int
) -> tuple[float, float, float | None]:
    """Harm a worker; return the seconds until copies were started, the p95 of the leaf time then,
    and the seconds until it counted as lost."""
    _await_steps_of_all(job)
    worker_id = network.workers[index].id
    began_unix_s = time.time()

    def first(kind: str) -> Event | None:
        events = (each for each in network.cluster.events() if each.worker_id == worker_id)
        return next(
            (e for e in events if e.type == kind and e.time.timestamp() >= began_unix_s), None
        )

    with _harmed(network, kind, index):
        if kind == HANGING:
            time.sleep(HANG_S)
        else:
            wait_for(lambda: first("WORKER_LOST"), "the worker to be declared lost")
    lost = first("WORKER_LOST")
    copied = first("SPECULATION_STARTED")
    if copied is None or copied.step is None:
        raise AssertionError(f"{kind}: no copy of what {worker_id} owed was started")
    # A leaf that was delivered before the harm is missed from the next step on.
    begun = [each.unix_s for each in commits_of(job) if each.step <= copied.step]
    copied_s = copied.time.timestamp() - max(began_unix_s, max(begun, default=0.0))
    leaf_s = (float(copied.details["patience_s"]) - PATIENCE_LEAST_S) / PATIENCE_FACTOR
    return copied_s, leaf_s, None if lost is None else lost.time.timestamp() - began_unix_s


def _await_steps_of_all(job: phalanx.Job) -> None:
    """Wait for so many steps in which every worker holds a shard.

    One that hung looks slow for a while, and may lose its shard to the others until it is not.
    """
    begun_s = time.monotonic()
    while True:
        wait_for(
            lambda: hosting(job.refresh()) == WORKERS,
            "all workers to hold shards",
            timeout_s=SETTLES_S,
        )
        until = job.progress.step + MEASURED_STEPS
        wait_for(
            lambda until=until: hosting(job.refresh()) < WORKERS or job.progress.step >= until,
            "steps of all workers",
        )
        if hosting(job) == WORKERS:
            return
        if time.monotonic() - begun_s > SETTLES_S:
            raise TimeoutError(f"shards still move after {SETTLES_S:g} s")


@contextmanager
def _harmed(network: ProxiedCluster, kind: str, index: int) -> Iterator[None]:
    """Stop a worker, only its leaf process, or its network, for as long as the block lasts."""
    if kind == CUT_OFF:
        network.cut_off(index)
        try:
            yield
        finally:
            network.heal()
        return
    session = psutil.Process(network.workers[index].process.pid)
    children = session.children(recursive=True)
    processes = children if kind == HANGING else [session, *children]
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)
