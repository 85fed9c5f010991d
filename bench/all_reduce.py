"""What a worker sends in an all-reduce step, as a multiple of the parameters."""

from __future__ import annotations

import urllib.request

import phalanx
from bench.clusters import add_tiny_data, cluster, idle_job, wait_for
from bench.results import Measurement
from phalanx.frames import BLOCK_ELEMENTS

ELEMENTS = 16 * BLOCK_ELEMENTS
SHARDS = 8
STEPS = (4, 24)
SGD = {"sgd": {"learning_rate": 0.1}}
REACH = 2.2
WHOLE = (1, 2, 4, 8)
"""Numbers of workers that can have one whole sub-tree each."""

_NAME = "phalanx_member_bytes_total"


def run(command: str) -> list[Measurement]:
    """One figure for each number of workers: the one that sends most."""
    results = []
    with cluster(1) as running:
        add_tiny_data(running)
        for workers in range(1, SHARDS + 1):
            while len(_workers(running)) < workers:
                running.add_worker()
            wait_for(lambda n=workers: _ready(running) == n, f"{workers} workers")
            sent = _sent_per_step(running)
            bound = REACH if workers in WHOLE else None
            results.append(
                Measurement(
                    f"all_reduce_sent_{workers}",
                    sent,
                    "ratio",
                    None,
                    sent,
                    f"<= {REACH}" if bound else "",
                    sent <= bound if bound else None,
                    command,
                )
            )
    return results


def _sent_per_step(running: phalanx.LocalCluster) -> float:
    """By the difference of two jobs, so that what is sent once at the start does not count."""
    sent = []
    for steps in STEPS:
        before = _counters(running)
        job = idle_job(f"all-reduce-{steps}", ELEMENTS, SHARDS, steps, SGD)
        job["train"]["all_reduce"] = {}
        running.submit(job).wait(timeout_s=120)
        after = _counters(running)
        sent.append({name: after[name] - before[name] for name in after})
    each = [(sent[1][name] - sent[0][name]) / (STEPS[1] - STEPS[0]) for name in sent[0]]
    return max(each) / (ELEMENTS * 4)


def _counters(running: phalanx.LocalCluster) -> dict[str, float]:
    return {name: _counter(address) for name, address in _workers(running).items()}


def _counter(address: str) -> float:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{_NAME} "))


def _workers(running: phalanx.LocalCluster) -> dict[str, str]:
    members = (each for each in running.processes() if each.role == "worker")
    return {each.id: each.metrics_address for each in members}


def _ready(running: phalanx.LocalCluster) -> int:
    """Workers that control knows and that have said where their metrics are."""
    known = sum(each.state == each.STATE_READY for each in running.describe().workers)
    return min(known, sum(bool(address) for address in _workers(running).values()))
