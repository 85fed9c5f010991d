"""100 MB of parameters to and fro: against a bare gRPC echo, against Gloo, and in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import phalanx
from bench.clusters import add_tiny_data, cluster, idle_job, median, step_seconds
from bench.echo import EchoBaseline
from bench.results import Measurement
from phalanx.frames import frame_grid

ELEMENTS = 25_000_000
PARAMETER_BYTES = ELEMENTS * 4
WORKERS = 2
STEPS = 14
WARM_UP = 4
ROUNDS = 4
SGD = {"sgd": {"learning_rate": 0.1}}
ADAM = {"adam": {"learning_rate": 0.001}}


def run(command: str) -> list[Measurement]:
    """The exchange against the echo and Gloo, and the aggregator's peak memory."""
    frames = [count * 4 for _, count in frame_grid(ELEMENTS, 4)]
    echoes = {kind: EchoBaseline(kind, WORKERS, frames) for kind in ("threads", "asyncio")}
    ours: list[float] = []
    rates: dict[str, list[float]] = {kind: [] for kind in echoes}
    try:
        for _ in range(ROUNDS):
            ours += _step_seconds(SGD)[0]
            for kind, echo in echoes.items():
                rates[kind] += [echo.measure_bytes_per_s() for _ in range(STEPS)][WARM_UP:]
    finally:
        for echo in echoes.values():
            echo.close()
    baseline = max(median(values) for values in rates.values())
    moved = 2 * WORKERS * PARAMETER_BYTES
    step_s = median(ours)
    rate = moved / step_s
    results = [
        Measurement(
            "exchange_100mb_vs_grpc_echo",
            rate / 1e9,
            "GB/s",
            baseline / 1e9,
            rate / baseline,
            ">= 0.7",
            rate / baseline >= 0.7,
            command,
        ),
        *_against_gloo(step_s, command),
    ]
    for name, optimizer, reach in (("sgd", SGD, 4.0), ("adam", ADAM, 6.0)):
        ratio = _step_seconds(optimizer)[1] / PARAMETER_BYTES
        results.append(
            Measurement(
                f"aggregator_memory_ratio_{name}",
                ratio,
                "ratio",
                None,
                ratio,
                f"<= {reach:g}",
                ratio <= reach,
                command,
            )
        )
    return results


def _step_seconds(optimizer: dict[str, Any]) -> tuple[list[float], int]:
    """Seconds of each step in a cluster of its own, and the aggregator's peak above idle."""
    with cluster(workers=WORKERS) as running:
        add_tiny_data(running)
        aggregator = next(p for p in running.processes() if p.role == "aggregator")
        idle_bytes = _memory_bytes(aggregator.pid, "VmRSS")
        job = running.submit(
            idle_job("exchange", ELEMENTS, WORKERS, STEPS, optimizer, writes=False)
        )
        peak_bytes = _wait(job, aggregator.pid)
        return step_seconds(job, WARM_UP), peak_bytes - idle_bytes


def _wait(job: phalanx.Job, pid: int) -> int:
    """Wait for the job; return the peak memory of the process while steps were committed."""
    peak = 0
    for _ in job.watch():
        peak = max(peak, _memory_bytes(pid, "VmHWM"))
    job.raise_if_failed()
    return max(peak, _memory_bytes(pid, "VmHWM"))


def _memory_bytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"process {pid} has no {field}")


def _against_gloo(step_s: float, command: str) -> list[Measurement]:
    python = os.environ.get("PHALANX_TORCH_PYTHON", "")
    name = "exchange_100mb_vs_gloo"
    if not python:
        print(f"  {name}: left out, torch is not installed (PHALANX_TORCH_PYTHON)", file=sys.stderr)
        return []
    done = subprocess.run(
        [python, "-m", "bench.gloo", str(PARAMETER_BYTES), "10"],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    gloo_s = float(done.stdout)
    ratio = step_s / gloo_s
    return [Measurement(name, step_s, "s", gloo_s, ratio, "<= 5", ratio <= 5, command)]
