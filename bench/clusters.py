"""What the benchmarks share: clusters, data, jobs and how a running job is timed."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import phalanx
from phalanx.sdk.job import Job

FASHION = Path(__file__).resolve().parent.parent / "examples" / "data" / "fashion-mnist-small"

IDLE_LEAF = """
import numpy as np
from phalanx.models.base import LeafSums, make_layout

class Idle:
    evaluation_sums = ("loss",)

    def __init__(self, schema, elements, writes):
        self.writes = writes
        self.layout = make_layout([("w", (elements,), False)], schema.dtype)
        self.elements = elements

    def initial_parameters(self, seed):
        return np.zeros(self.elements, self.layout.dtype)

    def gradient(self, parameters, batch, out):
        if self.writes:
            out.fill(0)
        return LeafSums(batch.rows, 0.0)

    def evaluate(self, parameters, batch):
        return np.zeros(1)

    def predict(self, parameters, features):
        return np.zeros(len(features))
"""
"""A model without arithmetic: what is left is the system's own cost."""


@contextmanager
def cluster(workers: int, **options: Any) -> Iterator[phalanx.LocalCluster]:
    """A cluster on this machine with one leaf process per worker."""
    with phalanx.LocalCluster(workers=workers, slots=1, **options) as running:
        yield running


def add_tiny_data(running: phalanx.Cluster) -> None:
    """A data set of 64 rows, for models that do not look at it."""
    rows = np.arange(64, dtype=np.float32).reshape(64, 1)
    running.data.add("tiny", rows, rows[:, 0], task="regression")


def idle_job(
    name: str,
    elements: int,
    shards: int,
    steps: int,
    optimizer: Mapping[str, Any],
    *,
    writes: bool = True,
) -> dict[str, Any]:
    """A job whose leaves do nothing but write zeros on a vector of so many float32 elements.

    With ``writes`` off they leave their buffer as it is, zeros from the start, which is only right
    where every slot has one leaf.
    """
    return {
        "name": name,
        "data": {"name": "tiny", "shards": shards},
        "code": {"files": {"idle.py": IDLE_LEAF}},
        "train": {
            "model": {
                "custom": {
                    "entrypoint": "idle:Idle",
                    "arguments": {"elements": elements, "writes": writes},
                },
                "standardise": False,
            },
            "optimizer": dict(optimizer),
            "synchronous": {},
            "batch_size": 64,
            "stop": {"steps": steps},
            "checkpoints": {"every": "3600s"},
        },
    }


def fashion_job(name: str, steps: int, checkpoint_every: int = 0) -> dict[str, Any]:
    """The MLP 784-128-10 of the benchmark table, 16 shards, batch 4,096, Adam."""
    checkpoints = {"every_steps": checkpoint_every} if checkpoint_every else {"every": "3600s"}
    return {
        "name": name,
        "data": {"name": "fashion", "shards": 16},
        "train": {
            "model": {"mlp": {"hidden": [128]}},
            "optimizer": {"adam": {"learning_rate": 0.001}},
            "synchronous": {},
            "batch_size": 4096,
            "stop": {"steps": steps},
            "evaluation": {"every_steps": 1_000_000},
            "checkpoints": checkpoints,
        },
    }


def step_seconds(job: Job, warm_up: int) -> list[float]:
    """Seconds between commits, from the times of the metric points, after a warm-up."""
    points = sorted(job.metrics(["train/loss"]), key=lambda point: point.step)
    kept = [point for point in points if point.step >= warm_up]
    return [
        (after.time - before.time).total_seconds() / (after.step - before.step)
        for before, after in itertools.pairwise(kept)
    ]


def steps_per_s(job: Job, warm_up: int) -> float:
    """Committed steps per second between the end of the warm-up and the last step."""
    points = sorted(job.metrics(["train/loss"]), key=lambda point: point.step)
    kept = [point for point in points if point.step >= warm_up]
    seconds = (kept[-1].time - kept[0].time).total_seconds()
    return (kept[-1].step - kept[0].step) / seconds


def hosting(job: Job) -> int:
    """How many workers hold shards of a job, as far as it is known here."""
    return sum(bool(worker.shards) for worker in job.progress.workers)


def median(values: list[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def wait_for(condition: Any, what: str, timeout_s: float = 60.0) -> None:
    """Poll until the condition holds; raises TimeoutError naming it."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s} s for {what}")
        time.sleep(0.01)
