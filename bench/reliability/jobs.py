"""A job with leaves that take a set time and hardly any processor time.

Two cores cannot compute for 32 workers; what is measured here is the system, not the processor. So
a leaf is real arithmetic on few rows, and then it waits, in short ticks, so that a process that is
stopped nine tenths of the time is ten times slower. The waiting is set by an environment variable
of the workers: a computation without it, in one process, gives the same bits at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import phalanx
from bench.clusters import cluster, hosting, wait_for
from phalanx.chaos.report import Commit
from phalanx.chaos.victims import LocalVictims
from phalanx.errors import Unavailable
from phalanx.testing.arena import SOFTMAX_MODEL
from phalanx.v1.cluster_service_pb2 import Worker

LEAF_S_VARIABLE = "PHALANX_BENCH_LEAF_S"
MARKS_VARIABLE = "PHALANX_BENCH_MARKS"
"""A folder in which each leaf process keeps two files with a line per leaf: when it was computed,
and, ``began-…``, when that began."""
GUARD_S = 600.0
ROWS = 1116
"""A multiple of every number of shards used here, so that an epoch is one whole step."""

PATIENT_MODEL = '''
"""A softmax regression whose leaves take a set time."""

import os
import time

from softmax import Softmax

TICK_S = 0.005
TICKS = round(float(os.environ.get("PHALANX_BENCH_LEAF_S", "0")) / TICK_S)
MARKS = os.environ.get("PHALANX_BENCH_MARKS")


class Patient(Softmax):
    def loss_and_gradients(self, parameters, features, targets):
        self._mark("began-")
        for _ in range(TICKS):
            time.sleep(TICK_S)
        found = super().loss_and_gradients(parameters, features, targets)
        self._mark("")
        return found

    def _mark(self, what):
        if MARKS:
            with open(os.path.join(MARKS, what + str(os.getpid())), "a") as marks:
                print(time.time(), file=marks)
'''


def leaf_times(marks: Path, pid: int, what: str = "") -> list[float]:
    """When the leaves of a leaf process were computed, or ``began-``; none before the first."""
    path = marks / f"{what}{pid}"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [float(line) for line in lines if line.endswith("\n")]


def open_leaf_s(marks: Path, pids: Iterable[int]) -> float | None:
    """When the leaf began that one of these leaf processes has not finished; None if none is."""
    for pid in pids:
        computed = len(leaf_times(marks, pid))
        began = leaf_times(marks, pid, "began-")
        if len(began) > computed:
            return began[-1]
    return None


@contextmanager
def patient_cluster(
    workers: int,
    leaf_s: float,
    *,
    marks: Path | None = None,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> Iterator[phalanx.LocalCluster]:
    """A cluster with the data set of the job, whose leaves take so long."""
    environment = {**(environment or {}), LEAF_S_VARIABLE: str(leaf_s)}
    if marks is not None:
        environment[MARKS_VARIABLE] = str(marks)
    with cluster(workers=workers, environment=environment, **options) as running:
        add_clouds(running)
        yield running


def add_clouds(running: phalanx.Cluster) -> None:
    """Four clouds of points with features of very different sizes, so that any other order of
    summing gives other bits."""
    rng = np.random.default_rng(17)
    targets = rng.integers(0, 4, ROWS)
    features = rng.standard_normal((ROWS, 12)) + targets[:, None]
    running.data.add("clouds", (features * 10.0 ** rng.integers(-3, 3, 12)).astype("f4"), targets)


def patient_job(
    name: str, shards: int, steps: int, *, checkpoint_every: int = 20
) -> dict[str, Any]:
    """So many steps over so many shards, each of them an epoch."""
    assert ROWS % shards == 0, "a rest would make every other step a short one"
    return {
        "name": name,
        "data": {"name": "clouds", "shards": shards},
        "code": {"files": {"softmax.py": SOFTMAX_MODEL, "patient.py": PATIENT_MODEL}},
        "train": {
            "model": {"custom": {"entrypoint": "patient:Patient"}},
            "optimizer": {"adam": {"learning_rate": 0.01}},
            "batch_size": ROWS,
            "stop": {"steps": steps},
            "checkpoints": {"every_steps": checkpoint_every},
        },
    }


def undisturbed_sha256(job: dict[str, Any]) -> str:
    """The bits of the job in one process, whose leaves do not wait."""
    assert LEAF_S_VARIABLE not in os.environ
    with phalanx.LocalCluster(workers=0) as alone:
        add_clouds(alone)
        return alone.submit(job).wait(timeout_s=GUARD_S).parameters_sha256


@contextmanager
def kept_down(running: phalanx.LocalCluster, id: str) -> Iterator[None]:
    """Kill a process of the cluster, and let none of the same name come up within the block.

    The supervisor starts another at once. That one is stopped before it has spoken to anybody, and
    killed at the end, so that the process that comes up then has begun afresh.
    """
    old = running.process(id).pid
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: running.process(id).pid not in (0, old), f"the next {id}")
    held = running.process(id).pid
    os.kill(held, signal.SIGSTOP)
    try:
        yield
        kept = running.process(id)
        if kept.pid != held or kept.address or kept.metrics_address:
            raise AssertionError(f"{id} should have stayed down and came up")
    finally:
        os.kill(held, signal.SIGKILL)
    wait_for(lambda: running.process(id).pid not in (0, held), f"{id} to be started again")


def all_host(running: phalanx.LocalCluster, job: phalanx.Job, workers: int) -> bool:
    """Whether all processes are up and so many workers hold shards of the job."""
    try:
        hosts = hosting(job.refresh())
    except Unavailable:
        return False
    return hosts == workers and LocalVictims(running.state_dir).all_up()


def all_ready(running: phalanx.LocalCluster, workers: int) -> bool:
    """Whether all processes are up and so many workers are connected, with or without shards."""
    try:
        states = [worker.state for worker in running.describe().workers]
    except Unavailable:
        return False
    return states.count(Worker.STATE_READY) == workers and LocalVictims(running.state_dir).all_up()


def commits_of(job: phalanx.Job) -> list[Commit]:
    """The committed steps so far and their times."""
    return [Commit(point.step, point.time.timestamp()) for point in job.metrics(["train/loss"])]
