"""How long it takes until something happens, and what an idle cluster weighs."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

import psutil

from bench.clusters import cluster
from bench.results import Measurement

ROUNDS = 5
IMPORT = (
    "import time; start = time.perf_counter(); import phalanx; print(time.perf_counter() - start)"
)


def run(command: str) -> list[Measurement]:
    """`up_ready_s`, `import_s` and `control_idle_mb`."""
    ready = statistics.median(_up_seconds() for _ in range(ROUNDS))
    imported = statistics.median(_import_seconds() for _ in range(ROUNDS))
    idle = _control_idle_mb()
    return [
        Measurement("up_ready_s", ready, "s", None, None, "<= 3", ready <= 3, command),
        Measurement("import_s", imported, "s", None, None, "<= 0.3", imported <= 0.3, command),
        Measurement("control_idle_mb", idle, "MB", None, None, "<= 100", idle <= 100, command),
    ]


def _up_seconds() -> float:
    """From the start of the command to its word that a cluster with 4 workers is ready."""
    with tempfile.TemporaryDirectory() as state:
        phalanx = [sys.executable, "-P", "-m", "phalanx.cli"]
        start = time.perf_counter()
        subprocess.run(
            [*phalanx, "up", "--workers", "4", "--port", "0", "--state", state, "--detach"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - start
        subprocess.run([*phalanx, "down", "--state", state], check=True, stdout=subprocess.DEVNULL)
    return seconds


def _import_seconds() -> float:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def _control_idle_mb() -> float:
    with cluster(workers=2) as running:
        control = next(p for p in running.processes() if p.role == "control")
        time.sleep(3)
        return float(psutil.Process(control.pid).memory_info().rss) / 1e6
